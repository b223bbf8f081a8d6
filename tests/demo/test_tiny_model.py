from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from runner.demo.tiny_model import TINY_FACE_SIZE, build_tiny_store
from runner.spec.options import DEFAULT_PROMPT
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import COMPONENTS, ModelStore

RECIPE = get_recipe("fp32")


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_random_state(tiny_store_dir, tmp_path):
    before = torch.random.get_rng_state()
    build_tiny_store(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digests(tmp_path / "again") == digests(tiny_store_dir)
    build_tiny_store(tmp_path / "other", seed=1)
    changed = {name for name, digest in digests(tmp_path / "other").items() if digests(tiny_store_dir)[name] != digest}
    assert {Path(name).parent.name for name in changed} == {"transformer", "vae", "text_encoder", "image_encoder"}


def test_it_has_the_production_layout_in_three_megabytes(tiny_store_dir):
    store = ModelStore(tiny_store_dir)
    for name in COMPONENTS:
        assert ResolvedRecipe(store, RECIPE).config(name)
    assert sum(path.stat().st_size for path in tiny_store_dir.rglob("*") if path.is_file()) < 3e6
    config = ResolvedRecipe(store, RECIPE).config("transformer")
    assert config["added_kv_proj_dim"] is not None  # the image cross-attention is there
    assert config["num_layers"] == 2 * config["inject_face_latents_blocks"]
    assert config["motion_encoder_size"] == TINY_FACE_SIZE


def test_every_linear_layer_can_be_quantised_in_groups_of_32(tiny_store_dir):
    from diffusers import WanAnimateTransformer3DModel

    with torch.device("meta"):
        model = WanAnimateTransformer3DModel.from_config(
            ResolvedRecipe(ModelStore(tiny_store_dir), RECIPE).config("transformer")
        )
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 4 * 12 + 2 * 4 + 9  # per block, per face adapter, and the same nine as the 14B model
    assert all(module.in_features % 32 == 0 for module in linears)


@pytest.mark.parametrize("prompt", [DEFAULT_PROMPT, "a man is dancing in the studio.", ""])
def test_prompts_are_read(tiny_store_dir, prompt):
    tokenizer = AutoTokenizer.from_pretrained(tiny_store_dir / RECIPE.weights / "tokenizer", local_files_only=True)
    ids = tokenizer(prompt).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert len(ids) < 40


def test_different_prompts_are_different(tiny_store_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_store_dir / RECIPE.weights / "tokenizer", local_files_only=True)
    prompts = [DEFAULT_PROMPT, "画面模糊", "a man dancing", "a woman dancing", "blurry"]
    assert len({tuple(tokenizer(prompt).input_ids) for prompt in prompts}) == len(prompts)
