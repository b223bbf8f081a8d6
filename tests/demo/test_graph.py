"""Graph: what is written runs as numpy says, and the same code gives the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from runner.demo.graph import Graph, colour_response
from runner.errors import ConfigInvalid
from tests.demo.conftest import open_session


def test_colour_response_is_its_formula(tmp_path: Path) -> None:
    colours, reach = np.array([[1, 0, 0], [0.5, 0.5, 1]], np.float32), 0.6
    graph = Graph("response", "picture", [1, 3, 8, 9])
    graph.save(tmp_path / "g.onnx", colour_response(graph, "picture", colours, reach), "out", [1, 2, 8, 9])
    picture = np.random.default_rng(0).random((1, 3, 8, 9), np.float32)
    distance = np.linalg.norm(picture[:, None] - colours[None, :, :, None, None], axis=2)
    expected = np.maximum(0, 1 - distance**2 / reach**2)
    assert (expected > 0).any()
    np.testing.assert_allclose(open_session(tmp_path / "g.onnx")(picture), expected, atol=1e-5)


def test_comparisons_pools_and_several_results(tmp_path: Path) -> None:
    graph = Graph("mixed", "x", [1, 1, 4, 4])
    dense = graph.neighbourhood("MaxPool", "x", 3)
    peak = graph("Mul", graph.equal("x", dense), graph.greater("x", 0.5))
    left, right = graph.several("Split", 2, graph("Add", peak, graph("Mul", dense, 10.0)), axis=3)
    coarse = graph.cells("AveragePool", graph("Concat", right, left, axis=3), 2)
    graph.save(tmp_path / "g.onnx", coarse, "out", [1, 1, 2, 2])
    x = np.zeros((1, 1, 4, 4), np.float32)
    x[0, 0, 0, 0], x[0, 0, 3, 3] = 0.75, 0.25
    # By hand. dense: 0.75 on the upper left 2x2, 0.25 on the lower right 2x2. equal: also the flat zeros of the two
    # other corners, but only x[0, 0] = 0.75 is above 0.5. Cell means: (4 * 7.5 + 1) / 4 upper left, 2.5 lower right;
    # then left and right are swapped.
    np.testing.assert_allclose(open_session(tmp_path / "g.onnx")(x)[0, 0], [[0, 7.75], [2.5, 0]], atol=1e-6)


def test_a_graph_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    graph = Graph("wrong", "x", [1, 3])
    with pytest.raises(Exception, match=r"(?i)shape|dim"):
        graph.save(tmp_path / "g.onnx", graph("Add", "x", np.ones((2, 2))), "out", [1, 3])
    assert not (tmp_path / "g.onnx").exists()


def test_without_onnx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigInvalid, match=r"video-lab-runner\[demo\]"):
        Graph("none", "x", [1])
