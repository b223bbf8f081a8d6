"""Pictures that repeat: the encoder's first layers run until their outputs do; the latents have the library's bits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runner.forecast.flops import Costs
from runner.generation.wan_animate import fixed_point
from runner.generation.wan_animate.autoencoder import FramewiseVae
from runner.generation.wan_animate.fixed_point import FixedPoints, find_repeats

WINDOW = 81
CAUSAL = 5 + 4  # convolutions in time before time is halved: at full size and at half, with two residual blocks each
FULL, HALF = 1 + 2 * 5, 1 + 2 * CAUSAL  # equal pictures in a row until a group's output repeats


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def pair(dtype=torch.float32, **config):
    torch.manual_seed(0)
    config = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4} | config
    theirs = AutoencoderKLWan(**config)
    for parameter in theirs.parameters():  # biases too: zeros must not stay zeros
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = theirs.eval().to(dtype)
    ours = FramewiseVae.from_config(theirs.config).eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_clip(frames, height=32, width=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


def clips():
    """(Name, pixels, pictures of the full size that must run, of the half size)."""
    blank, moving = torch.zeros(1, 3, WINDOW, 32, 48), random_clip(WINDOW)
    still = moving[:, :, :1].expand(-1, -1, 33, -1, -1)
    yield "one picture, then blank", torch.cat([moving[:, :, :1], blank[:, :, :32]], 2), 1 + FULL, 1 + HALF
    yield "five pictures, then blank", torch.cat([moving[:, :, :5], blank[:, :, :28]], 2), 5 + FULL, 5 + HALF
    yield "still", still, FULL, HALF
    # Two blank pictures go before every clip: what all convolutions but the first keep then is no picture of theirs.
    yield "blank", blank[:, :, :33], FULL - 2, HALF - 2
    yield "moving", moving[:, :, :33], 33, 33
    yield "blank, then moving", torch.cat([blank[:, :, :24], moving[:, :, :9]], 2), FULL - 2 + 9, HALF - 2 + 9
    halt = torch.cat([moving[:, :, :1], blank[:, :, :13], moving[:, :, :3], blank[:, :, :16]], 2)
    yield "blank twice, the half size settles in neither", halt, 1 + FULL + 3 + FULL, 33
    short = torch.cat([still[:, :, :FULL], moving[:, :, 1:2], still[:, :, :21]], 2)
    yield "still one picture too short", short, FULL + 1 + FULL, FULL + 1 + HALF
    sign = torch.zeros(1, 3, 33, 32, 48)
    sign[:, :, ::2] *= -1
    yield "zeros of either sign", sign, 33, 33


CLIPS = {name: rest for name, *rest in clips()}


@pytest.fixture
def runs(monkeypatch):
    """How often convolutions in time run, by the height of their input without its padding."""
    counts: Counter[int] = Counter()
    convolve = torch.nn.Conv3d.forward

    def forward(layer, padded):
        if layer.kernel_size == (3, 3, 3):
            counts[padded.shape[-2] - 2] += 1
        return convolve(layer, padded)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", forward)
    return counts


@pytest.mark.parametrize("name", CLIPS)
def test_the_latents_are_the_librarys_and_what_repeats_does_not_run(name, runs):
    ours, theirs = pair()
    pixels, full, half = CLIPS[name]
    wanted = theirs.encode(pixels).latent_dist.parameters
    runs.clear()
    found = ours.encode(pixels).latent_dist.parameters
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    assert (runs[32], runs[16]) == (5 * full, 4 * half)


@pytest.mark.parametrize("overlap", [1, 5])
def test_a_later_windows_scene(overlap, runs):
    """81 pictures: 12 and 20 run, with an overlap of 5 16 and 24."""
    ours, theirs = pair()
    pixels = torch.zeros(1, 3, WINDOW, 32, 48)
    pixels[:, :, :overlap] = random_clip(overlap)
    wanted = theirs.encode(pixels).latent_dist.parameters
    runs.clear()
    assert torch.equal(ours.encode(pixels).latent_dist.parameters, wanted)
    assert (runs[32], runs[16]) == (5 * (11 + overlap), 4 * (19 + overlap))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_as_with_every_picture_run(dtype, runs, monkeypatch):
    ours, _ = pair(dtype, base_dim=8)
    pixels = torch.cat([random_clip(1), torch.zeros(1, 3, 23, 32, 48), random_clip(5)], dim=2).to(dtype)
    found = ours.encode(pixels).latent_dist.parameters
    assert (runs[32], runs[16]) == (5 * (12 + 5), 4 * (20 + 5))
    monkeypatch.setattr("runner.generation.wan_animate.autoencoder.find_repeats", lambda x: [False] * x.shape[2])
    assert torch.equal(found.view(torch.int16), ours.encode(pixels).latent_dist.parameters.view(torch.int16))
    assert found.isfinite().all() and found.unique().numel() > 100


SHAPES = {
    "as published, narrower": {"base_dim": 8},
    "more blocks": {"base_dim": 8, "num_res_blocks": 3},
    "time halved at once": {"base_dim": 8, "num_res_blocks": 1, "temperal_downsample": [True, True, False]},
    "time halved at once and late": {"base_dim": 8, "num_res_blocks": 1, "temperal_downsample": [True, False, True]},
    "left to the library": {"base_dim": 4, "num_res_blocks": 1},
}


@pytest.mark.parametrize("blank_from", [None, 0, 1, 2, 5, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_the_forecast_counts_what_is_run(name, blank_from):
    ours, _ = pair(**SHAPES[name])
    pixels = random_clip(25)
    if blank_from is not None:
        pixels[:, :, blank_from:] = 0
    shape = Costs.from_configs({}, ours.config).vae
    assert shape.framewise == ours.framewise
    # The counter does not know torch's attention on a CPU, but the products that it may be made of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ours.encode(pixels)
    assert shape.encode_flop(48, 32, 25, blank_from) == counter.get_total_flops()


def test_after_a_fixed_point_nothing_is_left_in_the_way_of_the_next_clip():
    ours, theirs = pair()
    blank, moving = torch.zeros(1, 3, 25, 32, 48), random_clip(9)
    for pixels in (blank, moving, blank):
        assert torch.equal(ours.encode(pixels).latent_dist.parameters, theirs.encode(pixels).latent_dist.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pictures_that_equal_the_one_before(dtype):
    pixels = random_clip(6).to(dtype)
    assert find_repeats(pixels) == [False] * 6
    pixels[:, :, 3] = pixels[:, :, 2]
    pixels[:, :, 5] = pixels[:, :, 4]
    assert find_repeats(pixels) == [False, False, False, True, False, True]
    assert find_repeats(pixels.transpose(3, 4)) == find_repeats(pixels)  # in any layout
    pixels[0, 2, 5, -1, -1] += 0.25
    assert find_repeats(pixels) == [False, False, False, True, False, False]
    assert find_repeats(torch.full_like(pixels, float("nan"))) == [False, *[True] * 5]  # the bits are the same
    assert find_repeats(pixels[:, :, :1]) == [False]
    assert find_repeats(torch.empty_like(pixels, device="meta")) == [False] * 6


class Sums:
    """A group of one causal layer, the sum of three pictures; `held` is what it keeps, `ran` how often it ran."""

    def __init__(self):
        self.held, self.ran = [torch.zeros(1, 1, 1, 1, 1)] * 2, 0

    def __call__(self, picture):
        self.ran += 1
        result = picture + sum(self.held)
        self.held = [*self.held, picture][-2:]
        return result


def follow(values, repeats, layers):
    """Outputs for pictures of one pixel each."""
    points = FixedPoints(repeats, lambda number: [layers[number].held])
    return [points.run(layers, torch.full((1, 1, 1, 1, 1), float(value))).item() for value in values]


def test_an_output_is_reused_from_the_first_one_that_repeats():
    layers = [Sums(), Sums()]
    values = [7, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1]
    repeats = [False, False, *[True] * 6, False, False, True]
    wanted = follow(values, [False] * len(values), [Sums(), Sums()])
    assert follow(values, repeats, layers) == wanted
    # 7 1 1 1: the fourth is the first with three equal inputs, the fifth repeats it. The second layer is two behind.
    assert [layer.ran for layer in layers] == [4 + 3, 6 + 3]


def test_kept_inputs_are_compared_and_no_count_is_trusted():
    """A layer whose output changes while its input does not, as with another order of sums: nothing is reused."""

    class Drifts(Sums):
        def __call__(self, picture):
            return super().__call__(picture) + 0.001 * self.ran

    layers = [Drifts(), Sums()]
    values, repeats = [1] * 12, [False] + [True] * 11
    whole = lambda picture: layers[1](layers[0](picture))  # noqa: E731
    points = FixedPoints(repeats, lambda number: [layers[1].held, layers[0].held])
    for value in values:
        points.run([whole], torch.full((1, 1, 1, 1, 1), float(value)))
    assert [layer.ran for layer in layers] == [12, 12]


def test_what_moves_is_not_compared(monkeypatch):
    monkeypatch.setattr(fixed_point.torch, "equal", lambda *_: pytest.fail("kept inputs were read"))
    ours, _ = pair(base_dim=8)
    ours.encode(random_clip(9))


def test_comparisons_before_the_switch_over_are_few(monkeypatch):
    """Each is a transfer to the host: one a picture and group before it settles, then one for each of its layers."""
    seen, equal = [], torch.equal
    monkeypatch.setattr(fixed_point.torch, "equal", lambda a, b: (seen.append(a.shape), equal(a, b))[1])
    ours, _ = pair(base_dim=8)
    pixels = torch.zeros(1, 3, WINDOW, 32, 48)
    pixels[:, :, :1] = random_clip(1)
    ours.encode(pixels)
    full = [shape for shape in seen if shape[-2] == 32 + 2]  # with their padding
    # From the second blank picture on: 8 of the last layer alone, then twice all 5 of them; likewise the half size.
    assert (len(full), len(seen) - len(full)) == (8 + 2 * 5, 6 + 2 * 4)
