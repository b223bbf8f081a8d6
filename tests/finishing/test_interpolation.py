"""Interpolation: counts and order for any split into segments, cuts, equal frames, resume; and jobs in the loop."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import InternalError, JobWeightsCorrupt, JobWeightsMissing
from runner.finishing import rife
from runner.finishing.interpolation import Interpolation, open_interpolation
from runner.finishing.stages import StageSettings, StageState, finish_segments, open_stages, split_states
from runner.generation.protocol import ClipInfo, ResumePoint, Segment
from runner.spec.options import JobOptions
from runner.timing import StageTimer
from runner.weights.store import RIFE
from tests.batch.loop_bench import SIGTERM, Bench, bench  # noqa: F401
from tests.finishing.tiny_rife import write_tiny_rife
from tests.stub_generator import StubGenerator

DOUBLED = {"interpolate": 2}


class Mean:
    """Instead of a network: the mean. Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        self.calls += 1
        return ((one.astype(np.uint16) + other) // 2).astype(np.uint8)


def scene(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (32, 32, 3), np.uint8)


def clip_of(*moments: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [n, 32, 32, 3]: of each (scene, brightness)."""
    return np.stack([scene(number) + np.uint8(light) for number, light in moments])


def in_segments(frames: np.ndarray, cuts: list[int]) -> list[Segment]:
    """`frames`, cut before those numbers; one number twice makes an empty segment."""
    parts = np.split(frames, sorted(cuts))
    return [
        Segment(index, part, part[:, ::2], ResumePoint(index + 1, {}, {"own": index}))
        for index, part in enumerate(parts)
    ]


def finished(segments: list[Segment], stage: Interpolation, states=None, total: int | None = None) -> list[Segment]:
    return list(finish_segments(segments, [stage], StageTimer(), total or len(segments), states))


def expected(frames: np.ndarray, *, pad_last: bool = False) -> np.ndarray:
    """By the text of the module's docstring, one pair at a time."""
    found = [frames[0]]
    for one, other in pairwise(frames):
        same_scene = np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1] > 0.5
        mean = ((one.astype(int) + other) // 2).astype(np.uint8)
        found += [mean if same_scene else one, other]
    return np.stack(found + ([frames[-1]] if pad_last else []))


moments = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=9)


@given(moments, st.lists(st.integers(0, 9), max_size=5), st.booleans())
def test_no_split_into_segments_changes_a_frame(given_moments, cuts, pad_last):
    frames = clip_of(*given_moments)
    segments = in_segments(frames, [min(cut, len(frames)) for cut in cuts])
    stage = Interpolation(Mean(), pad_last=pad_last)
    out = finished(segments, stage)
    made = np.concatenate([segment.frames for segment in out])
    assert np.array_equal(made, expected(frames, pad_last=pad_last))
    assert np.array_equal(made[: 2 * len(frames) - 1 : 2], frames)  # those that were generated, bit by bit
    clip = stage.clip_out(ClipInfo(len(frames), Fraction(30000, 1001), 32, 32, 1.5))
    assert clip == ClipInfo(len(made), Fraction(60000, 1001), 32, 32, 1.5)
    assert len(made) == 2 * len(frames) - (0 if pad_last else 1)
    counts = stage.report
    assert counts["interpolated"] + counts["copied"] + counts["cuts"] == len(frames) - 1
    assert [len(segment.pose) for segment in out] == [len(segment.frames) for segment in segments]


def test_equal_frames_and_cuts_need_no_network():
    network = Mean()
    stage = Interpolation(network, about={"network": "mean"})
    frames = clip_of((1, 0), (1, 0), (2, 0), (2, 20))
    (out,) = finished(in_segments(frames, []), stage)
    assert stage.report == {"network": "mean", "interpolated": 1, "copied": 1, "cuts": 1}
    assert network.calls == 1
    assert np.array_equal(out.frames[3], frames[1])  # the cut comes half a frame later


@given(moments, st.integers(1, 4), st.integers(1, 4))
def test_a_resumed_job_has_the_same_frames_and_counts(given_moments, count, at):
    frames = clip_of(*given_moments)
    segments = in_segments(frames, [min(len(frames), 2 * n) for n in range(1, count + 1)])
    at = min(at, len(segments) - 1)
    stage = Interpolation(Mean(), pad_last=True)
    whole = finished(segments, stage)
    kept = whole[at - 1].resume
    assert kept is not None
    own, states = split_states(replace(kept, values=json.loads(json.dumps(kept.values))))
    assert dict(own.values) == {"own": at - 1}
    again = Interpolation(Mean(), pad_last=True)
    rest = finished(segments[at:], again, states, total=len(segments))
    assert again.report == stage.report
    assert all(np.array_equal(one.frames, other.frames) for one, other in zip(whole[at:], rest, strict=True))


def test_another_state_is_refused():
    with pytest.raises(InternalError, match="has the values"):
        Interpolation(Mean()).restore(StageState({}, {"seen": 1}))


def test_little_is_kept_between_segments():
    stage = Interpolation(Mean())
    finished_frames = list(stage(Segment(0, clip_of((1, 0), (1, 9), (1, 20)))))
    (kept,) = stage.state().arrays.values()
    assert kept.base is None and kept.nbytes == 32 * 32 * 3 and len(finished_frames) == 1


# -- opened by a job --------------------------------------------------------------------------------------------------


def test_the_network_is_loaded_once_and_for_those_that_ask_alone(tmp_path, monkeypatch):
    loads = []
    write_tiny_rife(tmp_path)
    opened = rife.RifeInterpolator.open.__func__
    monkeypatch.setattr(
        rife.RifeInterpolator, "open", classmethod(lambda cls, *args: loads.append(args) or opened(cls, *args))
    )
    settings = StageSettings(tmp_path, "cpu")
    assert open_stages(JobOptions(), settings) == () and loads == []
    asked = JobOptions(output={"interpolate": 2})
    first, second = (open_interpolation(asked, settings) for _ in range(2))
    assert first is not None and second is not None and first is not second
    assert len(loads) == 1
    assert first.report["network"] == "rife-4.25" and first.report["device"] == "cpu"


def test_a_file_that_is_missing_or_damaged_is_the_job_s_failure(tmp_path):
    asked = JobOptions(output={"interpolate": 2})
    with pytest.raises(JobWeightsMissing):
        open_interpolation(asked, StageSettings(tmp_path, "cpu"))
    with pytest.raises(JobWeightsMissing, match="--models"):
        open_interpolation(asked, StageSettings(None, "cpu"))
    path = write_tiny_rife(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JobWeightsCorrupt):
        open_interpolation(asked, StageSettings(tmp_path, "cpu"))


# -- in the loop ------------------------------------------------------------------------------------------------------


def video(path) -> tuple[Fraction, int]:
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate, sum(1 for _ in container.decode(video=0))


def test_jobs_with_and_without_it_in_one_run(bench):  # noqa: F811
    bench.models = bench.folder / "models"
    write_tiny_rife(bench.models)
    jobs = [
        bench.job("plain"),
        bench.job("double", output=DOUBLED),
        bench.job("padded", output=DOUBLED | {"pad_last": True}),
    ]
    assert bench.run(*jobs) == 0
    frames = {name: bench.result(name)["output"]["frames"] for name in ("plain", "double", "padded")}
    assert frames == {"plain": 6, "double": 11, "padded": 12}
    digests = {name: (bench.folder / f"out/jobs/{name}/frames.sha256").read_text().split() for name in frames}
    assert digests["double"][::2] == digests["plain"]  # the generated frames
    assert digests["padded"][:-1] == digests["double"] and digests["padded"][-1] == digests["plain"][-1]
    for name, times in (("plain", 1), ("double", 2), ("padded", 2)):
        record, folder = bench.result(name), bench.folder / "out/jobs" / name
        assert (record["output"]["fps"], record["output"]["generated_fps"]) == (str(8 * times), "8")
        assert video(folder / "output.mp4") == (8 * times, frames[name])
        assert video(folder / "pose.mp4") == (8, 6)
        assert record["efficiency"]["frames_requested"] == 6
        assert ("interpolate" in record["timings_s"]) == (times == 2)
    record = bench.result("double")
    report = record["finishing"]["interpolate"]
    assert report["interpolated"] + report["copied"] + report["cuts"] == 5 and report["interpolated"] > 0
    assert record["gpu_s"] >= round(record["timings_s"]["interpolate"], 3) > 0
    assert bench.result("plain")["finishing"] == {}
    assert json.loads((bench.folder / "out/jobs/double/people.json").read_bytes())["fps"] == "8"


class StopsAt(StubGenerator):
    """Told to stop, twice, when it has generated three segments: the running job is given up at once."""

    def __init__(self, bench: Bench) -> None:  # noqa: F811
        super().__init__(frames=18, segments=6)
        self.bench = bench

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        def step(done: int, total: int) -> None:
            if done > 3 * plan.steps:
                self.bench.stop.request(SIGTERM)
                self.bench.stop.request(SIGTERM)
            if on_step is not None:
                on_step(done, total)

        return super().generate(conditions, plan, timer, step, start)


@pytest.mark.parametrize("format", ["mp4", "png"])
def test_a_job_that_was_stopped_goes_on_and_its_files_are_the_same(bench, tmp_path, format):  # noqa: F811
    output = DOUBLED | {"format": format, "pad_last": True}

    def published(folder) -> dict[str, bytes]:
        job = folder / "out/jobs/a"
        files = [path for path in job.rglob("*") if path.is_file() and path.name != "result.json"]
        return {path.name: path.read_bytes() for path in files}

    alone = Bench(tmp_path / "alone")
    alone.generator = StubGenerator(frames=18, segments=6)
    for each in (alone, bench):
        each.models = each.folder / "models"
        write_tiny_rife(each.models)
    assert alone.run(alone.job("a", output=output)) == 0
    bench.generator = StopsAt(bench)
    assert bench.run(bench.job("a", output=output)) == 143
    bench.stop = type(bench.stop)()
    bench.generator = StubGenerator(frames=18, segments=6)
    assert bench.run(bench.job("a", output=output), run_id="r2") == 0
    assert bench.generator.started_at == [3]
    assert published(bench.folder) == published(alone.folder)
    assert bench.result("a")["finishing"] == alone.result("a")["finishing"]
    assert bench.result("a")["output"]["frames"] == 36


def test_without_the_file_that_job_alone_fails(bench):  # noqa: F811
    bench.models = bench.folder / "models"
    bench.models.mkdir()
    assert bench.run(bench.job("double", output=DOUBLED), bench.job("plain")) == 1
    assert bench.result("plain")["status"] == "succeeded"
    error = bench.result("double")["error"]
    assert error["code"] == "weights.missing" and not (bench.models / RIFE).exists()
