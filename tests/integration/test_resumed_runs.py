"""Jobs of six segments, rendered by the real engine, killed by SIGKILL and run again: the files of an undisturbed run.

The runs are forked by a process of its own, see `tests/faults/real_runs.py`. `make test` kills at a few points, one
job several times in a row; `make soak` at every point, each in a new output, and over a real S3 server.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from runner.storage import open_storage
from tests.faults.real_runs import PUBLISHED, Point, RealRuns
from tests.system_tests import system_test

SEGMENTS = 6
SHORT = {"size": "48x80", "fps": 8, "steps": 2, "max_segment_frames": 5}  # 24 frames: the last window is padded
# name: reference, dance, options; in mode `replace` the mask is that of the demo, where it has one
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sound": ("anna", "jacks", {**SHORT, "keep_audio": True, "start_s": 0.25}),
    "still": ("bela", "jacks", {**SHORT, "keep_audio": True, "start_s": 0.25, "output": {"format": "png"}}),
    "swap": ("otto", "wave", {**SHORT, "mode": "replace"}),
}
SOAK_JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "overlap": ("juno", "twist", {**SHORT, "fps": 18, "max_frames": 52, "max_segment_frames": 13, "overlap_frames": 5}),
    "segmented": ("mira", "jacks", {**SHORT, "mode": "replace", "output": {"format": "png"}}),
}
ALL_POINTS: list[Point] = [
    *chain.from_iterable((("in", n - 1), ("part", n), ("after", n)) for n in range(1, SEGMENTS + 1)),
    PUBLISHED,
]


@dataclass
class Place:
    """Where a test's runs write, and how they are begun."""

    runs: RealRuns
    media: Path
    folder: Path
    out: str

    def words(self, *jobs: str) -> list[str]:
        lines = []
        for name in jobs:
            reference, dance, options = (JOBS | SOAK_JOBS)[name]
            job: dict[str, Any] = {
                "id": name,
                "reference": f"{self.media}/references/{reference}.png",
                "prompt": "a dance",
            }
            job |= {"video": f"{self.media}/dances/{dance}.mp4", "options": options}
            mask = self.media / f"masks/{dance}.mp4"
            if options.get("mode") == "replace" and mask.exists():
                job["mask"] = str(mask)
            lines.append(json.dumps(job) + "\n")
        manifest = self.folder / f"{'-'.join(jobs)}.jsonl"
        manifest.write_text("".join(lines), encoding="utf-8")
        return [str(manifest), "--out", self.out]

    def kill(self, point: Point, job: str, *flags: str) -> None:
        self.runs.kill(point, *self.words(job), *flags)

    def run(self, *jobs: str, flags: tuple[str, ...] = (), device: str | None = None) -> list[dict[str, Any]]:
        return self.runs.run(*self.words(*jobs), *flags, device=device)

    def names(self, job: str) -> set[str]:
        """Of all files in the job's folder, those of killed writers too."""
        storage = open_storage(self.out)
        found = chain(storage.list(f"jobs/{job}/"), storage.leftovers(f"jobs/{job}/"))
        return {info.key.removeprefix(f"jobs/{job}/") for info in found}

    def files(self, job: str) -> dict[str, bytes | None]:
        """All files of a job but its record. The folder of frames has a name of its own in each attempt."""
        storage = open_storage(self.out)
        return {
            re.sub(r"frames/\w{8}/", "frames/", name): storage.read_bytes(f"jobs/{job}/{name}")
            for name in self.names(job) - {"result.json"}
        }

    def record(self, job: str) -> dict[str, Any]:
        return json.loads(open_storage(self.out).read_bytes(f"jobs/{job}/result.json") or b"{}")


@pytest.fixture(scope="module")
def place(demo_models, demo_media, tmp_path_factory) -> Iterator[Place]:
    """A place whose output holds what undisturbed runs make of `JOBS`."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = RealRuns(demo_models, folder)
    try:
        place = Place(runs, demo_media, folder, str(folder / "undisturbed"))
        place.run(*JOBS)
        yield place
    finally:
        runs.close()


@pytest.fixture(scope="module")
def killed_early(place) -> Path:
    """An output in which the job `sound` was killed in its third segment."""
    killed = Place(place.runs, place.media, place.folder, str(place.folder / "killed"))
    killed.kill(("in", 2), "sound", "--memory", "resident")
    kept = {name.rpartition("/")[2] for name in killed.names("sound")}
    assert kept == {"0001.tar", "0002.tar", "0002.state", "attempt.json"}
    return Path(killed.out)


def another(place: Place, tmp_path: Path, template: Path | None = None) -> Place:
    """A place for one test, with a copy of what was killed before."""
    if template is not None:
        shutil.copytree(template, tmp_path / "out")
    return Place(place.runs, place.media, tmp_path, str(tmp_path / "out"))


def assert_same(found: Place, undisturbed: Place, job: str) -> None:
    """Every file of the job, byte for byte; nothing is left of its attempts."""
    files, expected = found.files(job), undisturbed.files(job)
    assert files.keys() == expected.keys()
    assert "frames.sha256" in files and {"output.mp4", "frames/000000.png"} & files.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    output, other = found.record(job)["output"], undisturbed.record(job)["output"]
    names = ("frames_sha256", "frames_hash", "frames", "sha256", "bytes")
    assert {name: output[name] for name in names} == {name: other[name] for name in names}


def assert_resumed(place: Place, job: str, done: int, events: list[dict[str, Any]]) -> None:
    """Record and log say that the last attempt went on after `done` segments."""
    record = place.record(job)
    told = [event for event in events if event["event"].endswith("resumed") and event["job"] == job]
    assert record["efficiency"]["segments_generated"] == SEGMENTS - done
    assert len(record["steps_s"]) == 2 * (SEGMENTS - done)
    if done == 0:
        assert record["resumed_at_segment"] is None
        return
    note = f"resumed at segment {done + 1}/{SEGMENTS}" if done < SEGMENTS else f"resumed after segment {done}/{done}"
    assert record["resumed_at_segment"] == done + 1
    assert note in record["notes"]
    assert [(event["event"], event["segment"], event["segments"]) for event in told] == [
        ("job_resumed", done + 1, SEGMENTS)
    ]


def kept_at(point: Point) -> int:
    """How many segments a job that was killed there goes on after."""
    kind, number = point
    return {"in": number, "part": number - 1, "after": number, "published": SEGMENTS}[kind]


@system_test
def test_jobs_killed_at_a_few_points_have_the_files_of_an_undisturbed_run(place, killed_early, tmp_path):
    """One with sound, four times: in a segment, after one, before and after its output is stored; pictures; a mask."""
    found = another(place, tmp_path, killed_early)
    for point in (("after", 4), ("after", SEGMENTS), PUBLISHED):
        found.kill(point, "sound")
    found.kill(("part", 3), "still")
    found.kill(("after", 5), "swap")
    events = found.run(*JOBS)
    for job, done in {"sound": SEGMENTS, "still": 2, "swap": 5}.items():
        assert_same(found, place, job)
        assert_resumed(found, job, done, events)
        assert found.record(job)["attempts_counted"] <= 2, "attempts that got on do not count"
    assert any("AAC" in name for name in found.record("sound")["notes"])
    assert any("audio.wav" in name for name in found.record("still")["notes"])
    assert "frames/audio.wav" in found.files("still")


@pytest.mark.parametrize("change", ["memory", "device"])
def test_a_job_begins_again_under_another_memory_mode_or_device_and_says_so(place, killed_early, tmp_path, change):
    found = another(place, tmp_path, killed_early)
    if change == "memory":
        said = "memory: resident → stream"
        events = found.run("sound", flags=("--memory", "stream"))
    else:
        said = "device: .* → Another CPU"
        events = found.run("sound", flags=("--memory", "resident"), device="Another CPU")
    (note,) = (note for note in found.record("sound")["notes"] if note.startswith("began at segment 1/6: "))
    assert re.search(said, note)
    (told,) = (event for event in events if event["event"] == "job_not_resumed")
    assert re.search(said, told["reason"])
    assert_resumed(found, "sound", 0, events)
    assert_same(found, place, "sound")  # in float32 on a CPU all modes give the same bits


# -- soak -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soak_place(place, tmp_path_factory) -> Place:
    """Undisturbed runs of all jobs."""
    found = another(place, tmp_path_factory.mktemp("all"), Path(place.out))
    found.run(*JOBS, *SOAK_JOBS)
    return found


@pytest.mark.soak
@pytest.mark.parametrize("point", ALL_POINTS, ids=lambda point: "-".join(map(str, point)))
@pytest.mark.parametrize("job", [*JOBS, *SOAK_JOBS])
def test_a_job_killed_at_any_point_has_the_same_files(soak_place, tmp_path, job, point):
    found = another(soak_place, tmp_path)
    found.kill(point, job)
    events = found.run(job)
    assert_same(found, soak_place, job)
    assert_resumed(found, job, kept_at(point), events)


@pytest.mark.soak
@pytest.mark.parametrize("job", [*JOBS, *SOAK_JOBS])
def test_a_job_killed_at_all_points_in_turn_has_the_same_files(soak_place, tmp_path, job):
    """Attempts are counted anew after each that finished a segment, so that nineteen kills are not three too many."""
    found = another(soak_place, tmp_path)
    for point in ALL_POINTS:
        found.kill(point, job)
    events = found.run(job)
    assert_same(found, soak_place, job)
    assert_resumed(found, job, SEGMENTS, events)
    assert found.record(job)["attempts_counted"] == 0


@pytest.mark.soak
@pytest.mark.s3
def test_a_job_killed_at_any_point_on_a_real_s3_server(seaweedfs_s3, aws_env, place, demo_models, demo_media, tmp_path):
    aws_env(seaweedfs_s3)
    runs = RealRuns(demo_models, tmp_path, seaweedfs_s3.environment())
    try:
        for number, point in enumerate(ALL_POINTS):
            out = f"s3://{seaweedfs_s3.make_bucket()}/out{number}"
            found = Place(runs, demo_media, tmp_path, out)
            found.kill(point, "sound")
            events = found.run("sound")
            assert found.files("sound") == place.files("sound"), point
            assert_resumed(found, "sound", kept_at(point), events)
            assert found.record("sound")["output"]["frames_sha256"] == place.record("sound")["output"]["frames_sha256"]
    finally:
        runs.close()
