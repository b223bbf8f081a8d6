"""The weights that ship: complete, small, in the store's layout, and better than chance at what they are for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from runner.demo.build import TRAINED, build_demo_models, copy_trained, trained_digest
from runner.errors import ConfigInvalid
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import COMPONENTS, ModelStore

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    build_demo_models(root)
    return root


def test_trained_weights_are_bfloat16_of_at_most_12_mb() -> None:
    files = [path for path in TRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {"BF16"}  # noqa: SIM118
    assert (TRAINED / "README.md").is_file()  # the model card


def test_linear_layers_of_demo_transformer_can_be_quantised(store: Path) -> None:
    from diffusers import WanAnimateTransformer3DModel

    config = ResolvedRecipe(ModelStore(store), get_recipe("fp32")).config("transformer")
    assert config["added_kv_proj_dim"] is not None
    with torch.device("meta"):
        model = WanAnimateTransformer3DModel.from_config(config)
    assert all(m.in_features % 32 == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_demo_store_is_complete_for_both_recipes(store: Path) -> None:
    models = ModelStore(store)
    for name in ("fp32", "fp4-distill"):
        resolved = resolve_recipe(models, get_recipe(name))
        for component in COMPONENTS:
            assert resolved.config(component)
    marker = json.loads((store / "demo.json").read_text())
    assert marker["version"].endswith(trained_digest()[:16])


def test_copy_trained_without_weights_is_config_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.demo.build.TRAINED", tmp_path / "nowhere")
    with pytest.raises(ConfigInvalid, match="weights are missing"):
        copy_trained(tmp_path / "store")


def test_demo_model_transfers_motion(store: Path) -> None:
    """The clip of an unseen dancer and dance, in four steps, is nearer to the true frames than the still reference is.

    Its colours are nearer to those of its own dancer than to those of each of twenty others.
    """
    sys.path.insert(0, str(BENCH))
    try:
        import _picture as picture
        from quality import Renderer, Trial, compare, held_out
    finally:
        sys.path.remove(str(BENCH))
    (lora,) = (store / "distill_lora").glob("*.safetensors")
    threads = torch.get_num_threads()
    renderer = Renderer(store, lora, ["bf16"])
    made = held_out(3, 32)
    clip = renderer.render(made, Trial("bf16 4 official", "bf16", 4), seed=1)
    torch.set_num_threads(threads)
    floor = compare(np.repeat(made.reference[None], len(clip), axis=0), made)
    ours = compare(clip, made)
    assert ours["psnr_inside"] > floor["psnr_inside"] + 5
    assert ours["psnr"] > floor["psnr"]
    seen = picture.part_colours(clip, made.take.joints())
    others = [picture.colour_distance(seen, picture.dancer_colours(held_out(k, 32).dancer)) for k in range(10, 30)]
    assert ours["colour"] < min(others)
