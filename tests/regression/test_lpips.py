"""LPIPS against its formula in plain numpy and scipy, on random weights; what is no such file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.regression.lpips import LPIPS_SHAPES, Lpips

STRIDES, PADDINGS = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in LPIPS_SHAPES.items():
        values = random.standard_normal(shape).astype(np.float32)
        if name.startswith("head"):
            values = np.abs(values)
        made[name] = values / np.float32(np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 10)
    return made


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights()


@pytest.fixture(scope="module")
def network(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    path = tmp_path_factory.mktemp("metrics") / "lpips-alex.safetensors"
    save_file(weights, path)
    return Lpips.open(path)


def convolved(picture: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """[C, h, w] by the definition: correlation with zeros around; then every `stride`-th place."""
    from scipy.signal import correlate

    padded = np.pad(picture, ((0, 0), (padding, padding), (padding, padding)))
    rows = [correlate(padded, kernel, mode="valid")[0] for kernel in weight]
    return np.stack(rows)[:, ::stride, ::stride] + bias[:, None, None]


def pooled(picture: np.ndarray) -> np.ndarray:
    views = np.lib.stride_tricks.sliding_window_view(picture, (3, 3), (1, 2))
    return views[:, ::2, ::2].max((-1, -2))


def by_the_formula(weights: dict[str, np.ndarray], one: np.ndarray, other: np.ndarray) -> float:
    total, features = 0.0, []
    for picture in (one, other):
        x = picture.transpose(2, 0, 1) / 127.5 - 1
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        found = []
        for i in range(5):
            x = pooled(x) if i in (1, 2) else x
            x = np.maximum(
                convolved(x, weights[f"conv{i + 1}.weight"], weights[f"conv{i + 1}.bias"], STRIDES[i], PADDINGS[i]), 0
            )
            found.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
        features.append(found)
    for i, (a, b) in enumerate(zip(*features, strict=True)):
        total += float(((a - b) ** 2 * weights[f"head{i + 1}"][:, None, None]).sum(0).mean())
    return total


def test_lpips_distance_matches_formula(weights: dict[str, np.ndarray], network: Lpips) -> None:
    random = np.random.default_rng(1)
    one = random.integers(0, 256, (64, 70, 3), np.uint8)
    other = np.clip(one.astype(int) + random.integers(-60, 60, one.shape), 0, 255).astype(np.uint8)
    expected = by_the_formula(weights, one, other)
    assert expected > 0.01
    assert network.distance(one, other) == pytest.approx(expected, rel=2e-4)
    assert network.distance(other, one) == pytest.approx(expected, rel=2e-4)
    assert network.distance(one, one) == 0


def test_lpips_distance_of_unequal_or_small_pictures_raises(network: Lpips) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    for wrong in (np.zeros((64, 65, 3), np.uint8), np.zeros((64, 64), np.uint8)):
        with pytest.raises(ValueError, match="64 pixels"):
            network.distance(picture, wrong)
    with pytest.raises(ValueError, match="64 pixels"):
        network.distance(picture[:63], picture[:63])


def test_lpips_open_of_missing_or_other_file_is_refused(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "lpips-alex.safetensors"
    with pytest.raises(WeightsMissing):
        Lpips.open(path)
    for change, message in (
        ({"head3": None}, "head3 is missing"),
        ({"conv2.bias": np.zeros(191, np.float32)}, r"conv2.bias has shape \(191,\), not \(192,\)"),
        ({"conv6.bias": np.zeros(3, np.float32)}, "conv6.bias"),
    ):
        save_file({n: a for n, a in (weights | change).items() if a is not None}, path)
        with pytest.raises(WeightsCorrupt, match=message):
            Lpips.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsCorrupt):
        Lpips.open(path)
    with pytest.raises(WeightsCorrupt):
        Lpips({"head1": torch.zeros(64)})
