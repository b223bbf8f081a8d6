"""RIFE: the network against an independent statement of it, its warp against numpy, its frames against a real clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from runner.errors import InternalError, NotFinite, OutOfMemory
from runner.finishing.rife import RifeInterpolator, RifeNetwork, warp
from runner.video import VideoReader
from runner.weights.store import RIFE
from tests.finishing.published_rife import rife_store, rife_wheel  # noqa: F401
from tests.finishing.tiny_rife import tiny_network, write_tiny_rife
from tests.system_tests import system_test


def smooth_picture(seed: int, height: int, width: int) -> torch.Tensor:
    """[1, 3, H, W] of 0 to 1, without detail finer than 16 pixels: a small error of a flow stays a small one."""
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


# -- the published formula: everything at the frames' own size, each picture drawn along its flow by itself -----------


def numpy_warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """[C, H, W] along [2, H, W], in float64: four neighbours, places clamped to the picture."""
    height, width = picture.shape[1:]
    x = np.clip(np.arange(width) + flow[0].astype(np.float64), 0, width - 1)
    y = np.clip(np.arange(height)[:, None] + flow[1].astype(np.float64), 0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = x - left, y - top
    upper = picture[:, top, left] * (1 - fx) + picture[:, top, right] * fx
    lower = picture[:, below, left] * (1 - fx) + picture[:, below, right] * fx
    return upper * (1 - fy) + lower * fy


def torch_warp(picture: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy_warp(picture[0].numpy(), flow[0].numpy())).float()[None]


def published(weights: dict[str, torch.Tensor], one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Halfway from `one` to `other`, of tensors by their published names."""

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, 1)

    def deconv(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1)

    def relu(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    def features(x: torch.Tensor) -> torch.Tensor:
        x = relu(conv("encode.cnn0", x, 2))
        return deconv("encode.cnn3", relu(conv("encode.cnn2", relu(conv("encode.cnn1", x)))))

    def block(number: int, x: torch.Tensor) -> torch.Tensor:
        name = f"block{number}"
        x = relu(conv(f"{name}.conv0.1.0", relu(conv(f"{name}.conv0.0.0", x, 2)), 2))
        for each in range(8):
            x = relu(conv(f"{name}.convblock.{each}.conv", x) * weights[f"{name}.convblock.{each}.beta"] + x)
        return F.pixel_shuffle(deconv(f"{name}.lastconv.0", x), 2)

    def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    f0, f1, middle = features(one), features(other), torch.full_like(one[:, :1], 0.5)
    warped = [one, other, f0, f1]
    flow = mask = told = None
    for number, scale in enumerate((16, 8, 4, 2, 1)):
        if flow is None or mask is None or told is None:
            x = scaled(torch.cat([*warped, middle], 1), 1 / scale)
        else:
            x = scaled(torch.cat([*warped, middle, mask, told], 1), 1 / scale)
            x = torch.cat([x, scaled(flow, 1 / scale) / scale], 1)
        made = scaled(block(number, x), scale)
        flow = made[:, :4] * scale + (0 if flow is None else flow)
        mask, told = made[:, 4:5], made[:, 5:]
        ways = (flow[:, :2], flow[:, 2:], flow[:, :2], flow[:, 2:])
        warped = [torch_warp(picture, way) for picture, way in zip((one, other, f0, f1), ways, strict=True)]
    assert mask is not None
    share = torch.sigmoid(mask)
    return warped[0] * share + warped[1] * (1 - share)


# -- the network ------------------------------------------------------------------------------------------------------


def test_warp_along_flow_agrees_with_numpy():
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 4, 24, 40, generator=generator)
    flow = (torch.rand(1, 2, 24, 40, generator=generator) - 0.5) * 30  # many places lie outside
    found = warp(picture, flow)
    assert torch.allclose(found, torch_warp(picture, flow), atol=2e-5)
    shifted = warp(picture, torch.tensor([3.0, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 24, 40))
    assert torch.allclose(shifted[0, :, 2:, :-3], picture[0, :, :-2, 3:], atol=1e-5)


@pytest.mark.parametrize("seed", [5, 6])
def test_rife_network_agrees_with_published_formula(seed):
    network = tiny_network(seed)
    one, other = smooth_picture(1, 64, 128), smooth_picture(2, 64, 128)
    with torch.no_grad():
        found, wanted = network(one, other), published(network.state_dict(), one, other)
    assert torch.allclose(found, wanted, atol=2e-4)
    assert (found - (one + other) / 2).abs().max() > 0.1  # no mere average


def test_rife_interpolator_pads_and_cuts_frames_of_any_size():
    interpolator = RifeInterpolator(tiny_network())
    one, other = ((smooth_picture(i, 64, 64)[0] * 255).byte().permute(1, 2, 0).numpy() for i in (1, 2))
    whole = interpolator.between(one, other)
    assert whole.shape == (64, 64, 3) and whole.dtype == np.uint8
    assert np.array_equal(whole, interpolator.between(one, other))
    black = [np.zeros((64, 64, 3), np.uint8) for _ in range(2)]
    for frame, full in zip((one, other), black, strict=True):
        full[:50, :34] = frame[:50, :34]
    cut = interpolator.between(one[:50, :34], other[:50, :34])
    assert cut.shape == (50, 34, 3)
    assert np.array_equal(cut, interpolator.between(*black)[:50, :34])
    with pytest.raises(InternalError, match="cannot interpolate between"):
        interpolator.between(one, other[:50])


def test_rife_interpolator_with_nan_output_is_not_finite():
    network = tiny_network()
    network.block4.lastconv[0].bias.fill_(float("nan"))
    frame = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(NotFinite, match="convert_rife"):
        RifeInterpolator(network).between(frame, frame + 9)


def test_rife_interpolator_on_full_device_is_out_of_memory(monkeypatch):
    interpolator = RifeInterpolator(tiny_network())

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(RifeNetwork, "forward", full)
    frame = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(OutOfMemory, match="interpolating between frames of 64x48"):
        interpolator.between(frame, frame)


# -- its file ---------------------------------------------------------------------------------------------------------


def test_rife_interpolator_open_reads_widths_from_file(tmp_path: Path):
    path = write_tiny_rife(tmp_path)
    one, other = ((smooth_picture(i, 64, 64)[0] * 255).byte().permute(1, 2, 0).numpy() for i in (1, 2))
    expected = RifeInterpolator(tiny_network()).between(one, other)
    assert np.array_equal(RifeInterpolator.open(path).between(one, other), expected)


# -- on film ----------------------------------------------------------------------------------------------------------


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


@system_test
def test_rife_interpolator_rebuilds_odd_frames_of_real_clip(real_data, rife_store):  # noqa: F811
    """Every third triple of the clip's frames is tested: 18 of 54."""
    interpolator = RifeInterpolator.open(rife_store / RIFE)
    with VideoReader(real_data / "man_480x480_30fps_110f.mp4") as reader:
        frames = list(reader.read(np.arange(reader.info.frames)))
    triples = [frames[at : at + 3] for at in range(0, 108, 6)]
    made = [psnr(interpolator.between(one, other), middle) for one, middle, other in triples]
    means = [psnr(np.round((one.astype(np.float64) + other) / 2), middle) for one, middle, other in triples]
    assert len(triples) == 18
    assert np.mean(made) >= 35
    assert np.mean(made) >= np.mean(means) + 4


@system_test
def test_published_rife_weights_agree_with_published_formula(real_data, rife_store):  # noqa: F811
    weights = load_file(rife_store / RIFE)
    network = RifeNetwork()
    network.load_state_dict(weights)
    with VideoReader(real_data / "man_480x480_30fps_110f.mp4") as reader:
        one, other = (
            torch.from_numpy(frame[:448, :448].copy()).permute(2, 0, 1)[None] / 255
            for frame in reader.read(np.array([20, 22]))
        )
    with torch.no_grad():
        assert torch.allclose(network(one, other), published(weights, one, other), atol=5e-4)
