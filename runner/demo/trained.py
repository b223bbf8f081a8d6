"""Trained: the weights that ship with the demo, put where a store has them.

In:   a folder. Out: `Wan2.2-Animate-14B-Diffusers/` and `distill_lora/` in it, copied from `weights/` beside this file.
Never: training (tools/train_demo.py made them), quantisation.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from runner.errors import ConfigInvalid

__all__ = ["TRAINED", "copy_trained", "trained_digest"]

TRAINED = Path(__file__).with_name("weights")
_FOLDERS = ("Wan2.2-Animate-14B-Diffusers", "distill_lora")


def copy_trained(root: Path) -> Path:
    """Copy the models into `root`; returns the LoRA's path there. ConfigInvalid where the package came without them."""
    for name in _FOLDERS:
        if not (TRAINED / name).is_dir():
            raise ConfigInvalid(
                "the demo's trained weights are not here",
                where=TRAINED / name,
                todo="Install the package from its wheel or from a whole checkout, or make them: tools/train_demo.py",
            )
        shutil.copytree(TRAINED / name, root / name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    (lora,) = (root / _FOLDERS[1]).glob("*.safetensors")
    return lora


def trained_digest() -> str:
    """Identity of the files that `copy_trained` copies."""
    digest = hashlib.sha256()
    for path in sorted(p for name in _FOLDERS for p in (TRAINED / name).rglob("*") if p.is_file()):
        digest.update(path.relative_to(TRAINED).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
