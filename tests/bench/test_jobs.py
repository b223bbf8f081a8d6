from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from tests.bench.run_bench import ROOT


def test_jobs(tmp_path, monkeypatch, capsys):
    """In this process, whose imports are paid for; frames that differ between its rows would end it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_jobs", ROOT / "bench" / "jobs.py")
    assert spec is not None and spec.loader is not None
    jobs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_jobs", jobs)
    spec.loader.exec_module(jobs)

    threads = torch.get_num_threads()
    try:
        assert jobs.main(["--quick", "--json", str(tmp_path / "jobs.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    found, printed = json.loads((tmp_path / "jobs.json").read_text()), capsys.readouterr().out
    assert found["encoded"] == {"prompt": 1, "clip": 2, "reference": 2, "blank": 1, "pose_latents": 2}
    assert set(found["looked_up"].values()) == {found["jobs"]}
    assert found["encoder_loads"] == {"text_encoder": 1, "image_encoder": 1}
    assert found["library_ratio"] == pytest.approx(found["library_s"] / found["after_s"], abs=0.01)
    assert found["ratio"] is None and "not measured" in printed  # the process a job is left to the whole run
