"""Published files: written here in several writers' styles, by code of its own, and read back to the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.quantization.files.published import compare_layer, load_published, read_published, settle
from runner.quantization.files.read_options import ReadOptions, options_from_config, parse_read_options
from runner.quantization.formats.e2m1 import dequantize
from runner.quantization.rules import linear_shapes, transformer_on_meta
from tests.quantization.random_stores import TINY, inputs, random_weights
from tests.safetensors_headers import redeclare

NAME = "quantized_transformer.safetensors"
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SIGN_LAST = [*MAGNITUDES, *(-m for m in MAGNITUDES)]
RISING = [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, *MAGNITUDES]
MIXED = [v / 6 for v in (0.0, 6.0, 0.5, 4.0, 1.0, 3.0, 1.5, 2.0, -0.0, -6.0, -0.5, -4.0, -1.0, -3.0, -1.5, -2.0)]
SQUARE_MOTION = [f"motion_encoder.motion_network.{i}" for i in range(4)]  # what makes 521 layers 525
LAYER = "blocks.1.ffn.net.2"  # [64, 128]


@dataclass(frozen=True)
class Style:
    """How a writer of such files might have done it."""

    packed: str = ".weight_packed"
    scale: str = ".weight_scale"
    prefix: str = ""
    values: list[float] = field(default_factory=lambda: SIGN_LAST)
    high_first: bool = False
    divide: bool = False
    group: int = 32
    six: bool = False
    shape: Callable[[torch.Tensor, int], torch.Tensor] = lambda packed, group: packed
    scale_shape: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale
    scale_dtype: torch.dtype = torch.float16
    code_dtype: torch.dtype = torch.uint8
    rest: torch.dtype = torch.float32
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors
    config: dict[str, Any] | None = None
    assume: str = ""
    assumed: tuple[str, ...] = ("nibble", "codes", "scale", "unit")


def quantise(weight: torch.Tensor, style: Style) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(packed, scale, what they stand for): nearest of sixteen values, scales that are exact in 8 bits of mantissa."""
    out, wide = weight.shape
    groups = weight.view(out, -1, style.group)
    peak = groups.abs().amax(-1) / 6
    step = torch.exp2(torch.log2(peak).ceil()) if style.scale_dtype == torch.float8_e8m0fnu else peak.bfloat16().float()
    if style.divide or style.six:
        step = torch.exp2(torch.log2(peak).ceil())  # so that a reciprocal or a sixth is exact too
    values = torch.tensor(style.values)
    unit = values.abs().max() / 6
    codes = (groups.unsqueeze(-1) / step[..., None, None] - values / unit).abs().argmin(-1).view(out, wide)
    stands_for = (values / unit)[codes].view_as(groups) * step.unsqueeze(-1)
    first, second = codes[:, 0::2], codes[:, 1::2]
    packed = (first << 4 | second) if style.high_first else (second << 4 | first)
    stored = step / unit  # a code is worth its value in the table
    if style.six:
        stored = stored * 6
    if style.divide:
        stored = 1 / stored
    return packed.to(torch.uint8), stored, stands_for.view(out, wide)


def publish(folder: Path, style: Style, layers: Collection[str] | None = None) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file, every parameter as it should be after reading). `layers`: what is quantised, by default as many as 525."""
    weights = random_weights(TINY)
    quantised = {*linear_shapes(transformer_on_meta(TINY)), *SQUARE_MOTION} if layers is None else layers
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if layer in quantised and layer != name:
            group = style.group if tensor.shape[1] % style.group == 0 else 32
            at_group = Style(**{**style.__dict__, "group": group})
            packed, scale, expected[name] = quantise(tensor, at_group)
            tensors[layer + style.packed] = style.shape(packed, group).view(style.code_dtype)
            tensors[layer + style.scale] = style.scale_shape(scale).to(style.scale_dtype)
        else:
            tensors[name] = expected[name] = tensor.to(style.rest)
    tensors = {style.prefix + name: t.contiguous().clone() for name, t in style.rename(tensors).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / NAME)
    if style.config is not None:
        (folder / "quantize_config.json").write_text(json.dumps(style.config))
    return folder / NAME, expected


def originally(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The library's names → the original Wan's, keys and values of the face adapters in one."""
    table = [
        (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"^(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
        (r"^(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
        (r"^(blocks\.\d+)\.attn1", r"\1.self_attn"),
        (r"^(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
        (r"^(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
        (r"^(blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
        (r"^(blocks\.\d+)\.attn2\.norm_added_k", r"\1.cross_attn.norm_k_img"),
        (r"^(blocks\.\d+)\.attn2", r"\1.cross_attn"),
        (r"^(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
        (r"^(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
        (r"^(blocks\.\d+)\.norm2", r"\1.norm3"),
        (r"^(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
        (r"^face_adapter\.(\d+)\.to_q", r"face_adapter.fuser_blocks.\1.linear1_q"),
        (r"^face_adapter\.(\d+)\.to_out", r"face_adapter.fuser_blocks.\1.linear2"),
        (r"^face_adapter\.(\d+)\.norm_([qk])", r"face_adapter.fuser_blocks.\1.\2_norm"),
        (r"^face_encoder\.(conv\d(_local)?)", r"face_encoder.\1.conv"),
        (r"^motion_encoder\.motion_synthesis_weight", "motion_encoder.dec.direction.weight"),
        (r"^motion_encoder\.motion_network", "motion_encoder.enc.fc"),
        (r"^motion_encoder\.conv_in\.weight", "motion_encoder.enc.net_app.convs.0.0.weight"),
        (r"^motion_encoder\.conv_in\.act_fn\.bias", "motion_encoder.enc.net_app.convs.0.1.bias"),
        (r"^motion_encoder\.conv_out\.weight", "motion_encoder.enc.net_app.convs.8.weight"),
    ]
    for block in range(7):
        ours, theirs = rf"^motion_encoder\.res_blocks\.{block}", f"motion_encoder.enc.net_app.convs.{block + 1}"
        table += [
            (rf"{ours}\.conv1\.weight", f"{theirs}.conv1.0.weight"),
            (rf"{ours}\.conv1\.act_fn\.bias", f"{theirs}.conv1.1.bias"),
            (rf"{ours}\.conv2\.weight", f"{theirs}.conv2.1.weight"),
            (rf"{ours}\.conv2\.act_fn\.bias", f"{theirs}.conv2.2.bias"),
            (rf"{ours}\.conv_skip\.weight", f"{theirs}.skip.1.weight"),
        ]
    renamed: dict[str, torch.Tensor] = {}
    for ours, tensor in tensors.items():
        theirs, value = ours, tensor
        if re.match(r"face_adapter\.\d+\.to_v\.", ours):
            continue  # goes with its keys
        if re.match(r"face_adapter\.\d+\.to_k\.", ours):
            value = torch.cat([tensor, tensors[ours.replace(".to_k.", ".to_v.")]])
            theirs = re.sub(r"^face_adapter\.(\d+)\.to_k", r"face_adapter.fuser_blocks.\1.linear1_kv", ours)
        for pattern, replacement in table:
            theirs, hits = re.subn(pattern, replacement, theirs)
            if hits:
                break
        if theirs.startswith("motion_encoder.enc.net_app") and theirs.endswith(".bias"):
            value = value.view(1, -1, 1, 1)
        assert theirs not in renamed
        renamed[theirs] = value
    return renamed


STYLES = {
    "plain": Style(),
    "flat int8, prefix, high nibble by config": Style(
        packed=".qweight",
        scale=".scales",
        prefix="transformer.",
        shape=lambda packed, group: packed.reshape(-1),
        scale_shape=lambda scale: scale.reshape(-1),
        scale_dtype=torch.float32,
        code_dtype=torch.int8,
        high_first=True,
        config={"quant_method": "fp4", "group_size": 32, "packing": {"nibble_order": "high_first"}},
        assumed=("codes", "scale", "unit"),
    ),
    "rows of groups, absmax over six, by --assume": Style(
        packed=".weight",
        scale=".weight.absmax",
        prefix="model.transformer.",
        shape=lambda packed, group: packed.reshape(-1, group // 2),
        scale_shape=lambda scale: scale.reshape(-1, 1),
        scale_dtype=torch.bfloat16,
        six=True,
        rest=torch.bfloat16,
        assume="unit=six",
        assumed=("nibble", "codes", "scale"),
    ),
    "rising codes, scale divides, all by --assume": Style(
        packed="_packed",
        scale="_scale",
        values=RISING,
        divide=True,
        shape=lambda packed, group: packed.reshape(packed.shape[0], -1, group // 2),
        assume="codes=ascending,scale=divide,nibble=low,unit=one",
        assumed=(),
    ),
    "a table in the config, to one": Style(
        values=MIXED,
        scale_dtype=torch.float32,
        config={"codebook": MIXED, "scale_mode": "multiply", "packing_order": "low"},
        assumed=("unit",),
    ),
    "powers of two, groups of 64": Style(group=64, scale_dtype=torch.float8_e8m0fnu),
    "the original's names": Style(prefix="model.diffusion_model.", rename=originally, rest=torch.float16),
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_published_file_in_any_style_gives_expected_weights(tmp_path, style):
    file, expected = publish(tmp_path, style)
    model = transformer_on_meta(TINY)
    linears = set(linear_shapes(model))
    loaded = load_published(model, file, dtype=torch.float32, given=parse_read_options(style.assume))
    assert set(loaded.layers) == linears and set(loaded.dequantised) == set(SQUARE_MOTION)
    assert set(loaded.assumed) == set(style.assumed)
    state = dict(model.named_parameters())
    for name, wanted in expected.items():
        layer = name.removesuffix(".weight")
        if layer in linears and layer != name:
            module = model.get_submodule(layer)
            # A table of sixths has scales that are sixths, which bfloat16 rounds; all others are exact.
            close = 2**-8 if style.values is MIXED else 0
            torch.testing.assert_close(dequantize(module.stored, module.fmt), wanted, rtol=close, atol=0)
        elif layer in SQUARE_MOTION and layer != name:
            torch.testing.assert_close(state[name], wanted, rtol=2**-8 if style.values is MIXED else 0, atol=0)
        else:
            assert torch.equal(state[name], wanted.float()), name
    assert loaded.scale_rounding <= (2**-8 if style.values is MIXED else 0)
    assert not any(p.is_meta for p in model.parameters())


def test_load_published_dequantises_motion_encoder_and_keeps_proj_out(tmp_path):
    """The file quantises every matrix but the last projection, including all five of the motion encoder."""
    linears = [name for name in linear_shapes(transformer_on_meta(TINY)) if name != "proj_out"]
    motion = [f"motion_encoder.motion_network.{i}" for i in range(5)]
    file, expected = publish(tmp_path, Style(), {*linears, *motion})
    model = transformer_on_meta(TINY)
    loaded = load_published(model, file, dtype=torch.float32)
    assert (set(loaded.layers), set(loaded.dequantised)) == (set(linears), set(motion))
    assert type(model.proj_out) is torch.nn.Linear
    held = dict(model.named_parameters())
    assert all(torch.equal(held[f"{name}.weight"], expected[f"{name}.weight"]) for name in (*motion, "proj_out"))
    model(**inputs())


def test_published_model_in_bf16_agrees_with_float32(tmp_path):
    file, _ = publish(tmp_path, STYLES["plain"])
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = transformer_on_meta(TINY)
        load_published(model, file, dtype=dtype)
        assert model.motion_encoder.motion_network[0].weight.dtype == dtype
        assert model.blocks[0].norm2.weight.dtype == torch.float32
        with torch.no_grad():
            results.append(model(**inputs(dtype))[0].float())
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


def test_scale_rounding_of_fp16_scales_is_measured(tmp_path):
    """fp16 scales that need all of their eleven bits: the loss is reported."""
    file, _ = publish(tmp_path, Style())
    tensors = load_file(file)
    exact = tensors[f"{LAYER}.weight_scale"].float() * (1 + 3 / 1024)
    tensors[f"{LAYER}.weight_scale"] = exact.half()
    save_file(tensors, file)
    loaded = load_published(transformer_on_meta(TINY), file)
    stored = tensors[f"{LAYER}.weight_scale"].float()
    assert loaded.scale_rounding == pytest.approx(float(((stored.bfloat16().float() - stored) / stored).abs().max()))
    assert 1e-3 < loaded.scale_rounding <= 2**-8


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_settle_with_source_weights_finds_options(tmp_path, style):
    file, _ = publish(tmp_path, style)
    published = read_published(file, transformer_on_meta(TINY))
    comparisons = compare_layer(published, LAYER, random_weights(TINY)[f"{LAYER}.weight"])
    errors = [c.error for c in comparisons]
    assert errors == sorted(errors) and 0.05 < errors[0] < 0.16  # scales that are powers of two are coarser
    right = settle(comparisons)
    assert right is not None
    wanted = {
        "nibble": "high" if style.high_first else "low",
        "scale": "divide" if style.divide else "multiply",
        "unit": "six" if style.six else "one",
        "codes": "table" if style.values is MIXED else "ascending" if style.values is RISING else "e2m1",
    }
    assert right.words() == wanted
    assert min(c.error for c in comparisons if c.options != right) > 0.5


def test_settle_with_other_weights_is_none(tmp_path):
    file, _ = publish(tmp_path, Style())
    published = read_published(file, transformer_on_meta(TINY))
    weights = random_weights(TINY, seed=1)
    assert settle(compare_layer(published, LAYER, weights[f"{LAYER}.weight"])) is None
    with pytest.raises(WeightsCorrupt, match=LAYER):
        compare_layer(published, LAYER, weights["proj_out.weight"])


# What does not add up.


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


PACKED, SCALE = f"{LAYER}.weight_packed", f"{LAYER}.weight_scale"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(SCALE), f"{LAYER}.*no scales that add up"),
        (lambda t: t.pop(PACKED), f"{LAYER}.*no codes that add up"),
        (lambda t: (t.pop(SCALE), t.pop(PACKED)), f"no tensor for {LAYER}.weight"),
        (put("blocks.0.ffn.net.0.proj.weight_packed", lambda p: p.t().contiguous()), "no codes"),  # another order
        (put(PACKED, lambda p: p[:, :-1].clone()), "no codes"),
        (put(PACKED, lambda p: p.int()), "no codes"),
        (put(SCALE, lambda s: s.t().contiguous()), "no scales"),
        (put(SCALE, lambda s: s.repeat_interleave(2, 1)), "no scales"),  # groups of 16: another format
        (put(SCALE, lambda s: s.double()), "no scales"),
        (lambda t: t.update({f"{LAYER}.weight_scale_2": torch.ones(())}), "weight_scale_2 .* no known layer"),
        (lambda t: t.update({f"{LAYER}.zero_point": torch.zeros(64, 4, dtype=torch.uint8)}), "zero_point"),
        (lambda t: t.update(unheard_of=torch.zeros(100)), "unheard_of"),
        (lambda t: t.update({f"{LAYER}.qweight": t[PACKED].clone()}), "no codes"),  # which of the two?
        (lambda t: t.pop("blocks.0.norm2.weight"), r"no tensor for blocks\.0\.norm2\.weight"),
        (put("blocks.0.norm2.weight", lambda w: w[:-1].clone()), r"blocks\.0\.norm2\.weight is \[63\]"),
        (lambda t: t.update({"transformer.proj_out.bias": t["proj_out.bias"].clone()}), "are both proj_out.bias"),
    ],
)
def test_inconsistent_published_file_is_refused(tmp_path, change, says):
    file, _ = publish(tmp_path, Style())
    rewrite(file, change)
    with pytest.raises(WeightsCorrupt, match=says):
        read_published(file, transformer_on_meta(TINY))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_load_published_with_broken_scales_is_refused_before_model_changes(tmp_path, value):
    file, _ = publish(tmp_path, Style())
    rewrite(file, lambda t: t[SCALE].view(-1)[3:4].fill_(value))
    model = transformer_on_meta(TINY)
    with pytest.raises(WeightsCorrupt, match=SCALE):
        load_published(model, file)
    assert all(p.is_meta for p in model.parameters())


def test_read_published_with_wrong_config_or_missing_file_is_refused(tmp_path):
    file, _ = publish(tmp_path, Style(config={"group_size": 64}))
    with pytest.raises(WeightsCorrupt, match="says 64"):
        read_published(file, transformer_on_meta(TINY))
    file.with_name("quantize_config.json").write_text("[]")
    with pytest.raises(WeightsCorrupt, match="JSON object"):
        read_published(file, transformer_on_meta(TINY))
    with pytest.raises(WeightsMissing):
        read_published(tmp_path / "none.safetensors", transformer_on_meta(TINY))


def test_published_file_with_floats_declared_as_integers_is_refused(tmp_path):
    """The name, shape and width of a norm still fit; its values would be the integers of the same bits."""
    file, _ = publish(tmp_path, Style())
    said = read_published(file, transformer_on_meta(TINY)).plain["blocks.0.norm2.weight"].dtype
    redeclare(file, "blocks.0.norm2.weight", "I32" if said.itemsize == 4 else "I16")
    with pytest.raises(WeightsCorrupt, match=r"blocks\.0\.norm2\.weight is torch\.int\d\d, not torch\.float16 or"):
        read_published(file, transformer_on_meta(TINY))


def test_small_unknown_tensors_are_listed_as_ignored(tmp_path):
    file, _ = publish(tmp_path, Style())
    rewrite(file, lambda t: t.update({f"{LAYER}.shape": torch.tensor([64, 128])}))
    assert load_published(transformer_on_meta(TINY), file).ignored == (f"{LAYER}.shape",)


def test_lookup_table_stored_with_weights_is_read(tmp_path):
    file, expected = publish(tmp_path, Style(values=RISING))
    rewrite(file, lambda t: t.update({"fp4_codebook": torch.tensor(RISING)}))
    model = transformer_on_meta(TINY)
    loaded = load_published(model, file)
    assert loaded.options.codes == "table" and "codes" not in loaded.assumed
    layer = model.get_submodule(LAYER)
    assert torch.equal(dequantize(layer.stored, layer.fmt), expected[f"{LAYER}.weight"])


def test_options_from_config_and_parse_read_options_accept_known_words():
    assert options_from_config({}) == (ReadOptions(), ["nibble", "codes", "scale", "unit"])
    said = {"quantization": {"low_nibble_first": False, "scale_mode": "Divide", "scale_kind": "absmax"}}
    how, assumed = options_from_config(said, {"scale": "multiply"})
    assert (how.words(), assumed) == (
        {"nibble": "high", "codes": "e2m1", "scale": "multiply", "unit": "six"},
        ["codes"],
    )
    assert options_from_config({"packing": "none", "scale_unit": "none"})[1] == ["nibble", "codes", "scale", "unit"]
    assert options_from_config({"lut": MAGNITUDES})[0].translation()[0] is None  # eight magnitudes: ours, spelt out
    with pytest.raises(WeightsCorrupt, match="E2M1"):
        options_from_config({"lut": [i / 15 for i in range(16)]})
    assert parse_read_options("nibble=high, scale=divide") == {"nibble": "high", "scale": "divide"}
    for wrong in ("nibble", "nibble=left", "order=high"):
        with pytest.raises(ConfigInvalid, match="Known are"):
            parse_read_options(wrong)
    with pytest.raises(ConfigInvalid, match="no table"):
        ReadOptions(codes="table").translation()
