"""Forecasts against closed forms, published sizes and counted tensors; what `auto` decides; modes on the tiny model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel

from runner.errors import ConfigInvalid
from runner.forecast.bytes import BLOCK_UNITS, VAE_DECODE, VAE_ENCODE, VAE_TILE, step_bytes, vae_bytes, weights_of
from runner.forecast.flops import PRODUCTION
from runner.generation.runtime.memory_plan import (
    PREPROCESS_EXTRA,
    Load,
    Window,
    choose_plan,
    forecast_memory,
    make_plan,
    next_lower_mode,
)
from runner.generation.wan_animate import low_memory, transformer
from runner.generation.wan_animate.autoencoder import FramewiseVae, with_channels_last
from runner.generation.wan_animate.transformer import CrossAttended, KeyValue, Rope
from runner.quantization.formats.e2m1 import G32
from runner.quantization.rules import WAN_ANIMATE_14B, plan_sizes
from runner.spec.recipes import MODES, get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore
from tests.generation.live_bytes import LiveBytes

RECIPE = get_recipe("fp4-distill")
SIZE, HD = (480, 832, 81), (1280, 720, 81)
GB, GIB = 10**9, 2**30
SHAPE = PRODUCTION.transformer
TOKENS, WIDTH = 34_320, 5_120


@pytest.fixture(scope="module")
def fourteen_billion():
    with torch.device("meta"):
        model = WanAnimateTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120, num_layers=5)
    return model.to(torch.bfloat16)


def forecast(mode, size=SIZE, **settings):
    return forecast_memory(make_plan(mode, RECIPE), RECIPE, PRODUCTION, *size, **settings)


def test_memory_table_in_docs_equals_forecast():
    """Sizes are in GB, from 10 GB without a decimal. `resident` has its smallest and its largest plan."""
    text = (Path(__file__).resolve().parents[3] / "docs/memory.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(resident|stream|minimal)` \|.*\| ([\d. to]+) GB \| ([\d. to]+) GB \|$", text, re.MULTILINE
    )
    assert [mode for mode, *_ in rows] == ["resident", "stream", "minimal"]
    full = make_plan("resident", RECIPE)
    plans = {mode: [make_plan(mode, RECIPE)] for mode in ("stream", "minimal")}
    plans["resident"] = [replace(full, encoders="host", preprocess="host"), full]
    for mode, *said in rows:
        for size, words in zip(((832, 480), (1280, 720)), said, strict=True):
            found = [forecast_memory(plan, RECIPE, PRODUCTION, *size, 81).peak / 1e9 for plan in plans[mode]]
            assert words == " to ".join(f"{gb:.1f}" if gb < 9.95 else f"{gb:.0f}" for gb in found), (mode, size)


@pytest.mark.parametrize("mode", ["resident", "stream", "minimal"])
def test_forecast_with_interpolation_has_separate_stage(mode):
    plain, interpolating = forecast(mode), forecast(mode, interpolates=True)
    assert interpolating.stages.keys() - plain.stages.keys() == {"interpolate"}
    weights = interpolating.parts["interpolation_weights"]
    assert weights == 4 * 5_664_776
    for stage, size in plain.stages.items():
        assert size < interpolating.stages[stage] < size + 1.1 * weights
    assert interpolating.stages["interpolate"] < plain.peak


def test_weights_of_14b_model_equal_published_sizes():
    packed, plain = weights_of(SHAPE, fp4=True), weights_of(SHAPE, fp4=False)
    assert packed.total == pytest.approx(9.78e9, rel=0.001)
    assert plain.total / 2 == pytest.approx(17_274_816_884, rel=0.002)
    rows = plan_sizes(WAN_ANIMATE_14B, G32)
    counted = {
        part: sum(row.packed_bytes + row.other_bytes for row in rows if row.name.startswith(part))
        for part in ("blocks.7.", "face_adapter.3.", "")
    }
    assert packed.block == counted["blocks.7."]
    assert packed.adapter == counted["face_adapter.3."]
    assert packed.total == pytest.approx(counted[""], rel=0.0005)


def test_weights_of_tiny_model_equal_its_parameters(tiny_store_dir):
    store, recipe = ModelStore(tiny_store_dir), get_recipe("fp32")
    model = WanAnimateTransformer3DModel.from_config(ResolvedRecipe(store, recipe).config("transformer"))
    found = weights_of(ResolvedRecipe(store, recipe).costs.transformer, fp4=False, element=4)
    for name, wanted in (("blocks", found.blocks * found.block), ("face_adapter", found.adapters * found.adapter)):
        assert sum(p.nbytes for p in model.get_submodule(name).parameters()) == wanted
    assert found.total == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.05)


@pytest.mark.parametrize("kind", ["whole", "chunked"])
def test_block_peak_forecast_equals_counted_tensors(fourteen_billion, monkeypatch, kind):
    """Tensors are counted on the meta device; the scratch memory inside attention's kernel is left out."""

    def attend(_attn, query, read):
        if read.key.shape[1] == TOKENS:  # else the result comes in their order, and is copied
            assert all(x.is_contiguous() for x in (query, *read))
        return query.new_empty(*query.shape[:2], WIDTH)

    monkeypatch.setattr(transformer, "attend", attend)
    monkeypatch.setattr(low_memory, "attend", attend)

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    read = KeyValue(empty(1, 512, 40, 128), empty(1, 512, 40, 128))
    rope = Rope(*(empty(1, TOKENS, 1, 64, dtype=torch.float32) for _ in range(2)))
    modulation, block = empty(1, 6, WIDTH), fourteen_billion.blocks[0]
    faces = KeyValue(empty(22, 5, 40, 128), empty(22, 5, 40, 128))
    run, look = {
        "whole": (transformer.run_block, transformer.run_face),
        "chunked": (low_memory.chunked_block, low_memory.chunked_face),
    }[kind]
    unit = TOKENS * WIDTH * 2
    with torch.no_grad(), LiveBytes() as live:
        hidden = empty(1, TOKENS, WIDTH)
        hidden = run(block, hidden, modulation, rope, CrossAttended(read, read))
        assert live.peak == pytest.approx(BLOCK_UNITS[kind] * unit, rel=0.01)
        live.peak = live.now
        look(fourteen_billion.face_adapter[0], hidden, faces)
        assert live.peak < BLOCK_UNITS[kind] * unit
        live.peak = live.now
        level = empty(1, WIDTH)
        transformer.to_latents(fourteen_billion, hidden, level, (22, 104, 60))
        assert live.peak < 2 * unit
    assert step_bytes(SHAPE, *SIZE, kind=kind) == BLOCK_UNITS[kind] * unit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autoencoder_peak_forecast_equals_counted_tensors(dtype):
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        ours, theirs = FramewiseVae().to(kind), AutoencoderKLWan().to(kind)
    with_channels_last(ours)
    latents = torch.empty(1, 16, 3, 104, 60, dtype=kind, device="meta")
    pixels = torch.empty(1, 3, 9, 832, 480, dtype=kind, device="meta")
    with torch.no_grad():
        with LiveBytes() as decoding:
            for _ in ours.decode_chunks(latents):
                pass
        with LiveBytes() as encoding:
            ours._encode(pixels)
        with LiveBytes() as whole:
            theirs.clear_cache()
            for _ in range(3):
                theirs._conv_idx = [0]
                theirs.decoder(latents[:, :, :1], feat_cache=theirs._feat_map, feat_idx=theirs._conv_idx)
        with LiveBytes() as whole_encoding:
            theirs._encode(pixels)
    area = 480 * 832
    for found, counted in ((decoding, VAE_DECODE), (encoding, VAE_ENCODE), (whole, VAE_TILE)):
        assert found.peak / area == pytest.approx(counted[dtype], rel=0.02)
    for found, counted in ((decoding, VAE_DECODE), (encoding, VAE_ENCODE)):
        assert found.peak / area <= counted[dtype]
    assert whole_encoding.peak <= whole.peak  # of a tile, decoding is what counts
    assert sum(p.nbytes for p in ours.parameters()) == pytest.approx(vae_bytes(PRODUCTION.vae, dtype), rel=0.001)


def test_forecast_of_stream_mode_equals_sum_by_hand():
    """`stream` at 480x832, 81 frames: every part that the docs and the record give."""
    parts = forecast("stream").parts
    block, adapter = 227_437_568, 59_023_872
    assert parts["slots"] == 2 * (block + adapter)
    assert parts["invariants"] == SHAPE.conditioning_bytes(*SIZE)
    assert parts["activations"] == 6 * TOKENS * WIDTH * 2
    assert parts["workspace"] == 30_720 * 5_120 * 2  # the time's projection is the largest weight
    stages = forecast("stream").stages
    inside = ("other_weights", "autoencoder", "workspace", "slots", "invariants", "window", "activations")
    assert stages["denoise"] == pytest.approx(1.08 * sum(parts[name] for name in inside) + parts["context"], rel=1e-6)
    assert forecast("stream").peak == max(stages.values())


def test_forecast_in_8_bits_includes_codes():
    exact, parts = forecast("stream").parts, {}
    # Beyond two hidden states and the inside of the feed-forward part, 2.7 as wide: its codes.
    inside = TOKENS * 13_824
    for compute in ("fp8", "int8"):
        recipe = get_recipe(f"fp4-distill+{compute}")
        found = forecast_memory(make_plan("stream", recipe), recipe, PRODUCTION, *SIZE)
        parts[compute] = found.parts
        assert found.parts["activations"] == pytest.approx(2 * 2 * TOKENS * WIDTH + 2 * inside + inside)
    weight = 13_824 * 5_120  # the largest that sees every token
    assert [parts[compute]["workspace"] - exact["workspace"] for compute in ("fp8", "int8")] == [weight, weight]
    plain = get_recipe("bf16+int8")
    assert forecast_memory(make_plan("stream", plain), plain, PRODUCTION, *SIZE).parts["workspace"] == weight


@pytest.mark.parametrize(
    ("word", "weights", "activations"), [("svdq-int4", 9.63e9, 6.43), ("svdq-nvfp4", 10.18e9, 6.47)]
)
def test_forecast_of_svdq_counts_weights_as_stored(word, weights, activations):
    """No codes of weights or of inputs are kept; the workspace of dequantised weights stays the same."""
    recipe = get_recipe(f"fp4-distill+{word}")
    found = forecast_memory(make_plan("resident", recipe), recipe, PRODUCTION, *SIZE).parts
    exact = forecast("resident").parts
    assert found["blocks"] + found["other_weights"] == pytest.approx(weights, rel=0.001)
    assert found["activations"] == pytest.approx(activations * 2 * TOKENS * WIDTH, rel=0.001)
    same = exact.keys() - {"blocks", "other_weights", "activations"}
    assert {part: found[part] for part in same} == {part: exact[part] for part in same}
    assert "weight_codes" not in found
    large = 200 * GB
    assert choose_plan("auto", recipe, PRODUCTION, large)[0] == make_plan("resident", recipe)


@pytest.mark.parametrize("word", ["svdq-int4", "svdq-nvfp4"])
@pytest.mark.parametrize(("card", "mode"), [(16, "stream"), (24, "resident"), (32, "resident")])
def test_choose_plan_for_svdq_recipe_fits_mode_to_card(word, card, mode):
    """An engine gets about 95 % of a card's nominal memory."""
    recipe = get_recipe(f"fp4-distill+{word}")
    plan, _ = choose_plan("auto", recipe, PRODUCTION, round(0.95 * card * GIB))
    assert plan.mode == mode


def test_forecast_with_kept_codes_adds_one_byte_per_weight_in_every_stage():
    """12.4 billion weights, and a float32 scale for each row. The workspace for codes of LoRAs' weights stays."""
    weights = 40 * (6 * WIDTH**2 + 2 * WIDTH * 13_824) + 8 * 2 * WIDTH**2
    rows = 40 * (7 * WIDTH + 13_824) + 8 * 2 * WIDTH
    for recipe in map(get_recipe, ("fp4-distill+fp8", "fp4-distill+int8")):
        plain = make_plan("resident", recipe)
        without = forecast_memory(plain, recipe, PRODUCTION, *SIZE)
        kept = forecast_memory(replace(plain, keep_codes=True), recipe, PRODUCTION, *SIZE)
        assert kept.parts == {**without.parts, "weight_codes": weights + 4 * rows}
        assert weights + 4 * rows == pytest.approx(12.4e9, rel=0.002)
        for stage, size in without.stages.items():
            assert kept.stages[stage] - size == pytest.approx(1.08 * (weights + 4 * rows), abs=1)


def test_forecast_at_480p_meets_targets():
    assert forecast("stream").peak <= 8 * GB
    sixteen = get_recipe("fp4-distill+bf16-vae")
    assert forecast_memory(make_plan("stream", sixteen), sixteen, PRODUCTION, *SIZE).peak < 6 * GB
    assert forecast("minimal").peak < 6 * GB
    assert forecast("resident").peak > 2 * forecast("stream").peak


def test_forecast_on_gpu_counts_chunked_blocks():
    """On a GPU the chunked block replaces a compiled one; on a CPU `resident` has only the whole block."""
    unit = 2 * TOKENS * WIDTH
    assert forecast("resident").parts["activations"] == 6 * unit
    assert forecast("resident", cuda=False).parts["activations"] == 12 * unit
    assert forecast("minimal").parts["activations"] == pytest.approx(5.36 * unit)
    # Where the compiled block holds less, the other one counts.
    fp8 = get_recipe("fp4-distill+fp8")
    found = forecast_memory(make_plan("resident", fp8), fp8, PRODUCTION, *SIZE).parts["activations"]
    assert found == pytest.approx(max(6.05, 5.36 + 0.5) * unit)


@pytest.mark.parametrize("size", [SIZE, HD], ids=["480p", "720p"])
def test_forecast_of_lower_mode_is_smaller(size):
    peaks = [forecast(mode, size).peak for mode in MODES]
    assert peaks == sorted(peaks, reverse=True)
    assert all(forecast(mode, size, guided=True).peak >= peak for mode, peak in zip(MODES, peaks, strict=True))
    assert [next_lower_mode(mode) for mode in MODES] == ["stream", "minimal", None]


def test_forecast_counts_loras_on_device_of_their_weights():
    plain, beside = forecast("resident"), forecast("resident", load=Load(loras=738_000_000))
    assert beside.stages["vae_decode"] - plain.stages["vae_decode"] == pytest.approx(1.08 * 738e6, rel=1e-3)
    plain, beside = forecast("stream"), forecast("stream", load=Load(loras=738_000_000))
    assert beside.stages["denoise"] - plain.stages["denoise"] == pytest.approx(1.08 * 738e6 / 20, rel=1e-3)
    assert beside.stages["vae_decode"] == plain.stages["vae_decode"]


# Of a card of so many GiB, 0.6 GB are the system's.
@pytest.mark.parametrize(
    ("card", "size", "mode", "encoders", "preprocess"),
    [
        (141, SIZE, "resident", "device", "device"),
        (24, SIZE, "resident", "host", "device"),
        (20, SIZE, "resident", "host", "host"),
        (16, SIZE, "stream", "host", "device"),
        (12, SIZE, "stream", "host", "device"),  # 7.9 GB to stream, and 3.1 for the preprocessing
        (10, SIZE, "stream", "host", "host"),
        (8, SIZE, "stream", "host", "host"),
        (6, SIZE, "minimal", "disk", "host"),
        (32, HD, "resident", "host", "device"),
        (24, HD, "stream", "host", "device"),
        (20, HD, "stream", "host", "device"),
        (18, HD, "stream", "host", "host"),
        (16, HD, "stream", "host", "host"),
        (12, HD, "minimal", "disk", "host"),
        (8, HD, "minimal", "disk", "host"),
    ],
)
def test_auto_mode_is_highest_that_fits(card, size, mode, encoders, preprocess):
    free = card * GIB - 600_000_000
    plan, why = choose_plan("auto", RECIPE, PRODUCTION, free, windows=[Window(*size)])
    assert (plan.mode, plan.encoders, plan.preprocess) == (mode, encoders, preprocess)
    assert forecast_memory(plan, RECIPE, PRODUCTION, *size).peak <= free
    assert f"{free / GB:.1f} GB free" in why
    if mode != "resident":
        assert "resident needs" in why


# (card GiB, recipe, size) -> where encoders and preprocessing are, and whether 8-bit codes are kept
CODES = {
    (141, "fp4-distill+int8", SIZE): ("resident", "device", "device", True),
    (80, "fp4-distill+fp8", HD): ("resident", "device", "device", True),
    (80, "bf16+int8", SIZE): ("resident", "device", "device", True),
    (48, "fp4-distill+int8", SIZE): ("resident", "device", "device", True),
    (48, "fp4-distill+int8", HD): ("resident", "host", "device", True),  # codes before the encoders
    (32, "fp4-distill+int8+fp16-vae", SIZE): ("resident", "host", "device", True),
    (32, "fp4-distill+int8", SIZE): ("resident", "host", "device", False),  # 35 GB with codes
    (32, "fp4-distill+int8+fp16-vae", HD): ("resident", "host", "device", False),
    (24, "fp4-distill+int8+fp16-vae", SIZE): ("resident", "host", "device", False),
    (20, "fp4-distill+int8", SIZE): ("resident", "host", "host", False),
    (16, "fp4-distill+int8", SIZE): ("stream", "host", "device", False),
    (141, "fp4-distill", SIZE): ("resident", "device", "device", False),  # no product is in rows
    (141, "fp4-distill+nvfp4", SIZE): ("resident", "device", "device", False),
}


@pytest.mark.parametrize(("card", "word", "size"), CODES, ids=str)
def test_choose_plan_keeps_codes_if_they_fit(card, word, size):
    recipe, free = get_recipe(word), card * GIB - 600_000_000
    for asked in ("auto", CODES[card, word, size][0]):
        plan, why = choose_plan(asked, recipe, PRODUCTION, free, windows=[Window(*size)])
        assert (plan.mode, plan.encoders, plan.preprocess, plan.keep_codes) == CODES[card, word, size]
        assert forecast_memory(plan, recipe, PRODUCTION, *size).peak <= free
        assert ("8-bit codes are kept" in why) == plan.keep_codes


def test_choose_plan_keeps_codes_only_if_known_free_memory_suffices():
    recipe = get_recipe("fp4-distill+int8")
    for asked in ("auto", *MODES):
        assert not choose_plan(asked, recipe, PRODUCTION, None)[0].keep_codes
    for asked in ("stream", "minimal"):
        assert not choose_plan(asked, recipe, PRODUCTION, 140 * GB)[0].keep_codes
    kept = replace(make_plan("resident", recipe), keep_codes=True, encoders="host")
    least = forecast_memory(kept, recipe, PRODUCTION, *SIZE).peak
    for free, keeps in ((least, True), (least - 1, False)):
        plan, _ = choose_plan("auto", recipe, PRODUCTION, free)
        assert (plan.mode, plan.keep_codes) == ("resident", keeps)
    # A LoRA of a job takes memory too.
    plan, _ = choose_plan("auto", recipe, PRODUCTION, least, windows=[Window(*SIZE, loras=738_000_000)])
    assert (plan.mode, plan.keep_codes) == ("resident", False)


def test_choose_plan_on_cpu_keeps_codes_if_they_fit():
    """On a CPU a product in 8 bits runs by its definition."""
    recipe = get_recipe("fp4-distill+int8")
    plan, _ = choose_plan("auto", recipe, PRODUCTION, 100 * GB, cuda=False)
    assert (plan.mode, plan.keep_codes) == ("resident", True)
    without = forecast_memory(replace(plan, keep_codes=False), recipe, PRODUCTION, *SIZE, cuda=False).peak
    plan, _ = choose_plan("auto", recipe, PRODUCTION, without, cuda=False)
    assert (plan.mode, plan.keep_codes) == ("resident", False)


def test_stream_plan_with_free_memory_keeps_preprocessing_on_device():
    chunked = make_plan("stream", RECIPE)
    full = replace(chunked, preprocess="device")
    without, with_it = (forecast_memory(plan, RECIPE, PRODUCTION, *SIZE) for plan in (chunked, full))
    networks = Load().preprocess + PREPROCESS_EXTRA
    assert networks == 2_610_000_000 + 500_000_000 == with_it.parts["preprocess"]
    for stage, size in without.stages.items():
        assert with_it.stages[stage] - size == pytest.approx(networks, abs=1)
    for free, place in ((with_it.peak, "device"), (with_it.peak - 1, "host"), (without.peak, "host")):
        for asked in ("auto", "stream"):
            plan, why = choose_plan(asked, RECIPE, PRODUCTION, free)
            assert (plan.mode, plan.preprocess) == ("stream", place)
            if asked == "auto":
                assert ("preprocessing on the host, else it would not fit" in why) == (place == "host")
    small = replace(Load(), preprocess=1)
    assert (
        choose_plan("auto", RECIPE, PRODUCTION, without.peak + PREPROCESS_EXTRA + 2, load=small)[0].preprocess
        == "device"
    )


def test_choose_plan_with_named_mode_that_is_too_large_keeps_mode():
    plan, why = choose_plan("resident", RECIPE, PRODUCTION, 4 * GB)
    assert (plan.mode, plan.encoders, plan.preprocess) == ("resident", "host", "host")
    assert "asked for" in why
    plan, why = choose_plan("auto", RECIPE, PRODUCTION, 3 * GB)
    assert plan.mode == "minimal"
    assert "no plan takes less memory" in why
    with pytest.raises(ConfigInvalid, match="no memory mode 'strem'"):
        choose_plan("strem", RECIPE, PRODUCTION, 3 * GB)


def test_auto_mode_on_cpu_never_streams():
    """Streaming from host to host saves nothing; only chunked activations and bfloat16 save memory."""
    plan, _ = choose_plan("auto", RECIPE, PRODUCTION, 100 * GB, cuda=False)
    assert plan.mode == "resident"
    plan, _ = choose_plan("auto", RECIPE, PRODUCTION, 27 * GB, cuda=False)
    assert plan.mode == "minimal"


def test_tiled_of_minimal_plan_depends_only_on_size():
    plan = make_plan("minimal", RECIPE)
    assert not plan.tiled(480, 832)
    assert plan.tiled(1280, 720)
    assert not make_plan("minimal", get_recipe("fp32")).tiled(1280, 720)  # float32 is there to be compared
    assert not make_plan("stream", RECIPE).tiled(1280, 720)


def test_forecast_as_dict_is_plain_data():
    said = forecast("minimal").as_dict()
    assert said["peak"] == max(said["stages"].values())
    assert all(isinstance(size, int) for size in (*said["stages"].values(), *said["parts"].values()))
    assert set(make_plan("stream", RECIPE).as_dict()) >= {"mode", "slots", "encoders", "vae_dtype"}


# -- the largest job ---------------------------------------------------------------------------------------------------

SMALL, LARGE = Window(480, 832, 81), Window(1280, 720, 81)
CARD = 24_800_000_000  # bytes free of an idle card of 24 GB


def test_auto_mode_with_several_jobs_fits_largest():
    """A card that fits `resident` at 480p takes a lower mode if a job at 720p would not fit."""
    alone, why = choose_plan("auto", RECIPE, PRODUCTION, CARD, windows=[SMALL])
    assert (alone.mode, "480x832x81" in why) == ("resident", True)
    assert forecast_memory(alone, RECIPE, PRODUCTION, *HD).peak > CARD
    for windows in ([SMALL, LARGE], [LARGE, SMALL]):
        plan, why = choose_plan("auto", RECIPE, PRODUCTION, CARD, windows=windows)
        assert plan.mode == "stream"
        assert forecast_memory(plan, RECIPE, PRODUCTION, *HD).peak <= CARD
        assert "GB forecast at 1280x720x81, 24.8 GB free" in why


def test_choose_plan_with_named_mode_fits_largest_job():
    free = 33 * GB
    assert choose_plan("resident", RECIPE, PRODUCTION, free, windows=[SMALL])[0].preprocess == "device"
    plan, why = choose_plan("resident", RECIPE, PRODUCTION, free, windows=[SMALL, Window(1600, 896, 81)])
    assert (plan.encoders, plan.preprocess) == ("host", "host")
    assert "asked for" in why and "1600x896x81" in why


def test_choose_plan_takes_window_with_most_memory_as_largest():
    """121 frames of 480p take more than 5 of 720p while blocks run, and less while pixels are decoded."""
    sixteen = get_recipe("fp4-distill+bf16-vae")
    long, wide = Window(480, 832, 241), Window(1280, 720, 5)
    _, why = choose_plan("resident", sixteen, PRODUCTION, None, windows=[wide, long])
    assert "480x832x241" in why
    _, why = choose_plan("resident", RECIPE, PRODUCTION, None, windows=[wide, long])
    assert "1280x720x5" in why


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"guided": True}, "480x832x81, guided"),
        ({"interpolates": True}, "480x832x81, interpolated"),
        ({"loras": 738_000_000}, "480x832x81, with LoRAs"),
    ],
)
def test_choose_plan_counts_guidance_interpolation_and_loras_of_window(more, word):
    plan = make_plan("resident", get_recipe("fp4-distill+bf16-vae"))
    kept = {"guided": more.get("guided", False), "interpolates": more.get("interpolates", False)}
    load = Load(loras=more.get("loras", 0))
    recipe = get_recipe("fp4-distill+bf16-vae")
    least = forecast_memory(plan, recipe, PRODUCTION, *SIZE, load=load, **kept).peak
    assert least > forecast_memory(plan, recipe, PRODUCTION, *SIZE).peak
    for free, encoders in ((least, "device"), (least - 1, "host")):
        found, why = choose_plan("auto", recipe, PRODUCTION, free, windows=[SMALL, Window(*SIZE, **more)])
        assert (found.mode, found.encoders) == ("resident", encoders)
        assert f"forecast at {word}, " in why


def test_choose_plan_without_windows_takes_480p_window():
    assert choose_plan("auto", RECIPE, PRODUCTION, CARD) == choose_plan(
        "auto", RECIPE, PRODUCTION, CARD, windows=[Window(480, 832, 81)]
    )
