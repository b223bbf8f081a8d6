"""Nights: what is kept of a night, which are the last, and the limits that they suggest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import InputUnreadable, StorageConflict
from runner.records.record import Efficiency, MemoryRecord
from runner.regression.findings import Drift, FrameValues, Identity, JobFinding, Measurements
from runner.regression.nights import (
    ACCEPTED,
    Night,
    NightJob,
    collect_nights,
    last_nights,
    record_night,
    suggest_limits,
    summarize_job,
)
from runner.storage import LocalStorage, Storage, open_storage
from tests.regression.night_stores import HookedStorage, make_record
from tests.s3_servers import FaultyServer

MEASURED = Measurements(
    frames_baseline=3,
    frames_new=3,
    frames_compared=3,
    psnr=FrameValues(mean=45.0, p5=42.0, worst=41.0, worst_frame=2),
    ssim=FrameValues(mean=0.999, p5=0.99, worst=0.98, worst_frame=2),
    largest_difference=17,
    drift=Drift(joint_drift=0.25),
    identity=Identity(cosine=0.97),
)


def make_night(run: int, jobs: dict[str, NightJob] | None = None, **more: Any) -> Night:
    values = {
        "run_id": f"run{run}",
        "made_at": f"2026-01-{run:02d}T02:00:00.000+00:00",
        "device": "cpu",
        "recipe": "bf16",
        "jobs": {"a": NightJob(verdict="identical")} if jobs is None else jobs,
    }
    return Night.model_validate(values | more)


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return LocalStorage(tmp_path / "baseline")
    server = request.getfixturevalue("moto_s3")
    request.getfixturevalue("aws_env")(server)
    return open_storage(f"s3://{server.make_bucket()}/baseline")


def test_summarize_job_has_values_of_record_and_finding():
    efficiency = Efficiency(
        frames_requested=33,
        frames_denoised=34,
        segments=2,
        segment_frames=17,
        padding_fraction=0,
        overlap_fraction=0,
        tflop=1.0,
    )
    memory = MemoryRecord(
        stages={"denoise": {"allocated": 5, "reserved": 9}}, process_gpu_peak_bytes=11, host_rss_peak_bytes=7
    )
    record = make_record(
        timings_s={"denoise": 2.5},
        steps_s=[1.0, 1.5],
        memory=memory,
        caches={"pose_cache_hits": 1},
        efficiency=efficiency,
    )
    finding = JobFinding(id="a", verdict="changed", text="", measurements=MEASURED)
    assert summarize_job(record, finding) == NightJob(
        verdict="changed",
        work="34 frames in 2 segments, of 17, 2 evaluations",
        seconds={"denoise": 2.5},
        memory={"denoise allocated": 5, "GPU of the process": 11, "host": 7},
        caches={"pose_cache_hits": 1},
        psnr_worst=41.0,
        ssim_worst=0.98,
        largest_difference=17,
        joint_drift=0.25,
        cosine=0.97,
    )
    same = summarize_job(record, JobFinding(id="a", verdict="identical", text=""))
    assert (same.psnr_worst, same.ssim_worst, same.largest_difference, same.joint_drift) == (100.0, 1.0, 0, 0.0)
    assert same.cosine is None
    assert summarize_job(record).psnr_worst is None
    assert summarize_job(record.model_copy(update={"resumed_at_segment": 2})).resumed


def test_run_on_two_devices_is_two_nights():
    gpu = {"engine": {"device": "cuda"}, "computed_by": {"device": "NVIDIA H200"}}
    records = [
        make_record("a", finished_at="2026-01-01T05:00:00+02:00"),
        make_record("b", finished_at="2026-01-01T04:00:00+00:00"),
        make_record("c", **gpu),
        make_record("d", status="failed"),
    ]
    nights = collect_nights(((record, None) for record in records), "run1")
    assert [(night.device, night.recipe, sorted(night.jobs), night.made_at) for night in nights] == [
        ("cpu", "fp4-distill", ["a", "b"], "2026-01-01T04:00:00+00:00"),
        ("nvidia-h200", "fp4-distill", ["c"], "2026-01-01T00:01:00.000+00:00"),
    ]
    assert {night.run_id for night in nights} == {"run1"}


def test_last_nights_are_those_of_device_and_recipe(storage):
    for run in (3, 1, 7, 2, 5, 6, 4):
        record_night(storage, make_night(run))
    record_night(storage, make_night(8, recipe="fp4"))
    record_night(storage, make_night(9, device="nvidia-l4"))
    storage.write_bytes("cpu/bf16/nights/notes.txt", b"not a night")
    assert [night.run_id for night in last_nights(storage, "cpu", "bf16")] == ["run7", "run6", "run5", "run4", "run3"]
    without = last_nights(storage, "cpu", "bf16", 2, without="run7")
    assert [night.run_id for night in without] == ["run6", "run5"]
    assert last_nights(storage, "cpu", "bf16", 1)[0] == make_night(7)
    assert last_nights(storage, "cpu", "other") == []


def test_record_night_adds_later_jobs_to_night_of_run(storage):
    first = make_night(1, {"a": NightJob(verdict="changed"), "b": NightJob(verdict="changed")})
    second = make_night(1, {"b": NightJob(verdict="identical"), "c": NightJob()}, made_at="2026-01-01T03:00:00+00:00")
    key = record_night(storage, first)
    assert record_night(storage, second) == key
    assert [info.key for info in storage.list()] == [key]
    (night,) = last_nights(storage, "cpu", "bf16")
    assert {name: job.verdict for name, job in night.jobs.items()} == {"a": "changed", "b": "identical", "c": ""}
    assert night.made_at == "2026-01-01T03:00:00+00:00"


def test_record_night_by_two_at_same_time_loses_nothing(storage):
    """The other process writes once between the read and the write of the first."""
    hooked, others = HookedStorage(storage), [make_night(1, {"b": NightJob()})]

    def interrupt(name: str, arguments: Any) -> None:
        if name == "write_if" and others:
            record_night(storage, others.pop())

    hooked.before = interrupt
    record_night(hooked, make_night(1, {"a": NightJob()}))
    (night,) = last_nights(storage, "cpu", "bf16")
    assert set(night.jobs) == {"a", "b"}

    def always(name: str, arguments: Any) -> None:
        if name == "write_if":
            record_night(storage, make_night(1, {f"c{len(hooked.calls)}": NightJob()}))

    hooked.before = always
    with pytest.raises(StorageConflict):
        record_night(hooked, make_night(1, {"a": NightJob()}))


def test_damaged_night_file_is_named_in_error(tmp_path):
    storage = LocalStorage(tmp_path)
    key = record_night(storage, make_night(1))
    storage.write_bytes(key, b"{}")
    for use in (lambda: last_nights(storage, "cpu", "bf16"), lambda: record_night(storage, make_night(1))):
        with pytest.raises(InputUnreadable, match=r"run1\.json"):
            use()


def test_last_nights_needs_one_listing_and_one_read_per_night(
    faulty_s3: FaultyServer, aws_env: Callable[..., object]
) -> None:
    aws_env(faulty_s3)
    storage = open_storage(f"s3://{faulty_s3.make_bucket()}/baseline")
    for run in range(1, 10):
        record_night(storage, make_night(run))
    faulty_s3.requests.clear()
    assert len(last_nights(storage, "cpu", "bf16", without="run9")) == 5
    assert len(faulty_s3.requests) == 6


def test_night_to_json_is_compact():
    data = make_night(
        1, {f"job{n}": NightJob(verdict="identical", seconds={"denoise": 1.25}) for n in range(100)}
    ).to_json()
    assert data.count(b"\n") == 1
    assert len(data) < 100 * 80
    assert json.loads(data)["schema_version"] == 1


# Suggestions

METRICS = {"psnr_worst": 40.0, "ssim_worst": 0.99, "largest_difference": 10, "joint_drift": 0.5, "cosine": 0.98}


def test_suggest_limits_uses_documented_margins():
    jobs = {"a": NightJob(verdict="changed", **METRICS), "b": NightJob(verdict="uncalibrated", psnr_worst=44.06)}
    broken = {"a": NightJob(verdict="broken", psnr_worst=12.0), "b": NightJob(verdict="failed", psnr_worst=1.0)}
    found = suggest_limits([make_night(1, jobs), make_night(2, broken)])
    limits = found.limits
    assert limits.psnr_min == 37.0
    assert limits.ssim_min == 0.98
    assert limits.identity_min == 0.96
    assert limits.max_frame_diff == 15  # 14.14
    assert limits.joint_drift_max == 0.71
    assert (limits.same_frames, limits.seconds_max, limits.memory_max) == (None, None, None)
    assert found.why["psnr_min"] == "the worst of 2 values is 40, of a in run run1; 3 dB below it"
    assert set(found.why) == {"psnr_min", "ssim_min", "identity_min", "max_frame_diff", "joint_drift_max"}


def test_suggest_limits_of_identical_nights_is_same_frames():
    equal = {"psnr_worst": 100.0, "ssim_worst": 1.0, "largest_difference": 0, "joint_drift": 0.0}
    limits = suggest_limits([make_night(n, {"a": NightJob(verdict="identical", **equal)}) for n in (1, 2)]).limits
    assert limits.model_dump(exclude_none=True) == {"same_frames": True}
    mixed = [make_night(1, {"a": NightJob(verdict="identical", **equal), "b": NightJob(verdict="changed", **METRICS)})]
    assert suggest_limits(mixed).limits.same_frames is None
    assert suggest_limits(mixed).limits.psnr_min == 37.0
    assert suggest_limits([]).limits.model_dump(exclude_none=True) == {}


def test_suggest_limits_gives_factors_only_from_3_nights_of_same_work():
    def night(run: int, seconds: float, nbytes: int, **more: Any) -> Night:
        line = NightJob(verdict="changed", seconds={"denoise": seconds, "pose": 1.0}, memory={"host": nbytes}, **more)
        return make_night(run, {"a": line})

    nights = [night(1, 9.0, 100), night(2, 9.0, 100), night(3, 14.0, 101)]
    limits = suggest_limits(nights).limits
    assert (limits.seconds_max, limits.memory_max) == (1.65, 1.12)  # 15 / 10 and 1.01, 1.1 times each
    assert suggest_limits(nights[:2]).limits.seconds_max is None
    for other in ({"resumed": True}, {"work": "other"}, {"caches": {"pose_cache_hits": 1}}):
        assert suggest_limits([*nights[:2], night(3, 14.0, 101, **other)]).limits.seconds_max is None
    assert suggest_limits([night(n, 9.0, 100) for n in (1, 2, 3)]).limits.seconds_max == 1.2


@given(
    st.lists(
        st.builds(
            NightJob,
            verdict=st.sampled_from([*sorted(ACCEPTED), "broken"]),
            psnr_worst=st.none() | st.floats(0, 100),
            ssim_worst=st.none() | st.floats(-1, 1),
            largest_difference=st.none() | st.integers(0, 255),
            joint_drift=st.none() | st.floats(0, 100),
            cosine=st.none() | st.floats(-1, 1),
        ),
        max_size=6,
    )
)
def test_suggest_limits_accepts_every_accepted_job(jobs):
    limits = suggest_limits([make_night(1, {f"job{n}": job for n, job in enumerate(jobs)})]).limits
    for job in jobs:
        if job.verdict in ACCEPTED:
            assert job.psnr_worst is None or job.psnr_worst >= (limits.psnr_min or 0)
            assert job.ssim_worst is None or job.ssim_worst >= (-1 if limits.ssim_min is None else limits.ssim_min)
            assert job.cosine is None or job.cosine >= (-1 if limits.identity_min is None else limits.identity_min)
            most = math.inf if limits.max_frame_diff is None else limits.max_frame_diff
            assert job.largest_difference is None or job.largest_difference <= most
            drift = math.inf if limits.joint_drift_max is None else limits.joint_drift_max
            assert job.joint_drift is None or job.joint_drift <= drift
