"""A file in an SVDQ format in the store: found by its recipe, loaded, described for the record; another is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.generation.wan_animate.loading import load_transformer
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.svdq_linear import SvdqLinear
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import ModelStore
from runner.weights.variant import quantized_folder
from tests.generation.fp4_stores import OWN, transformer_config, write_own, write_source
from tests.quantization.svdq_files import LAYOUTS, write_svdq

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])


@pytest.fixture(scope="module")
def root(tiny_store_dir, tmp_path_factory) -> Path:
    """A store with an FP4 file, a LoRA beside, and a file in each SVDQ format; not to be changed."""
    source = write_source(tmp_path_factory.mktemp("source") / "models", tiny_store_dir)
    root = write_own(tmp_path_factory.mktemp("svdq") / "models", source)
    for layout in LAYOUTS:
        write_svdq(file_of(root, layout), transformer_config(source), layout)
    return root


def file_of(root: Path, layout: SvdqLayout) -> Path:
    return root / quantized_folder(get_recipe("fp4-distill"), layout.name) / Path(OWN).name


def resolve(root: Path, layout: SvdqLayout) -> ResolvedRecipe:
    return resolve_recipe(ModelStore(root), get_recipe(f"fp4-distill+{layout.name}"))


@every_layout
def test_the_file_is_loaded_and_described(root, layout):
    model, said = load_transformer(resolve(root, layout), torch.device("cpu"), torch.float32)
    path = file_of(root, layout)
    assert said["transformer"] == f"{path.relative_to(root)} is there"
    assert {key: said[key] for key in ("format", "svdq_layers", "rank", "smoothing", "calibration", "refits")} == {
        "format": layout.name,
        "svdq_layers": 64,
        "rank": 16,
        "smoothing": "calibrated",
        "calibration": {"jobs": 2, "steps": 6, "rows": 4096},
        "refits": 1,
    }
    assert said["made_with"]["video_lab.rank"] == "16"
    json.dumps(said)
    layers = [module for module in model.modules() if isinstance(module, SvdqLinear)]
    assert len(layers) == 64
    assert type(model.proj_out) is torch.nn.Linear
    assert {str(layer.smooth_factor.dtype) for layer in layers} == {"torch.bfloat16"}
    assert said["transformer_bytes"] == sum(p.nbytes for p in model.parameters())


@every_layout
def test_its_checksum_decides_the_frames(root, layout):
    fp4 = resolve_recipe(ModelStore(root), get_recipe("fp4-distill"))
    svdq = resolve(root, layout)
    assert svdq.files["transformer"] == (file_of(root, layout), file_of(root, layout).with_name("config.json"))
    assert svdq.digests["transformer"] != fp4.digests["transformer"]
    assert {name: d for name, d in svdq.digests.items() if name != "transformer"} == {
        name: d for name, d in fp4.digests.items() if name != "transformer"
    }


@pytest.mark.parametrize(("layout", "other"), [LAYOUTS, LAYOUTS[::-1]], ids=[layout.name for layout in LAYOUTS])
def test_a_file_in_the_folder_of_another_format_is_refused(root, tmp_path, layout, other):
    moved = tmp_path / "models"
    moved.mkdir()
    for path in root.iterdir():
        if not path.name.endswith(f"{layout.name.upper()}-distill"):
            (moved / path.name).symlink_to(path)
    with pytest.raises(WeightsMissing, match=f"no transformer in {layout.name}"):
        resolve(moved, layout)
    file_of(moved, layout).parent.mkdir()
    file_of(moved, layout).symlink_to(file_of(root, other))
    file_of(moved, layout).with_name("config.json").write_text("{}")
    with pytest.raises(WeightsCorrupt, match=rf"stored in {other.name}; \S+/ is for {layout.name}"):
        resolve(moved, layout)


def test_a_foreign_file_in_the_folder_of_published_ones_is_refused(root, tmp_path):
    from safetensors.torch import save_file

    moved = tmp_path / "models"
    moved.mkdir()
    for path in root.iterdir():
        if "-FP4" not in path.name and "-SVDQ-" not in path.name:
            (moved / path.name).symlink_to(path)
    folder = moved / "Wan2.2-Animate-14B-FP4"
    folder.mkdir()
    (folder / "config.json").write_text((root / OWN).with_name("config.json").read_text())
    tensors = {"a.qweight": torch.zeros(128, 64, dtype=torch.int8), "a.proj_down": torch.zeros(128, 16)}
    save_file(tensors, folder / Path(OWN).name, metadata={"cache_dit_svdq_ptq": "{}"})
    with pytest.raises(WeightsCorrupt, match="a checkpoint of cache-dit, not a file of `quantize`"):
        resolve_recipe(ModelStore(moved), get_recipe("fp4"))
