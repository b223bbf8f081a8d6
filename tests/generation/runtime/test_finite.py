from __future__ import annotations

import pytest
import torch

from runner.errors import NotFinite
from runner.generation.runtime.finite import FiniteChecks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_values_of_any_size_pass(dtype):
    checks = FiniteChecks()
    checks.add("denoise", "the latents", torch.full((2, 3, 4), torch.finfo(dtype).max, dtype=dtype))
    checks.add("denoise", "the latents", torch.full((5,), torch.finfo(dtype).min, dtype=dtype))
    checks.add_frames("vae_decode", torch.full((1, 3, 4, 5, 6), torch.finfo(dtype).max, dtype=dtype), 0)
    checks.read()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_is_found_wherever_it_lies(dtype, bad):
    for at in range(12):
        values = torch.zeros(12, dtype=dtype)
        values[at] = bad
        checks = FiniteChecks()
        checks.add("encode_reference", "the reference's latents", values.view(3, 4))
        with pytest.raises(NotFinite, match="encode_reference: NaN or infinity in the reference's latents"):
            checks.read()


@pytest.mark.parametrize("bad", BAD)
def test_the_first_frame_is_named_by_its_place_in_the_output(bad):
    frames = torch.zeros(1, 3, 4, 5, 6)
    frames[0, 2, 3, 4, 5] = frames[0, 0, 2, 0, 0] = bad
    checks = FiniteChecks()
    checks.add_frames("vae_decode", torch.zeros(1, 3, 1, 5, 6), 77)
    checks.add_frames("vae_decode", frames.contiguous(memory_format=torch.channels_last_3d), 78)
    with pytest.raises(NotFinite, match="vae_decode: NaN or infinity in output frame 80,"):
        checks.read()


def test_the_earliest_stage_is_named_and_nothing_is_left_for_the_next_segment():
    checks = FiniteChecks()
    for step in (1, 2, 3):
        checks.add("denoise", f"step {step}", torch.tensor([0.0, float("nan") if step > 1 else 1.0]))
    checks.add_frames("vae_decode", torch.full((1, 3, 1, 2, 2), float("nan")), 0)
    with pytest.raises(NotFinite, match="denoise: NaN or infinity in step 2,") as caught:
        checks.read()
    assert (caught.value.code, caught.value.exit_code) == ("output.not_finite", 1)
    assert not caught.value.retryable
    assert not caught.value.stops_run
    assert "weights verify" in caught.value.message
    checks.read()
