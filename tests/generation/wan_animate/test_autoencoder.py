"""The autoencoder picture by picture against the library's own: the same bits, in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from runner.errors import NotFinite
from runner.generation.runtime.finite import FiniteChecks
from runner.generation.wan_animate import autoencoder
from runner.generation.wan_animate.autoencoder import FramewiseVae, decode_latents, prepare_vae
from runner.generation.wan_animate.transformer import Switches


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def pair(dtype=torch.float32, **config):
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(**{"base_dim": 16, "num_res_blocks": 1, **config}).eval().to(dtype)
    ours = FramewiseVae.from_config(theirs.config).eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("dtype", "latent_frames"), [(torch.float32, n) for n in (1, 2, 4)] + [(torch.bfloat16, 2)])
def test_pictures_and_latents_are_the_librarys(latent_frames, dtype):
    ours, theirs = pair(dtype, **({"base_dim": 8} if dtype is torch.bfloat16 else {}))  # slow on a CPU
    assert ours.framewise
    latents = torch.randn(1, 16, latent_frames, 8, 6).to(dtype)
    wanted = theirs.decode(latents).sample
    assert torch.equal(ours.decode(latents).sample, wanted)
    chunks = list(ours.decode_chunks(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, *[4] * (latent_frames - 1)]
    assert torch.equal(torch.cat(chunks, dim=2), wanted)
    pixels = torch.rand(4 * latent_frames - 3, 64, 48, 3).to(dtype).permute(3, 0, 1, 2)[None]
    assert torch.equal(ours.encode(pixels).latent_dist.mode(), theirs.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize(
    "config", [{"base_dim": 4, "dim_mult": [1, 1, 1, 1]}, {"temperal_downsample": [False, False, False]}]
)
def test_other_models_are_the_librarys_too(config):
    ours, theirs = pair(**config)
    latents = torch.randn(1, 16, 3, 8, 6)
    assert torch.equal(torch.cat(list(ours.decode_chunks(latents)), dim=2), theirs.decode(latents).sample)
    pixels = torch.rand(1, 3, 9, 64, 48)
    assert torch.equal(ours.encode(pixels).latent_dist.mode(), theirs.encode(pixels).latent_dist.mode())


def test_tiles_are_the_librarys():
    ours, theirs = pair()
    for vae in (ours, theirs):
        vae.enable_tiling(32, 32, 24, 24)
    latents = torch.randn(1, 16, 2, 8, 6)
    (whole,) = ours.decode_chunks(latents)
    assert torch.equal(whole, theirs.decode(latents).sample)


def test_frames_beyond_whole_chunks_are_left_out_as_by_the_library():
    ours, theirs = pair()
    pixels = torch.rand(1, 3, 7, 64, 48)
    assert torch.equal(ours.encode(pixels).latent_dist.mode(), theirs.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize(("first", "last", "overlap"), [(0, 13, 1), (1, 13, 1), (5, 9, 5), (5, 6, 5), (0, 13, 13)])
def test_a_window_is_cut_as_it_comes(first, last, overlap):
    """Only frames first..last-1 are converted; the pixels of the last frames come beside them."""
    ours, _ = pair()
    latents = torch.randn(1, 16, 5, 8, 6)  # the first is the reference's
    config = ours.config
    mean, deviation = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    wanted = ours.decode((latents / (1.0 / deviation) + mean)[:, :, 1:], return_dict=False)[0]
    seen: list[int] = []
    frames, tail = decode_latents(ours, latents, first, last, overlap, lambda p: (seen.append(p.shape[2]), p)[1])
    assert torch.equal(torch.cat(frames, dim=2), wanted[:, :, first:last])
    assert torch.equal(tail, wanted[:, :, -overlap:])
    assert max(seen) <= 4
    assert tail._base is None  # a copy: the chunks may go


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["by picture", "by latent frame", "tiled"])
def test_the_first_frame_that_is_not_finite_is_found_before_clamping(kind, bad):
    """Frame 6 of the window, frame 26 of the job. Clamped, infinity would be white."""
    ours, _ = pair(**({"base_dim": 4, "dim_mult": [1, 1, 1, 1]} if kind == "by latent frame" else {}))
    if kind == "tiled":
        ours.enable_tiling(32, 32, 24, 24)
    latents = torch.randn(1, 16, 4, 8, 6)
    clean = FiniteChecks()
    decode_latents(ours, latents, 0, 9, 1, lambda p: p, clean, 20)
    clean.read()

    last, convolve, frames = ours.decoder.conv_out, torch.nn.Conv3d.forward, [0]

    def forward(layer, pixels):
        made = convolve(layer, pixels)
        if layer is last:
            at = 6 - frames[0]
            frames[0] += made.shape[2]
            if 0 <= at < made.shape[2]:
                made[0, 1, at, 0, 0] = bad
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv3d, "forward", forward)
        checks = FiniteChecks()
        decode_latents(ours, latents, 0, 9, 1, lambda p: p, checks, 20)
    with pytest.raises(NotFinite, match="vae_decode: NaN or infinity in output frame 26,"):
        checks.read()


def test_frames_that_are_not_handed_out_are_not_checked():
    ours, _ = pair()
    latents = torch.randn(1, 16, 4, 8, 6)
    latents[:, :, 3] = float("nan")  # frames 5 to 8
    checks = FiniteChecks()
    decode_latents(ours, latents, 0, 5, 1, lambda p: p, checks)
    checks.read()
    decode_latents(ours, latents, 0, 6, 1, lambda p: p, checks)
    with pytest.raises(NotFinite, match="output frame 5,"):
        checks.read()


def test_a_conversion_that_fails_empties_the_cache_at_once():
    ours, _ = pair()
    latents = torch.randn(1, 16, 4, 4, 4)

    def fail(_pixels):
        raise KeyError("disk")

    with pytest.raises(KeyError) as caught:
        decode_latents(ours, latents, 0, 9, 1, fail)
    assert caught.value.__traceback__ is not None  # holds the frames of the failed call
    assert ours._decoding is None and all(kept is None for kept in ours._feat_map)


def test_bfloat16_is_within_what_is_promised():
    """What `minimal` gives up: 40 dB and more against float32."""
    exact, _ = pair(base_dim=8)
    rounded, _ = pair(torch.bfloat16, base_dim=8)
    latents = torch.randn(1, 16, 2, 4, 4)
    off = (exact.decode(latents).sample - rounded.decode(latents.bfloat16()).sample.float()).square().mean()
    assert 10 * torch.log10(4 / off) > 40  # of values from -1 to 1


class OnGpu(FramewiseVae):
    """On the CPU, and says that it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("dtype", "switches", "innermost", "stopwatch"),
    [
        (torch.float32, Switches(), True, False),
        (torch.bfloat16, Switches(), True, True),
        (torch.float16, Switches(), True, True),
        (torch.bfloat16, Switches(channels_last=False), False, True),
    ],
)
def test_what_a_gpu_is_set_up_with(dtype, switches, innermost, stopwatch, monkeypatch):
    """In float32 kernels are never chosen by stopwatch: frames are the same in every process."""
    monkeypatch.setattr(autoencoder, "pick_norm", lambda *_: ("triton", "agrees"))
    vae = OnGpu(base_dim=8, num_res_blocks=1).eval().to(dtype)
    chosen = prepare_vae(vae, switches)
    assert ("vae_channels_last" in chosen) == innermost
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d) == innermost
    assert chosen["vae_cudnn_benchmark"] is vae.cudnn_benchmark is stopwatch
    assert (chosen["vae_norms"], chosen["vae_norms_why"]) == ("triton", "agrees")


@pytest.mark.parametrize("stopwatch", [False, True])
def test_the_choice_by_stopwatch_is_the_autoencoders_alone(stopwatch, monkeypatch):
    """Also between the pieces of a decoding, while others compute."""
    ours, _ = pair(base_dim=8)
    ours.cudnn_benchmark = stopwatch
    seen, convolve = set(), torch.nn.Conv3d.forward
    monkeypatch.setattr(
        torch.nn.Conv3d, "forward", lambda *a: (seen.add(torch.backends.cudnn.benchmark), convolve(*a))[1]
    )
    pieces = ours.decode_chunks(torch.randn(1, 16, 2, 4, 4))
    next(pieces)
    assert torch.backends.cudnn.benchmark is False
    list(pieces)
    ours.encode(torch.rand(1, 3, 5, 32, 32))
    assert (seen, torch.backends.cudnn.benchmark) == ({stopwatch}, False)


def test_channels_innermost_give_the_same_within_rounding():
    ours, theirs = pair(base_dim=8)
    autoencoder.with_channels_last(ours)
    latents = torch.randn(1, 16, 4, 6, 4)
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, rtol=1e-4, atol=1e-5)
    pixels = torch.rand(1, 3, 9, 48, 32)
    found, wanted = (vae.encode(pixels).latent_dist.mode() for vae in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
