"""Verifying a store: every kind of damage is a row that names the file, and a sound store has none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.quantization.rules import WAN_ANIMATE_14B
from runner.spec.recipes import SOURCE_WEIGHTS
from runner.weights import hub
from runner.weights.digests import FileDigests
from runner.weights.repositories import FP4_FOLDER, SOURCES
from runner.weights.verify import Row, plan_rows, settle_against, verify_weights
from tests.quantization.random_stores import TINY, write_store
from tests.quantization.svdq_files import LAYOUTS, random_layer, write_svdq

DETECTOR = "process_checkpoint/det/yolov10m.onnx"
VAE = f"{SOURCE_WEIGHTS}/vae/diffusion_pytorch_model.safetensors"
QUANTISED = f"{FP4_FOLDER}/quantized_transformer.safetensors"
INT4_BYTES, NVFP4_BYTES = 9_634_563_304, 10_179_139_304  # the 14B model's file but for its header, at rank 32


@pytest.fixture
def models(demo_models: Path, tmp_path: Path) -> Path:
    """A copy of what the demo's store has for bf16, to be damaged."""
    root, others = tmp_path / "models", ("*-FP4*", "distill_lora", "sam2")
    shutil.copytree(demo_models, root, ignore=shutil.ignore_patterns(".*", "demo.json", *others))
    return root


@pytest.fixture
def fp4_models(tmp_path: Path) -> Path:
    """A store with a transformer in full precision alone, its linears in multiples of 32."""
    root = tmp_path / "models"
    write_store(root / SOURCE_WEIGHTS / "transformer", TINY, shard_bytes=300_000)
    return root


def by_path(rows: list[Row]) -> dict[str, Row]:
    assert len({row.path for row in rows}) == len(rows)
    return {row.path: row for row in rows}


def record(models: Path, name: str) -> None:
    """The hub's record of a file as it is now."""
    digest = hashlib.sha256((models / name).read_bytes()).hexdigest()
    hub.write_record(models, name, "0" * 40, digest)


def flip(path: Path, at: int) -> None:
    """One wrong bit; size and time stay."""
    stat = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at if at >= 0 else stat.st_size + at)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_of_sound_store_has_row_for_every_file(models: Path) -> None:
    seen: list[Row] = []
    rows = verify_weights(models, "bf16", on_row=seen.append)
    assert rows == seen
    assert {row.status for row in rows} <= {"ok", "unknown"}
    unused = {"model_index.json", "scheduler_config.json"}  # of diffusers' own loader
    there = {p.relative_to(models).as_posix() for p in models.rglob("*") if p.is_file() and p.name not in unused}
    assert set(by_path(rows)) == there
    row = by_path(rows)[DETECTOR]
    assert row.sha256 == hashlib.sha256((models / DETECTOR).read_bytes()).hexdigest()
    assert row.bytes == (models / DETECTOR).stat().st_size


def test_verify_examines_optional_models(models: Path) -> None:
    there = ("sam2/config.json", "sam2/model.safetensors", "sam2/model.pt", "dwpose/dw-ll_ucoco_384.onnx")
    for name in there:
        path = models / "process_checkpoint" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    rows = by_path(verify_weights(models, "bf16"))
    found = {name: rows[f"process_checkpoint/{name}"].status for name in there if not name.endswith(".pt")}
    assert found == {there[0]: "unknown", there[1]: "corrupt", there[3]: "unknown"}
    assert not any(name.endswith((".pt", "yolox_l.onnx")) for name in rows)  # never read; not there, and not missed


def test_verify_with_hub_record_is_ok_and_after_bit_flip_corrupt(models: Path) -> None:
    for name in (VAE, DETECTOR):
        record(models, name)
        assert by_path(verify_weights(models, "bf16"))[name].status == "ok"
        flip(models / name, -1)
        row = by_path(verify_weights(models, "bf16"))[name]
        assert (row.status, "hub listed" in row.note) == ("corrupt", True)


def test_verify_of_small_file_uses_git_id(models: Path) -> None:
    name = f"{SOURCE_WEIGHTS}/vae/config.json"
    body = (models / name).read_bytes()
    hub.write_record(models, name, "0" * 40, hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest())
    assert by_path(verify_weights(models, "bf16"))[name].status == "ok"
    (models / name).write_bytes(body + b"\n")
    assert by_path(verify_weights(models, "bf16"))[name].status == "corrupt"


def test_verify_with_cached_digest_finds_failing_disk(models: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    FileDigests().find([models / VAE], models, cache)
    assert by_path(verify_weights(models, "bf16", cache=cache))[VAE].status == "ok"
    flip(models / VAE, -1)
    row = by_path(verify_weights(models, "bf16", cache=cache))[VAE]
    assert (row.status, "disk" in row.note) == ("corrupt", True)
    os.utime(models / VAE)  # replaced, perhaps on purpose: nobody knows
    assert by_path(verify_weights(models, "bf16", cache=cache))[VAE].status == "unknown"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), ""),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), ""),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "LFS pointer"),
        (lambda p: p.write_bytes(b"<html>proxy login</html>" * 100), ""),
    ],
    ids=["empty", "truncated", "overlong", "pointer", "html"],
)
def test_verify_without_record_finds_damage(models: Path, damage: object, says: str) -> None:
    damage(models / VAE)  # type: ignore[operator]
    row = by_path(verify_weights(models, "bf16"))[VAE]
    assert row.status == "corrupt"
    assert says in row.note


def test_verify_with_missing_files_has_rows_for_them(models: Path) -> None:
    (models / VAE).unlink()
    (models / DETECTOR).unlink()
    rows = by_path(verify_weights(models, "bf16"))
    assert {path for path, row in rows.items() if row.status == "missing"} == {VAE, DETECTOR}
    assert "weights fetch" in rows[VAE].note


def test_verify_of_index_that_names_other_shard_is_corrupt(fp4_models: Path) -> None:
    index = next((fp4_models / SOURCE_WEIGHTS / "transformer").glob("*.index.json"))
    names = json.loads(index.read_text())
    first, second = sorted(set(names["weight_map"].values()))[:2]
    moved = next(tensor for tensor, shard in names["weight_map"].items() if shard == first)
    names["weight_map"][moved] = second
    index.write_text(json.dumps(names))
    row = by_path(verify_weights(fp4_models, "bf16"))[index.relative_to(fp4_models).as_posix()]
    assert (row.status, moved in row.note) == ("corrupt", True)
    index.write_text("{")
    assert by_path(verify_weights(fp4_models, "bf16"))[row.path].status == "corrupt"


def test_verify_of_pinned_file_uses_pin(models: Path) -> None:
    name = f"distill_lora/{next(iter(SOURCES['distill-lora'].pins))}"
    (models / name).parent.mkdir()
    save_file({"x": torch.zeros(4)}, models / name)
    record(models, name)  # whatever its record says
    row = by_path(verify_weights(models, "bf16"))[name]
    assert (row.status, "738005744" in row.note) == ("corrupt", True)


@pytest.fixture
def ours(fp4_models: Path) -> Path:
    """What `quantize` makes for fp4-distill."""
    from runner.quantization.files.checkpoint_write import quantize_store
    from runner.quantization.formats.e2m1 import G32

    out = fp4_models / f"{FP4_FOLDER}-distill" / "quantized_transformer.safetensors"
    quantize_store(fp4_models / SOURCE_WEIGHTS / "transformer", out, G32, "absmax", device="cpu")
    return out


def test_verify_of_quantised_file_uses_its_own_checksum(fp4_models: Path, ours: Path) -> None:
    name = ours.relative_to(fp4_models).as_posix()
    row = by_path(verify_weights(fp4_models, "fp4-distill"))[name]
    assert (row.status, row.note) == ("ok", "as recorded when it was made")
    assert not [r for r in verify_weights(fp4_models, "fp4-distill") if r.path.startswith("distill_lora")]
    flip(ours, -1)
    assert by_path(verify_weights(fp4_models, "fp4-distill"))[name].status == "corrupt"


def test_verify_of_quantised_file_with_other_config_is_corrupt(fp4_models: Path, ours: Path) -> None:
    config = ours.with_name("config.json")
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"ffn_dim": settings["ffn_dim"] * 2}))
    row = by_path(verify_weights(fp4_models, "fp4-distill"))[ours.relative_to(fp4_models).as_posix()]
    assert (row.status, "ffn" in row.note) == ("corrupt", True)


def test_verify_of_fp4_without_files_lists_missing_ones(fp4_models: Path) -> None:
    rows = by_path(verify_weights(fp4_models, "fp4-distill"))
    assert rows[QUANTISED].status == "missing"
    assert "quantize" in rows[QUANTISED].note
    assert rows[f"distill_lora/{next(iter(SOURCES['distill-lora'].pins))}"].status == "missing"
    assert not [path for path in rows if "transformer/diffusion" in path]  # fp4 needs no source
    assert not [path for path in by_path(verify_weights(fp4_models, "fp4")) if path.startswith("distill_lora")]


@pytest.mark.parametrize(("recipe", "lora_lacks"), [("fp4", False), ("fp4-distill", True)])
def test_verify_of_file_without_lora_serves_both_recipes(
    fp4_models: Path, recipe: str, lora_lacks: bool, ours: Path
) -> None:
    plain = fp4_models / f"{FP4_FOLDER}-plain" / ours.name
    ours.parent.rename(plain.parent)
    rows = by_path(verify_weights(fp4_models, recipe))
    assert rows[plain.relative_to(fp4_models).as_posix()].status == "ok"
    assert QUANTISED not in rows
    assert any(row.status == "missing" and path.startswith("distill_lora") for path, row in rows.items()) is lora_lacks


def test_verify_with_int4_text_encoder_needs_no_plain_one(fp4_models: Path, ours: Path) -> None:
    ours.with_name("quantized_text_encoder.safetensors").write_bytes(ours.read_bytes())
    shutil.rmtree(fp4_models / SOURCE_WEIGHTS / "text_encoder", ignore_errors=True)
    assert not [path for path in by_path(verify_weights(fp4_models, "fp4-distill")) if "text_encoder/" in path]
    assert [path for path in by_path(verify_weights(fp4_models, "bf16")) if "text_encoder/" in path]


@pytest.fixture
def published(fp4_models: Path) -> Path:
    """A file in the published manner, which no `quantize` of ours made: high nibble first, scales in fp16."""
    from runner.quantization.rules import linear_shapes, transformer_on_meta

    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    source: dict[str, torch.Tensor] = {}
    for shard in (fp4_models / SOURCE_WEIGHTS / "transformer").glob("*.safetensors"):
        source |= load_file(shard)
    tensors = dict(source)
    for layer in linear_shapes(transformer_on_meta(TINY)):
        weight = tensors.pop(f"{layer}.weight").float()
        groups = weight.reshape(weight.shape[0], -1, 32)
        scale = (groups.abs().amax(2) / 6).clamp(min=1e-4).half()
        levels = groups / scale.float()[..., None]
        codes = (levels.abs()[..., None] - grid).abs().argmin(-1) + 8 * (levels < 0)
        codes = codes.reshape(weight.shape).to(torch.uint8)
        tensors[f"{layer}.weight_packed"] = (codes[:, 0::2] << 4) | codes[:, 1::2]
        tensors[f"{layer}.weight_scale"] = scale
    path = fp4_models / QUANTISED
    path.parent.mkdir()
    save_file(tensors, path)
    return path


def test_verify_of_published_file_checks_shapes_of_model(fp4_models: Path, published: Path) -> None:
    assert by_path(verify_weights(fp4_models, "fp4"))[QUANTISED].status == "unknown"
    record(fp4_models, QUANTISED)
    assert by_path(verify_weights(fp4_models, "fp4"))[QUANTISED].status == "ok"
    with safe_open(published, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith("weight_scale"))
    save_file(tensors | {name: tensors[name][:, :1].contiguous()[:-1]}, published)
    record(fp4_models, QUANTISED)
    row = by_path(verify_weights(fp4_models, "fp4"))[QUANTISED]
    assert (row.status, name.removesuffix(".weight_scale") in row.note) == ("corrupt", True)


def test_settle_against_source_finds_reading_of_file(fp4_models: Path, published: Path, tmp_path: Path) -> None:
    settled = settle_against(fp4_models, fp4_models)
    assert settled.assume is not None
    assert "nibble=high" in settled.assume
    assert settled.comparisons[0].error < 0.2
    one_shard = tmp_path / "one"
    one_shard.mkdir()
    shard = max((fp4_models / SOURCE_WEIGHTS / "transformer").glob("*.safetensors"))
    shutil.copy(shard, one_shard)
    assert settle_against(fp4_models, one_shard).assume == settled.assume
    with pytest.raises(WeightsMissing, match=r"no weights of blocks\.9"):
        settle_against(fp4_models, fp4_models, layer="blocks.9.attn1.to_q")


def test_settle_against_other_weights_finds_no_reading(fp4_models: Path, published: Path, tmp_path: Path) -> None:
    other = {name: torch.randn(t.shape) for name, t in load_shards(fp4_models).items()}
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    settled = settle_against(fp4_models, tmp_path / "other")
    assert settled.assume is None
    assert settled.comparisons[0].error > 0.5
    name = f"{settled.layer}.weight"
    save_file({name: other[name][1:].contiguous()}, tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsCorrupt, match="the source has"):
        settle_against(fp4_models, tmp_path / "other")


def load_shards(models: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in (models / SOURCE_WEIGHTS / "transformer").glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


# Files in an SVDQ format

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])


def svdq_name(layout, folder="distill") -> str:
    return f"Wan2.2-Animate-14B-{layout.name.upper()}-{folder}/quantized_transformer.safetensors"


@every_layout
def test_verify_of_svdq_file_checks_checksum_and_model(fp4_models: Path, layout) -> None:
    recipe, name = f"fp4-distill+{layout.name}", svdq_name(layout)
    path = write_svdq(fp4_models / name, TINY, layout)
    rows = by_path(verify_weights(fp4_models, recipe))
    assert (rows[name].status, rows[name].note) == ("ok", "as recorded when it was made")
    assert rows[name.replace("quantized_transformer.safetensors", "config.json")].status == "unknown"
    assert not [row for row in rows if row.startswith(("distill_lora", FP4_FOLDER)) or "transformer/diffusion" in row]
    assert name not in by_path(verify_weights(fp4_models, "fp4-distill"))
    flip(path, -1)
    assert by_path(verify_weights(fp4_models, recipe))[name].status == "corrupt"
    write_svdq(path, TINY, layout)
    config = path.with_name("config.json")
    config.write_text(json.dumps(dict(TINY) | {"ffn_dim": 512}))
    row = by_path(verify_weights(fp4_models, recipe))[name]
    assert (row.status, "ffn" in row.note and "padded" not in row.note) == ("corrupt", True)


@every_layout
def test_verify_of_svdq_recipe_without_file_names_command(fp4_models: Path, layout) -> None:
    rows = by_path(verify_weights(fp4_models, f"fp4-distill+{layout.name}"))
    row = rows[svdq_name(layout)]
    assert row.status == "missing"
    assert row.note == f"not published; make it: video-lab quantize --recipe fp4-distill --format {layout.name}"
    assert rows[f"distill_lora/{next(iter(SOURCES['distill-lora'].pins))}"].status == "missing"
    assert QUANTISED not in rows
    assert rows[f"{SOURCE_WEIGHTS}/transformer/config.json"].status != "missing"
    assert not [path for path in rows if "transformer/diffusion" in path]  # the source is no part of the recipe
    write_svdq(fp4_models / svdq_name(layout, "plain"), TINY, layout)
    rows = by_path(verify_weights(fp4_models, f"fp4-distill+{layout.name}"))
    assert rows[svdq_name(layout, "plain")].status == "ok"
    assert svdq_name(layout) not in rows
    assert any(row.status == "missing" and path.startswith("distill_lora") for path, row in rows.items())
    assert not [p for p in by_path(verify_weights(fp4_models, f"fp4+{layout.name}")) if p.startswith("distill_lora")]


@every_layout
def test_verify_of_damaged_or_foreign_svdq_file_has_reason(fp4_models: Path, layout) -> None:
    name, recipe = svdq_name(layout), f"fp4-distill+{layout.name}"
    path = fp4_models / name

    def note() -> str:
        row = by_path(verify_weights(fp4_models, recipe))[name]
        assert row.status == "corrupt"
        return row.note

    write_svdq(path, TINY, layout, rank="32")
    assert "factors of rank 16, and video_lab.rank says 32" in note()
    other = next(one for one in LAYOUTS if one is not layout)
    write_svdq(path, TINY, other)
    assert note() == f"its weights are stored in {other.name}; {path.parent.name}/ is for {layout.name}"
    parts = {f"a.{key}": tensor for key, tensor in random_layer(layout, 8, 8, torch.Generator()).items()}
    save_file(parts, path, metadata={"cache_dit_svdq_ptq": "{}"})
    assert "a checkpoint of cache-dit, not a file of `quantize`" in note()
    save_file({"a.weight_packed": torch.zeros(4, 4, dtype=torch.uint8)}, path)  # as in the folder of published files
    assert "video_lab.format in its metadata is missing" in note()


def test_verify_of_svdq_file_in_fp4_folder_is_refused(fp4_models: Path) -> None:
    name = f"{FP4_FOLDER}-distill/quantized_transformer.safetensors"
    write_svdq(fp4_models / name, TINY, LAYOUTS[0])
    row = by_path(verify_weights(fp4_models, "fp4-distill"))[name]
    assert row.note == f"its weights are stored in svdq-int4; {FP4_FOLDER}-distill/ is for g32 or nvfp4"
    parts = {f"a.{key}": tensor for key, tensor in random_layer(LAYOUTS[0], 8, 8, torch.Generator()).items()}
    (fp4_models / QUANTISED).parent.mkdir()
    save_file(parts, fp4_models / QUANTISED)
    row = by_path(verify_weights(fp4_models, "fp4"))[QUANTISED]
    assert (row.status, "a file in Nunchaku Lite's layout" in row.note) == ("corrupt", True)


def test_verify_of_svdq_recipe_examines_text_encoder_of_fp4_folder(fp4_models: Path, ours: Path) -> None:
    text = ours.with_name("quantized_text_encoder.safetensors")
    text.write_bytes(ours.read_bytes())
    write_svdq(fp4_models / svdq_name(LAYOUTS[0]), TINY, LAYOUTS[0])
    rows = by_path(verify_weights(fp4_models, f"fp4-distill+{LAYOUTS[0].name}"))
    assert rows[text.relative_to(fp4_models).as_posix()].status == "ok"
    assert ours.relative_to(fp4_models).as_posix() not in rows


@every_layout
def test_plan_rows_of_14b_model_in_svdq_format_have_expected_sizes(tmp_path: Path, layout) -> None:
    folder = tmp_path / f"Wan2.2-Animate-14B-{layout.name.upper()}-plain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(WAN_ANIMATE_14B)))  # the only config in the store
    sizes = [{row.name: row for row in plan_rows(tmp_path, fmt=layout.name, rank=rank)} for rank in (None, 32, 128)]
    assert sizes[0] == sizes[1]
    assert len([row for row in sizes[0].values() if row.packed_bytes]) == 520
    assert not sizes[0]["proj_out"].packed_bytes
    total = sum(row.packed_bytes + row.other_bytes for row in sizes[0].values())
    assert total == {"svdq-int4": INT4_BYTES, "svdq-nvfp4": NVFP4_BYTES}[layout.name]
    more = sizes[2]["blocks.0.attn1.to_q"].packed_bytes - sizes[0]["blocks.0.attn1.to_q"].packed_bytes
    assert more == 96 * 2 * 5120 * 2


def test_plan_rows_with_invalid_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"nvfp4 has no rank.*svdq-int4 and svdq-nvfp4"):
        plan_rows(tmp_path, fmt="nvfp4", rank=32)
    with pytest.raises(ConfigInvalid, match="a rank of 20: multiples of 16"):
        plan_rows(tmp_path, fmt="svdq-int4", rank=20)


@pytest.mark.parametrize("fmt", ["g32", "nvfp4"])
def test_plan_rows_of_14b_model_have_expected_sizes(tmp_path: Path, fmt: str) -> None:
    folder = tmp_path / SOURCE_WEIGHTS / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(WAN_ANIMATE_14B)))
    rows = plan_rows(tmp_path, fmt=fmt)
    packed = [row for row in rows if row.packed_bytes]
    assert len(packed) == 521
    assert 9.6e9 < sum(row.packed_bytes + row.other_bytes for row in rows) < 9.9e9
    assert next(row.shape for row in rows if row.name == "blocks.0.ffn.net.0.proj") == (13824, 5120)


def test_verify_and_plan_rows_with_invalid_request_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="no such folder"):
        verify_weights(tmp_path / "none", "bf16")
    with pytest.raises(ConfigInvalid):
        verify_weights(tmp_path, "bf61")
    with pytest.raises(WeightsMissing, match=r"config\.json"):
        plan_rows(tmp_path)
    (tmp_path / SOURCE_WEIGHTS / "transformer").mkdir(parents=True)
    (tmp_path / SOURCE_WEIGHTS / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ConfigInvalid, match="no format"):
        plan_rows(tmp_path, fmt="int4")
