"""What a user does with the GPU image's packages on a machine without a GPU: the frames, and what `doctor` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from tests.gpu_env.known_torch import needs_gpu_env

pytestmark = needs_gpu_env

ROOT = Path(__file__).resolve().parents[2]
CPU_PYTHON = ROOT / ".venv" / "bin" / "python"


def video_lab(python: Path | str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [str(python), "-m", "runner.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def frames_of(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.skipif(not CPU_PYTHON.exists(), reason=".venv is not there: `make setup`")
def test_frames_of_gpu_image_equal_those_of_cpu_build(tmp_path, demo_models, demo_media):
    """Two segments of animate and one of replace in FP4: digests in the record and decoded frames, bit for bit."""
    pair = {
        "reference": str(demo_media / "references" / "mira.png"),
        "video": str(demo_media / "dances" / "wave.mp4"),
    }
    manifest = tmp_path / "m.yaml"
    jobs = [
        {"id": "animated", **pair, "options": {"max_frames": 17, "max_segment_frames": 9}},
        {"id": "replaced", **pair, "options": {"max_frames": 5, "mode": "replace"}},
    ]
    text = {
        "version": 1,
        "defaults": {"prompt": "a person is dancing", "options": {"size": "64x96", "fps": 8, "steps": 2, "seed": 3}},
        "jobs": jobs,
    }
    manifest.write_text(yaml.safe_dump(text), encoding="utf-8")
    found = {}
    for name, python in (("cpu", CPU_PYTHON), ("gpu", Path(sys.executable))):
        out = tmp_path / name
        video_lab(python, "run", str(manifest), "--out", str(out), "--models", str(demo_models))
        for job in ("animated", "replaced"):
            folder = out / "jobs" / job
            record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            found[name, job] = record, frames_of(folder / "output.mp4")
    for job, count in (("animated", 17), ("replaced", 5)):
        (cpu, cpu_frames), (gpu, gpu_frames) = found["cpu", job], found["gpu", job]
        assert len(cpu_frames) == len(gpu_frames) == count
        assert all(np.array_equal(one, other) for one, other in zip(cpu_frames, gpu_frames, strict=True))
        assert max(float(frame.std()) for frame in gpu_frames) > 1  # pictures, no plain colour
        assert digests(cpu) == digests(gpu) != []


def digests(record: dict) -> list[str]:
    """Of the frames before they were encoded."""
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += digests(value)
        elif key == "frames_sha256":
            found.append(value)
    return found


def test_doctor_without_driver_warns_and_exits_0(demo_models):
    """torch is built for CUDA and finds no GPU: a warning that says what to do, and exit code 0, as the demo runs."""
    said = video_lab(sys.executable, "doctor", "--models", str(demo_models)).splitlines()
    rows = {row.split("  ")[0]: row for row in said}
    assert "built for CUDA" in rows["torch"]
    for name, found, todo in (
        ("driver", "no NVIDIA driver was found", "Install the NVIDIA driver"),
        ("gpu", "torch finds no GPU", "The CPU is enough for the demo"),
    ):
        assert rows[name].split()[1] == "warn"
        assert found in rows[name]
        assert todo in rows[name]
    assert "onnxruntime-gpu" in rows["onnxruntime"]
    assert "CPUExecutionProvider" in rows["providers"]
