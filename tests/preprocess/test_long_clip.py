"""A long 1080p clip: memory stays, progress is told, and the poses are those of the clip taken in pieces."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from runner.batch.memory_sampler import MemorySampler
from runner.demo.build import DETECTOR_FILE, POSE_FILE, stage_for
from runner.demo.dances import dance
from runner.demo.drawing import CHARACTERS, draw
from runner.demo.scenes import scene
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.video import Mp4Writer
from tests.system_tests import system_test

FPS, WIDTH, HEIGHT = 5, 1920, 1080
FRAME_BYTES = WIDTH * HEIGHT * 3


def write_dance(path: Path, seconds: int) -> None:
    """A puppet that dances at 1080p; nine seconds of it are drawn, and played to and fro."""
    stage, ground = stage_for(WIDTH, HEIGHT, "pip"), scene("studio", WIDTH, HEIGHT, seed=1)
    drawn = [
        draw(ground.copy(), dance("jacks", i / FPS, stage), stage.height, CHARACTERS["pip"]) for i in range(9 * FPS)
    ]
    with Mp4Writer(path, WIDTH, HEIGHT, Fraction(FPS), crf=23) as movie:
        for i in range(seconds * FPS):
            back = i % (2 * len(drawn) - 2)
            movie.write(drawn[min(back, 2 * len(drawn) - 2 - back)][None])


def check_long_clip(models: Path, folder: Path, seconds: int, pieces: int) -> None:
    write_dance(folder / "long.mp4", seconds)
    Image.new("RGB", (64, 96), "white").save(folder / "reference.png")
    preprocessor = Preprocessor.load(models / DETECTOR_FILE, models / POSE_FILE)

    def poses(**options: object) -> np.ndarray:
        wanted = JobOptions.model_validate({"fps": 5.0, "preprocess": {"detect_every": 1}, **options})
        conditions = preprocessor.prepare(folder / "reference.png", folder / "long.mp4", wanted)
        conditions.close()
        return conditions.track.points

    poses(max_frames=10)  # libraries loaded, buffers made
    with MemorySampler(interval_s=0.02) as sampler:
        memory = sampler.window()
        before = memory.rss_peak
        whole = poses()
        assert before is not None and memory.rss_peak is not None
        grown = memory.rss_peak - before
    assert len(whole) == seconds * 5
    assert grown < 60 * FRAME_BYTES, f"{grown / 2**20:.0f} MiB more at the peak, for {seconds * FPS} frames"
    step = seconds // pieces
    parts = [poses(start_s=float(i * step), max_frames=step * 5) for i in range(pieces)]
    sure = whole[..., 2] >= 0.5
    assert sure[:, :17].mean() > 0.9
    apart = np.linalg.norm(np.concatenate(parts)[..., :2] - whole[..., :2], axis=-1)
    assert apart[sure].max() < 0.5, np.argwhere(sure & (apart >= 0.5))[:10]


@system_test
def test_thirty_seconds(demo_models, tmp_path, monkeypatch):
    monkeypatch.setattr("runner.preprocess.poses.SAY_EVERY_S", 0.2)
    with capture_logs() as lines:
        check_long_clip(demo_models, tmp_path, seconds=30, pieces=3)
    told = [line["frames"] for line in lines if line["event"] == "preprocessing"]
    assert len(told) >= 3
    assert all(int(done) <= int(of) for done, of in (text.split("/") for text in told))


@pytest.mark.soak
def test_twenty_minutes(demo_models, tmp_path):
    check_long_clip(demo_models, tmp_path, seconds=1200, pieces=4)
