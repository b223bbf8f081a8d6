from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import DEVICES, DeviceSpeed, EngineBuild, find_device, forecast_seconds

CLIP = {"size": (832, 480), "segment_frames": 81, "segments": 1, "evaluations": 6}
SEED = EngineBuild(stepwise=True, fused=False, shared=False, blank_again=True, library_walk=True)


def forecast(name, build, **changes):
    return forecast_seconds(PRODUCTION, find_device(name), build, **{**CLIP, **changes})


def test_forecast_of_seed_build_on_rtx_5090_agrees_with_measured_time():
    """Measured there: 272 s at 20 steps and 113 s at 6, hence 11.4 s a step."""
    assert forecast("RTX 5090", SEED).step_s == pytest.approx((272 - 113) / 14, rel=0.12)
    assert forecast("RTX 5090", SEED).total_s < 113  # loading, moving and encoding text are not in it


def test_forecast_parts_on_rtx_5090_equal_hand_count():
    """34,320 tokens: 852.6 TFLOP in products, of which 32 hardly depend on tokens; 964.9 in self-attention."""
    found = forecast("RTX 5090", EngineBuild())
    assert found.step["attention"] == pytest.approx(964.9 / 214, rel=1e-3)
    assert found.step["products"] == pytest.approx(852.6 / 240, rel=0.03)
    assert found.step["elementwise"] == pytest.approx(40 * 10.0 / 1509, rel=0.01)  # GB a block in generated code
    assert forecast("RTX 5090", SEED).step["elementwise"] == pytest.approx(40 * 66 / 1509, rel=0.01)
    # 44 GB for all weights, 27 % of them kept.
    assert found.step["weights to the compute"] == pytest.approx(44 / 1509, rel=0.3)
    assert found.step["activations to codes"] == 0
    # Convolutions, and 1,182 and 791 GB through memory; the reference's picture is the encoder's 82nd.
    assert found.fixed["decode"] == pytest.approx(275.4 / 240 / 0.24 + 1182 / 1509, rel=0.01)
    assert found.fixed["encode"] == pytest.approx((163.8 + 2.7) / 240 / 0.24 + 791 * 82 / 81 / 1509, rel=0.01)


# Published measurements of large kernels; for some GPUs, estimates. TFLOP/s of products (bf16, fp8, int8, nvfp4), of
# attention, of attention in 8 bits; GB/s of copies. SVDQuant's are estimates, but for int4 on an RTX 5090.
PUBLISHED = {
    "RTX 5090": ((240, 390, 580, 1140, 79, 820), 214, 554, 1509),
    "RTX 4090": ((160, 300, 540, None, 700, None), 164, 431, 920),
    "L40S": ((270, 500, 500, None, 650, None), 164, 431, 780),
    "A100": ((267, None, 464, None, 180, None), 204, 278, 1700),
    "H200": ((763, 1085, 1160, None, None, None), 595, None, 4055),
    "H100": ((763, 1085, 1160, None, None, None), 595, None, 2800),
}
COMPUTES = ("bf16", "fp8", "int8", "nvfp4", "svdq-int4", "svdq-nvfp4")


def test_devices_have_published_rates():
    assert [device.name for device in DEVICES] == list(PUBLISHED)
    for device in DEVICES:
        products, attention, attention_8bit, copies = PUBLISHED[device.name]
        known = dict(zip(COMPUTES, products, strict=True))
        assert device.matmul == {name: rate for name, rate in known.items() if rate is not None}
        assert (device.attention, device.attention_8bit, device.copy_gb_s) == (attention, attention_8bit, copies)


def test_estimated_rates_follow_rules_of_table():
    estimates = {device.name: [name for name in device.matmul if device.estimates(name)] for device in DEVICES}
    every = ["bf16", "fp8", "int8", "svdq-int4"]
    assert estimates == {
        "RTX 5090": ["svdq-nvfp4"], "RTX 4090": ["svdq-int4"], "L40S": every, "A100": ["svdq-int4"],
        "H200": [], "H100": [],
    }  # fmt: skip
    rates = {device.name: device.matmul for device in DEVICES}
    # FLUX.1: 57 blocks of 12 square products of 3,072 and one attention, of 4,608 tokens, in 218 ms on an RTX 4090.
    products, attention = 57 * 24 * 3072**2 * 4608 / 1e12, 57 * 4 * 4608**2 * 3072 / 1e12
    hidden = 57 * 4608 * 3072
    rest = 0.218 - attention / 164
    through_memory = hidden * (57 + 9 * 2.53) / 920e9  # fused elementwise work; five hidden states and four inside
    bounds = products / rest, products / (rest - through_memory)
    assert bounds == pytest.approx((470, 1040), rel=0.01)
    assert rates["RTX 4090"]["svdq-int4"] == pytest.approx((bounds[0] * bounds[1]) ** 0.5, rel=0.01)
    ratio = rates["L40S"]["int8"] / rates["RTX 4090"]["int8"]
    assert rates["L40S"]["svdq-int4"] == pytest.approx(ratio * rates["RTX 4090"]["svdq-int4"], rel=0.01)
    bf16 = rates["A100"]["bf16"]
    assert rates["A100"]["svdq-int4"] == pytest.approx((0.45 * bf16 * bf16) ** 0.5, rel=0.01)
    nunchaku = (708, 988, 1220, 1008)
    assert rates["RTX 5090"]["svdq-nvfp4"] == pytest.approx(sum(nunchaku) / 4 * 1676 / 2000, rel=0.01)


def test_engine_build_has_expected_defaults():
    assert asdict(EngineBuild()) == {
        "compute": "bf16",
        "fp4": True,
        "stepwise": False,
        "fused": True,
        "shared": True,
        "attention_8bit": False,
        "vae": "float32",
        "blank_again": False,
        "codes_kept": False,
        "library_walk": False,
    }


# A machine whose rates are all different: a part that is divided by another's rate shows.
ODD = DeviceSpeed("odd", "odd", {"bf16": 100.0, "int8": 300.0}, 50.0, 70.0, 1000.0)
MODEL, VAE, WINDOW = PRODUCTION.transformer, PRODUCTION.vae, (832, 480, 81)
ATTENTION = 4 * 40 * 34_320**2 * 5120 / 1e12  # TFLOP
SHARED = MODEL.conditioning_flop(*WINDOW) / 1e12
PRODUCTS = MODEL.forward_flop(*WINDOW) / 1e12 - ATTENTION - SHARED
# Elements of hidden states in all blocks; 57 bytes each go through memory in fused kernels, 375 in separate ones.
HIDDEN = 40 * 34_320 * 5120
# 40 blocks of six square products and the feed-forward's two, 8 face adapters of two; once a window, text and image
# keys and values, and the faces'.
STEP_WEIGHTS = 40 * (6 * 5120**2 + 2 * 5120 * 13_824) + 8 * 2 * 5120**2
WINDOW_WEIGHTS = 40 * (2 + 2) * 5120**2 + 8 * 2 * 5120**2
# What goes into a block's linears that see every token, in hidden states: one input of query, key and value and that of
# the self-attention's output, query and output of the cross-attention, the feed-forward part's first; 13824/5120 of its
# second.
INSIDE = 2.7
INPUTS = 2 + 2 + 1 + INSIDE


def on_odd(build, **changes):
    return forecast_seconds(PRODUCTION, ODD, build, **{**CLIP, **changes})


def test_forecast_step_equals_hand_count():
    """Four and a half bits of a weight are read and sixteen written: 2.5625 bytes."""
    assert on_odd(EngineBuild()).step == pytest.approx(
        {
            "products": PRODUCTS / 100,
            "attention": ATTENTION / 50,
            "elementwise": HIDDEN * 57 / 1000e9,
            "activations to codes": 0,
            "weights to the compute": STEP_WEIGHTS * (4.5 / 8 + 2) / 1000e9,
            "shared work again": 0,
        },
        rel=1e-12,
    )
    found = on_odd(
        EngineBuild(compute="int8", attention_8bit=True, fused=False, stepwise=True, shared=False), guided=True
    )
    assert found.step == pytest.approx(
        {
            "products": 2 * PRODUCTS / 300,
            "attention": 2 * ATTENTION / 70,
            "elementwise": 2 * HIDDEN * 375 / 1000e9,
            # Rotated and quantised in one pass, 2 bytes read and 1 written, behind GELU too, whose own pass would read
            # 2 and write 2; of a weight the product reads 1.
            "activations to codes": 2 * HIDDEN * (INPUTS * (2 + 1) - INSIDE * (2 + 2)) / 1000e9,
            "weights to the compute": 2 * (STEP_WEIGHTS * (34 + 3 + 1) + WINDOW_WEIGHTS * 34) / 1000e9,
            # Small convolutions: 15 % of the rate of large products, and in bf16 whatever the products are.
            "shared work again": 2 * SHARED / 100 / 0.15,
        },
        rel=1e-12,
    )
    assert found.fixed["shared once a window"] == 0
    assert on_odd(EngineBuild(fp4=False)).step["weights to the compute"] == 0
    plain = on_odd(EngineBuild(compute="int8", fp4=False)).step
    assert plain["weights to the compute"] == pytest.approx(STEP_WEIGHTS * (3 + 1) / 1000e9, rel=1e-12)


def test_forecast_step_in_8_bits_counts_codes_and_weights():
    """TB a step of the 14B at 832x480, 81 frames, as 1000 GB/s are: 7.7 hidden states a block, of 3 bytes, less GELU's
    four of 2.7. When each of query, key and value rotated its input, and quantised it in another pass, it was .477."""
    every = replace(ODD, matmul=dict.fromkeys(("bf16", "fp8", "int8", "nvfp4"), 100.0))

    def step(compute):
        return forecast_seconds(PRODUCTION, every, EngineBuild(compute), **CLIP).step

    int8, fp8 = step("int8"), step("fp8")
    assert int8["activations to codes"] == pytest.approx(0.0865, abs=0.0001)
    assert int8["weights to the compute"] == pytest.approx(0.081, abs=0.001)
    assert fp8["weights to the compute"] == pytest.approx(0.081, abs=0.001)
    assert fp8["elementwise"] + fp8["activations to codes"] == pytest.approx(0.430, abs=0.002)
    # Used as they are stored: not even dequantised, but for an eighth of a byte a weight.
    assert step("nvfp4")["weights to the compute"] == pytest.approx(STEP_WEIGHTS * 0.13 / 1000e9, rel=1e-12)


@pytest.mark.parametrize(("compute", "scale"), [("svdq-int4", 2 / 64), ("svdq-nvfp4", 1 / 16)])
def test_forecast_step_in_svdq_equals_hand_count(compute, scale):
    """Each layer makes codes of its own input, so that the one of query, key and value is read three times. Weights are
    read as they are stored. The low-rank part of rank 32 is products in bf16 of all inputs and all outputs."""
    machine = replace(ODD, matmul={"bf16": 100.0, compute: 400.0})
    sides = 40 * (14 * 5120 + 2 * 13_824) + 8 * 4 * 5120
    low_rank = 2 * 32 * sides * 34_320 / 1e12
    found = forecast_seconds(PRODUCTION, machine, EngineBuild(compute), **CLIP)
    assert found.step == pytest.approx(
        {
            "products": PRODUCTS / 400,
            "attention": ATTENTION / 50,
            "elementwise": HIDDEN * 57 / 1000e9,
            "activations to codes": HIDDEN * (INPUTS + 2) * (2 + 0.5 + scale) / 1000e9,
            "weights to the compute": STEP_WEIGHTS * (0.5 + scale) / 1000e9,
            "shared work again": 0,
            "low-rank part": low_rank / 100,
        },
        rel=1e-12,
    )
    assert low_rank / PRODUCTS == pytest.approx(0.01, abs=0.001)
    assert found.fixed == forecast_seconds(PRODUCTION, machine, EngineBuild(), **CLIP).fixed
    guided = forecast_seconds(PRODUCTION, machine, EngineBuild(compute), **CLIP, guided=True)
    assert guided.step_s == pytest.approx(2 * found.step_s)


def test_forecast_with_kept_codes_reads_one_byte_per_weight():
    every = replace(ODD, matmul=dict.fromkeys(("bf16", "fp8", "int8"), 100.0))
    for compute in ("fp8", "int8"):
        for fp4 in (True, False):
            build = EngineBuild(compute, fp4=fp4)
            made = forecast_seconds(PRODUCTION, every, build, **CLIP, guided=True)
            kept = forecast_seconds(PRODUCTION, every, replace(build, codes_kept=True), **CLIP, guided=True)
            assert kept.step == pytest.approx(
                {**made.step, "weights to the compute": 2 * STEP_WEIGHTS / 1000e9}, rel=1e-12
            )
            assert kept.fixed == made.fixed
    with pytest.raises(ValueError, match="codes cannot be kept for products in bf16"):
        EngineBuild(codes_kept=True)


@pytest.mark.parametrize(
    ("device", "compute", "saved"), [("RTX 5090", "int8", 0.27), ("RTX 5090", "fp8", 0.27), ("H200", "fp8", 0.10)]
)
def test_forecast_with_kept_codes_saves_expected_seconds(device, compute, saved):
    """Seconds of six steps. Of 12.4 billion weights 5.5625 bytes each that go through memory no more."""
    build = EngineBuild(compute)
    found = forecast(device, build).total_s - forecast(device, replace(build, codes_kept=True)).total_s
    assert found == pytest.approx(saved, abs=0.005)


def test_forecast_of_absent_8_bit_attention_uses_plain_attention():
    lacking = replace(ODD, attention_8bit=None)
    found = forecast_seconds(PRODUCTION, lacking, EngineBuild(attention_8bit=True), **CLIP)
    assert found.step["attention"] == pytest.approx(ATTENTION / 50, rel=1e-12)


@pytest.mark.parametrize(
    ("vae", "share", "decoded", "encoded"),
    [("float32", 0.24, 36_540, 24_460), ("bfloat16", 0.46, 18_710, 12_680), ("float16", 0.46, 18_710, 12_680)],
)
def test_forecast_fixed_part_equals_hand_count(vae, share, decoded, encoded):
    """Three windows: scene and pose of each but the first scene, which is blank and kept, and the reference.

    `decoded`, `encoded`: bytes through memory for a pixel of a picture.
    """
    pixels = 832 * 480

    def encode(frames):
        return VAE.encode_flop(832, 480, frames) / 1e12 / 100 / share + encoded * pixels * frames / 1000e9

    decode = VAE.decode_flop(*WINDOW) / 1e12 / 100 / share + decoded * pixels * 81 / 1000e9
    found = on_odd(EngineBuild(vae=vae), segments=3, guided=True)
    assert found.fixed == pytest.approx(
        {
            "encode": 5 * encode(81) + encode(1),
            "decode": 3 * decode,
            "shared once a window": 2 * 3 * SHARED / 100 / 0.15,
        },
        rel=1e-12,
    )
    again = on_odd(EngineBuild(vae=vae, blank_again=True), segments=3)
    assert again.fixed["encode"] == pytest.approx(6 * encode(81) + encode(1), rel=1e-12)
    assert found.total_s == pytest.approx(18 * sum(found.step.values()) + sum(found.fixed.values()), rel=1e-12)


def test_forecast_of_blank_scene_saves_encoding_in_later_windows():
    """80 of 81 pictures: 64.7 of 163.7 TFLOP are left. The first window's is kept by jobs before, or is as it was."""
    encode, blank = VAE.encode_flop(*WINDOW) / 1e12, VAE.encode_flop(*WINDOW, 1) / 1e12
    reference = VAE.encode_flop(832, 480, 1) / 1e12
    assert (encode, blank) == pytest.approx((163.7, 64.7), abs=0.05)
    found = on_odd(EngineBuild(), segments=3, blank_from=1).fixed
    plain = on_odd(EngineBuild(), segments=3).fixed
    seconds = (3 * encode + 2 * blank + reference) / 100 / 0.24
    through_memory = (3 * 81 + 2 * 81 * blank / encode + 1) * 480 * 832 * 24_460 / 1000e9
    assert found["encode"] == pytest.approx(seconds + through_memory, rel=1e-12)
    assert {k: v for k, v in found.items() if k != "encode"} == {k: v for k, v in plain.items() if k != "encode"}
    assert on_odd(EngineBuild(), segments=1, blank_from=1) == on_odd(EngineBuild(), segments=1)
    again = on_odd(EngineBuild(blank_again=True), segments=1, blank_from=1)
    assert again == on_odd(EngineBuild(blank_again=True), segments=1)


@pytest.mark.parametrize("name", ["RTX 5090", "RTX 4090", "A100", "H200"])
@pytest.mark.parametrize(
    ("vae", "published", "share"), [("float32", 14.5, 0.16), ("bfloat16", 8.4, 0.27), ("float16", 8.4, 0.27)]
)
def test_forecast_of_library_walk_agrees_with_published_decoding_times(name, vae, published, share):
    """14.5 and 8.4 s of the same work were .16 and .27 of the bf16 product's rate, memory traffic included."""
    assert share / 0.16 == pytest.approx(14.5 / published, rel=0.03)
    found = forecast(name, EngineBuild(vae=vae, library_walk=True)).fixed["decode"]
    assert found == pytest.approx(275.4 / find_device(name).matmul["bf16"] / share, rel=0.045)


def test_forecast_of_decoding_agrees_with_published_compiled_time():
    """6.6 s of 14.5: compiling leaves about the traffic that our walk has."""
    found = forecast("RTX 5090", EngineBuild(vae="bfloat16")).fixed["decode"]
    assert found == pytest.approx(6.6 / 14.5 * 275.4 / 240 / 0.16, rel=0.15)


def test_forecast_of_clip_on_rtx_5090_meets_target():
    """62 s before norm and SiLU went straight into the convolutions' inputs."""
    assert 58 < forecast("RTX 5090", EngineBuild()).total_s <= 60
    for vae in ("bfloat16", "float16"):
        assert 53 < forecast("RTX 5090", EngineBuild(vae=vae)).total_s <= 56


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_forecast_falls_with_each_optimisation_and_respects_hardware(device):
    builds = [
        SEED,
        replace(SEED, stepwise=False),
        replace(SEED, stepwise=False, shared=True),
        replace(SEED, stepwise=False, shared=True, fused=True),
        EngineBuild(library_walk=True),
        EngineBuild(),
        EngineBuild(vae="bfloat16"),
        *([EngineBuild(vae="bfloat16", attention_8bit=True)] * (device.attention_8bit is not None)),
    ]
    builds += [replace(builds[-1], compute=compute) for compute in ("fp8", "nvfp4") if compute in device.matmul]
    seconds = [forecast(device.name, build).total_s for build in builds]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds)
    assert seconds[-1] > 6 * 1839 / (2 * max(device.matmul.values()))


def test_forecast_multiplies_with_windows_steps_and_guidance():
    one = forecast("H200", EngineBuild(blank_again=True))
    two = forecast("H200", EngineBuild(blank_again=True), segments=2, evaluations=4)
    assert (one.evaluations, two.evaluations, one.step_s) == (6, 8, two.step_s)
    assert two.fixed["decode"] == pytest.approx(2 * one.fixed["decode"])
    guided = forecast("H200", EngineBuild(blank_again=True), guided=True)
    assert guided.step_s == pytest.approx(2 * one.step_s)
    assert guided.total_s < 2 * one.total_s


def test_forecast_with_absent_compute_or_vae_dtype_is_refused():
    with pytest.raises(ValueError, match="A100 has no fp8; it has bf16, int8"):
        forecast("A100", EngineBuild(compute="fp8"))
    with pytest.raises(ValueError, match="one of float32"):
        EngineBuild(vae="bf16")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("rtx 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_find_device_with_driver_or_short_name_finds_device(name, found):
    assert find_device(name).name == found


@pytest.mark.parametrize("name", [None, "", "Tesla T4", "AMD Instinct MI300X", "NVIDIA GeForce RTX 5090 Laptop GPU"])
def test_find_device_of_unknown_name_is_none(name):
    assert find_device(name) is None
