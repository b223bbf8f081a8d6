"""Run: what the flags say is what the engine is, and what its fingerprints know."""

from __future__ import annotations

import argparse

import pytest

from runner.cli import parser
from runner.spec.manifest import parse_manifest
from runner.verbs.run import build_engine

MANIFEST = "version: 1\nrecipe: fp32\njobs: [{id: a, reference: r.png, video: v.mp4}]\n"


@pytest.fixture
def flags(demo_models, tmp_path):
    """flags("--x", …): those of `run`, over the demo's models."""

    def parse(*extra: str) -> argparse.Namespace:
        command = ["run", "m.yaml", "--out", str(tmp_path / "out"), "--models", str(demo_models), "--device", "cpu"]
        return parser().parse_args([*command, "--cache", str(tmp_path / "cache"), *extra])

    return parse


def test_poses_of_another_precision_are_another_fingerprint(flags):
    """Not where nobody asked: what was rendered before the flag existed stays done."""
    manifest = parse_manifest(MANIFEST, base=".", source="m.yaml")
    plain, ours = (build_engine(flags(*extra), manifest).identity for extra in ((), ("--pose-precision", "int8")))
    assert {**plain, "pose_precision": "int8"} == ours
    assert build_engine(flags("--pose-precision", "fp32", "--tensorrt", "auto"), manifest).identity == plain
