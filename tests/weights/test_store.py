from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import ModelStore, wanted
from tests.safetensors_headers import edit_header, first_of, redeclare

RECIPE = get_recipe("fp32")
DETECTOR = "process_checkpoint/det/yolov10m.onnx"
POSE = "process_checkpoint/pose2d/vitpose_h_wholebody.onnx"


@pytest.fixture
def root(tiny_store_dir, tmp_path) -> Path:
    """A store of one's own, with something in place of the ONNX files."""
    root = tmp_path / "models"
    shutil.copytree(tiny_store_dir, root)
    for name in (DETECTOR, POSE):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"graph of {name}".encode())
    return root


def weights(root: Path) -> Path:
    return root / RECIPE.weights


def shard(root: Path) -> Path:
    """Split the transformer in two with an index, as the published one is split."""
    folder = weights(root) / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = sorted(tensors)
    halves = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def test_resolve_recipe_of_complete_store_passes(root):
    resolve_recipe(ModelStore(root), RECIPE)
    assert ModelStore(root).detector == root / DETECTOR
    assert ModelStore(root).pose == root / POSE


def test_resolve_recipe_of_empty_store_lists_all_files_with_sources(tmp_path):
    with pytest.raises(WeightsMissing) as caught:
        resolve_recipe(ModelStore(tmp_path), RECIPE)
    message = caught.value.message
    for name in (
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "image_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "image_processor/preprocessor_config.json",
    ):
        assert f"{RECIPE.weights}/{name}" in message
    assert DETECTOR in message
    assert f"{POSE}/end2end.onnx" in message
    assert "Wan-AI/Wan2.2-Animate-14B-Diffusers" in message
    assert "video-lab weights demo" in message
    assert caught.value.exit_code == 2


def test_resolve_recipe_without_fp4_file_lists_all_missing_files(tmp_path):
    with pytest.raises(WeightsMissing) as caught:
        resolve_recipe(ModelStore(tmp_path), get_recipe("fp4-distill"))
    message = caught.value.message
    for said in ("has no FP4 transformer", "vae/config.json", DETECTOR, "video-lab quantize --recipe fp4-distill"):
        assert said in message
    assert "transformer/diffusion_pytorch_model" not in message  # the source is what FP4 does without


def test_resolve_recipe_without_one_file_lists_only_that(root):
    (weights(root) / "vae/config.json").unlink()
    with pytest.raises(WeightsMissing, match="lacks 1 file\n") as caught:
        resolve_recipe(ModelStore(root), RECIPE)
    assert "vae/config.json" in caught.value.message


def test_resolve_recipe_without_store_folder_is_weights_missing(tmp_path):
    with pytest.raises(WeightsMissing, match="no such folder"):
        resolve_recipe(ModelStore(tmp_path / "nowhere"), RECIPE)


def test_resolve_recipe_of_sharded_weights_passes(root):
    shard(root)
    resolve_recipe(ModelStore(root), RECIPE)


def test_missing_shard_is_named(root):
    folder = shard(root)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsMissing, match="00002-of-00002"):
        resolve_recipe(ModelStore(root), RECIPE)


def test_index_that_disagrees_with_shards_is_weights_corrupt(root):
    folder = shard(root)
    first = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    tensors = load_file(first)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, first)
    with pytest.raises(WeightsCorrupt, match="where the index puts it"):
        resolve_recipe(ModelStore(root), RECIPE)


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "weights.bin"])
def test_index_that_names_other_than_neighbouring_safetensors_is_refused(root, name):
    folder = shard(root)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsCorrupt, match="no safetensors file beside it"):
        resolve_recipe(ModelStore(root), RECIPE)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_truncated_weights_are_found_by_header(root, keep):
    """Empty, within the length, within the header, half-way, all but the last byte."""
    file = weights(root) / "vae/diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(WeightsCorrupt, match=r"empty|truncated") as caught:
        resolve_recipe(ModelStore(root), RECIPE)
    assert str(file) in caught.value.message
    assert caught.value.exit_code == 2


def test_safetensors_header_with_absurd_length_is_weights_corrupt(root):
    file = weights(root) / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(WeightsCorrupt):
        resolve_recipe(ModelStore(root), RECIPE)


@pytest.mark.parametrize(("said", "claimed"), [("F32", "I32"), ("BF16", "I16"), ("F16", "U16"), ("F64", "I64")])
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "image_encoder"])
def test_floats_declared_as_integers_are_refused(root, component, said, claimed):
    """If loaded, the bits of the floats would be read as integers: other frames, and no error."""
    (file,) = (weights(root) / component).glob("*.safetensors")
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[said]
    save_torch({name: tensor.to(dtype) for name, tensor in load_torch(file).items()}, file)
    resolve_recipe(ModelStore(root), RECIPE)
    name = first_of(file, said)
    redeclare(file, name, claimed)
    with pytest.raises(WeightsCorrupt, match=f"{name} is {claimed}, not F64 or F32 or F16 or BF16") as caught:
        resolve_recipe(ModelStore(root), RECIPE)
    assert str(file) in caught.value.message


def test_shard_with_floats_declared_as_integers_is_refused(root):
    file = shard(root) / "diffusion_pytorch_model-00002-of-00002.safetensors"
    redeclare(file, first_of(file, "F32"), "I32")
    with pytest.raises(WeightsCorrupt, match=r"00002-of-00002.* is I32"):
        resolve_recipe(ModelStore(root), RECIPE)


def test_integer_position_ids_pass_and_other_integers_are_refused(root):
    file = weights(root) / "image_encoder/model.safetensors"
    positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    save_torch(load_torch(file) | positions, file)
    resolve_recipe(ModelStore(root), RECIPE)
    edit_header(file, lambda header: header.update(other=header.pop(next(iter(positions)))))
    with pytest.raises(WeightsCorrupt, match="other is I64"):
        resolve_recipe(ModelStore(root), RECIPE)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "NaN"])
def test_config_that_json_reader_rejects_is_weights_corrupt(root, text):
    (weights(root) / "transformer/config.json").write_text(text)
    with pytest.raises(WeightsCorrupt, match="not "):
        resolve_recipe(ModelStore(root), RECIPE)


@pytest.mark.parametrize("name", [f"{RECIPE.weights}/text_encoder/model.safetensors", DETECTOR])
def test_git_lfs_pointer_is_weights_corrupt_with_remedy(root, name):
    (root / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsCorrupt, match="git lfs pull"):
        resolve_recipe(ModelStore(root), RECIPE)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_pickled_weights_are_refused(root, suffix):
    file = weights(root) / "image_encoder/model.safetensors"
    file.rename(file.with_name(f"pytorch_model{suffix}"))
    with pytest.raises(WeightsMissing, match=rf"pytorch_model\{suffix} is a pickle"):
        resolve_recipe(ModelStore(root), RECIPE)


def test_config_that_is_not_json_is_weights_corrupt(root):
    (weights(root) / "transformer/config.json").write_text("{")
    with pytest.raises(WeightsCorrupt, match="not JSON"):
        resolve_recipe(ModelStore(root), RECIPE)


def test_pose_model_is_found_in_each_published_form(root):
    (root / POSE).unlink()
    repacked = root / "process_checkpoint/pose2d/vitpose_h_wholebody_model.onnx"
    repacked.write_bytes(b"graph")
    assert ModelStore(root).pose == repacked
    (root / POSE).mkdir()
    (root / POSE / "end2end.onnx").write_bytes(b"graph")
    assert ModelStore(root).pose == root / POSE / "end2end.onnx"
    resolve_recipe(ModelStore(root), RECIPE)


def test_identity_of_onnx_graph_includes_external_weights(root):
    (root / POSE).unlink()
    (root / POSE).mkdir()
    (root / POSE / "end2end.onnx").write_bytes(b"graph")
    (root / POSE / "onnx__MatMul_1").write_bytes(b"weights")
    before = ResolvedRecipe(ModelStore(root), RECIPE).digests
    (root / POSE / "onnx__MatMul_1").write_bytes(b"Weights")
    assert changed(before, ResolvedRecipe(ModelStore(root), RECIPE).digests) == {"pose"}


def test_identity_of_repacked_graph_includes_external_weights(root):
    (root / POSE).unlink()
    folder = root / "process_checkpoint/pose2d"
    (folder / "vitpose_h_wholebody_model.onnx").write_bytes(b"graph")
    (folder / "vitpose_h_wholebody_data.bin").write_bytes(b"weights")
    before = ResolvedRecipe(ModelStore(root), RECIPE).digests
    (folder / "vitpose_h_wholebody_data.bin").write_bytes(b"Weights")
    assert changed(before, ResolvedRecipe(ModelStore(root), RECIPE).digests) == {"pose"}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_identities_name_every_component_and_change_with_its_bytes(root):
    before = ResolvedRecipe(ModelStore(root), RECIPE).digests
    assert set(before) == {
        "transformer",
        "vae",
        "text_encoder",
        "image_encoder",
        "tokenizer",
        "image_processor",
        "detector",
        "pose",
    }
    assert before["detector"] == hashlib.sha256((root / DETECTOR).read_bytes()).hexdigest()
    assert changed(before, ResolvedRecipe(ModelStore(root), RECIPE).digests) == set()

    file = weights(root) / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float32(1)
    save_file(tensors, file)
    config = weights(root) / "transformer/config.json"
    config.write_text(config.read_text().replace('"eps": 1e-06', '"eps": 1e-05'))
    assert changed(before, ResolvedRecipe(ModelStore(root), RECIPE).digests) == {"vae", "transformer"}


def test_identity_of_component_is_hash_of_its_sha256sum_listing(root):
    folder = weights(root) / "vae"
    listing = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {RECIPE.weights}/vae/{name}\n"
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    assert ResolvedRecipe(ModelStore(root), RECIPE).digests["vae"] == hashlib.sha256(listing.encode()).hexdigest()


def test_identities_leave_out_files_that_no_recipe_reads(root):
    before = ResolvedRecipe(ModelStore(root), RECIPE).digests
    (weights(root) / "transformer/.DS_Store").write_bytes(b"x")
    (weights(root) / "README.md").write_text("x")
    (weights(root) / "text_encoder/pytorch_model.bin").write_bytes(b"x")
    assert changed(before, ResolvedRecipe(ModelStore(root), RECIPE).digests) == set()


def test_wanted_of_recipe_selects_needed_files_of_remote_store(root):
    want = wanted(RECIPE)
    local = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    kept = {key for key in local if want(key)}
    elsewhere = root.parent / "synced"
    for key in kept:
        (elsewhere / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / key, elsewhere / key)
    resolve_recipe(ModelStore(elsewhere), RECIPE)  # enough
    assert f"{RECIPE.weights}/model_index.json" not in kept  # and no more
    for key in (
        f"{RECIPE.weights}/text_encoder/pytorch_model.bin",
        f"{RECIPE.weights}/transformer/.cache/x.json",
        f"{RECIPE.weights}/assets/teaser.mp4",
        "Wan2.2-Animate-14B-FP4/quantized_transformer.safetensors",
        "distill_lora/distill.safetensors",
        "loras/style.ckpt",
        "process_checkpoint/sam2/sam2_hiera_large.pt",
        "",
    ):
        assert not want(key), key
    for key in (
        f"{POSE}/end2end.onnx",
        f"{POSE}/onnx__MatMul_1",
        DETECTOR,
        "demo.json",  # the record names the demo's model
        "process_checkpoint/pose2d/vitpose_h_wholebody_data.bin",
        "loras/style.safetensors",  # a job of any recipe may name it
    ):
        assert want(key), key


def test_detector_note_is_given_for_demo_store_only(tmp_path):
    assert ModelStore(tmp_path).detector_note == ""
    (tmp_path / "demo.json").write_text("{}")
    assert "drawn dancers" in ModelStore(tmp_path).detector_note
