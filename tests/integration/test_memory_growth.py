"""Memory does not grow with the clip: a 2,000-frame clip may take 300 MB more than a 200-frame one.

Each length runs in a process of its own, so that the peak is its own. The detector, the pose model, the drawing, the
loop and the encoder are the real ones; in `make test` the generator hands on the skeletons instead of denoising, which
would take minutes on a CPU. The long test (`make soak`) denoises.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.finishing.tiny_rife import write_tiny_rife
from tests.system_tests import system_test

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300 * 2**20

SCRIPT = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    from runner.batch.job_source import ShardJobs
    from runner.batch.loop import Batch, Engine
    from runner.records.events import EventLog
    from runner.generation.protocol import ClipInfo, Generator, Segment
    from runner.generation.wan_animate.generator import AnimateConditions
    from runner.generation.segments import plan_job
    from runner.spec.recipes import get_recipe
    from runner.weights.store import ModelStore
    from runner.batch.ledger import Ledger
    from runner.spec.manifest import load_manifest
    from runner.batch.memory_sampler import MemorySampler
    from runner.preprocess.prepare import Preprocessor
    from runner.batch.progress import SilentProgress
    from runner.batch.stop import Stop
    from runner.storage import open_storage
    from runner.batch.summary import SummaryWriter

    models, manifest, folder = map(Path, sys.argv[1:])
    store, recipe = ModelStore(models), get_recipe("fp32")

    class Skeletons(Generator):
        identity, description, probe, resume_identity = {}, {}, None, {}

        def __init__(self):
            self.preprocessor = Preprocessor.load(store.detector, store.pose)

        def plan(self, frames, size, options):
            return plan_job(frames, size, options, recipe)

        def prepare(self, request, timer):
            source = self.preprocessor.prepare(request.reference, request.video, request.options, timer=timer)
            clip = ClipInfo(source.frames, source.fps, source.width, source.height, source.start_s)
            return AnimateConditions(source, clip, request.prompt, request.options)

        def generate(self, conditions, plan, timer, on_step=None, start=None):
            step = plan.segment_frames - plan.overlap_frames
            for index, start in enumerate(range(0, plan.frames, step)):
                window = conditions.window(start, min(start + step, plan.frames))
                yield Segment(index, window.pose, window.pose)

        def close(self):
            pass

    jobs = load_manifest(str(manifest)).jobs
    out = open_storage(folder / "out")
    summary = SummaryWriter(out, run_id="r", shard="s", shard_reason="", manifest="", recipe="", job_ids=["long"])
    engine, events = Engine("none", {}, Skeletons), EventLog(quiet=True)
    code = Batch(ShardJobs(jobs), engine, out, Ledger(out), summary, events, stop=Stop(),
                 scratch=folder / "scratch", progress=SilentProgress(), sampler=MemorySampler()).run()
    print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
""")


def long_dance(path: Path, frames: int) -> None:
    """A puppet dancing at 640x360, 30 fps: 0.7 MB a frame in pixels."""
    from fractions import Fraction

    from runner.demo.build import stage_for
    from runner.demo.dances import dance
    from runner.demo.drawing import CHARACTERS, draw
    from runner.demo.scenes import scene
    from runner.video import Mp4Writer

    backdrop, stage = scene("studio", 640, 360, 0), stage_for(640, 360, "pip")
    with Mp4Writer(path, 640, 360, Fraction(30), crf=30) as movie:
        drawn = [
            draw(backdrop.copy(), dance("jacks", i / 30, stage), stage.height, CHARACTERS["pip"]) for i in range(150)
        ]
        for index in range(frames):  # to and fro, so that nothing jumps
            back = index % (2 * len(drawn) - 2)
            movie.write(drawn[min(back, 2 * len(drawn) - 2 - back)][None])


def manifest_of(folder: Path, reference: Path, frames: int, **options: object) -> Path:
    long_dance(folder / "long.mp4", frames)
    settings = {"fps": 30, "size": "320x176", "preprocess": {"detect_every": 15}} | options
    job = {"id": "long", "reference": str(reference), "video": "long.mp4", "options": settings}
    (folder / "m.jsonl").write_text(json.dumps(job) + "\n")
    return folder / "m.jsonl"


@system_test
def test_a_long_clip_takes_no_more_memory(tmp_path, demo_models, demo_media):
    peaks = {}
    for frames in (200, 2000):
        folder = tmp_path / str(frames)
        folder.mkdir()
        manifest = manifest_of(folder, demo_media / "references/anna.png", frames)
        command = [sys.executable, "-c", SCRIPT, str(demo_models), str(manifest), str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        code, peak = done.stdout.split()[-2:]  # behind what was logged
        assert int(code) == 0, done.stderr
        peaks[frames] = int(peak)
        record = json.loads((folder / "out/jobs/long/result.json").read_text())
        assert record["output"]["frames"] == frames
        assert record["preprocess"]["frames_without_person"] == 0
    print(f"peak RSS: {peaks[200] / 2**20:.0f} MiB for 200 frames, {peaks[2000] / 2**20:.0f} MiB for 2,000")
    assert peaks[2000] - peaks[200] < LIMIT, peaks


@pytest.mark.soak
@pytest.mark.parametrize(("colour", "interpolate"), [("off", 1), ("anchor", 2)])
def test_a_long_clip_takes_no_more_memory_when_denoised(tmp_path, demo_models, demo_media, colour, interpolate):
    peaks, store = {}, tmp_path / "models"
    shutil.copytree(demo_models, store)
    write_tiny_rife(store)
    options = {"size": "64x96", "steps": 1, "colour": colour, "output": {"interpolate": interpolate}}
    for frames in (200, 2000):
        folder = tmp_path / str(frames)
        folder.mkdir()
        manifest = manifest_of(folder, demo_media / "references/anna.png", frames, **options)
        script = (
            "import resource, sys; from runner.cli import main; code = main(sys.argv[1:]);"
            "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
        )
        command = [sys.executable, "-c", script, "run", str(manifest), "--out", str(folder / "out")]
        command += ["--models", str(store), "--cache", str(folder / "cache"), "--recipe", "fp32"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        code, peak = done.stderr.split()[-2:]
        assert int(code) == 0, done.stderr
        peaks[frames] = int(peak)
        record = json.loads((folder / "out/jobs/long/result.json").read_text())
        drift, made = record["drift"], record["output"]["frames"]
        assert (drift["colour"], len(drift["segments"])) == (colour, -(-(frames - 1) // 80))
        assert made == interpolate * frames - (interpolate - 1)
    print(f"peak RSS: {peaks[200] / 2**20:.0f} MiB for 200 frames, {peaks[2000] / 2**20:.0f} MiB for 2,000")
    assert peaks[2000] - peaks[200] < LIMIT, peaks
