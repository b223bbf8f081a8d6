"""Added deltas: factors of several LoRAs in one pair, and what does not fit a layer."""

from __future__ import annotations

import pytest
import torch

from runner.quantization.added_deltas import check_bias_delta, frozen, join_deltas

CPU = torch.device("cpu")


def test_joined_factors_are_the_sum_of_all():
    torch.manual_seed(0)
    deltas = [(torch.randn(rank, 6), torch.randn(5, rank), scale) for rank, scale in [(2, 0.5), (3, -1.25)]]
    down, up, scale = join_deltas(deltas, 6, 5, CPU)
    assert (tuple(down.shape), tuple(up.shape)) == ((5, 6), (5, 5))
    assert scale.tolist() == [0.5, 0.5, -1.25, -1.25, -1.25]
    torch.testing.assert_close((up * scale) @ down, sum(s * b @ a for a, b, s in deltas))


@pytest.mark.parametrize(("down", "up"), [((2, 7), (5, 2)), ((2, 6), (4, 2)), ((2, 6), (5, 3))])
def test_factors_that_do_not_fit_are_refused_with_both_shapes(down, up):
    with pytest.raises(ValueError, match=r"do not fit a weight of \[5, 6\]") as caught:
        join_deltas([(torch.zeros(down), torch.zeros(up), 1.0)], 6, 5, CPU)
    assert str(down) in str(caught.value) and str(up) in str(caught.value)


def test_a_bias_delta_has_the_outputs_width():
    check_bias_delta(None, 5)
    check_bias_delta(torch.zeros(5), 5)
    with pytest.raises(ValueError, match=r"\(4,\) does not fit 5 outputs"):
        check_bias_delta(torch.zeros(4), 5)


def test_a_frozen_parameter_shares_memory_and_takes_no_gradient():
    tensor = torch.ones(3, requires_grad=True)
    parameter = frozen(tensor)
    assert parameter.data_ptr() == tensor.data_ptr() and not parameter.requires_grad
