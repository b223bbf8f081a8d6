"""Parity jobs whose driving video decord reads otherwise than PyAV run again; every other job keeps its fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from runner.batch.fingerprint import differences, fingerprint, fingerprint_parts, public_parts, settings_digest
from runner.batch.inputs import InputIndex
from runner.batch.ledger import Decision, Ledger, output_identity
from runner.batch.survey import job_parts, make_surveyor
from runner.records.record import OutputRecord, ResultRecord
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import open_storage
from runner.storage.file_hashes import FileHashes
from tests.video_files import make_clip, overwrite_middle, remux, tone

B_FRAMES = {"crf": "14", "preset": "veryfast", "bf": "3"}


@dataclass
class Engine:
    identity: dict[str, str] = field(default_factory=lambda: {"transformer": "sha256:1"})

    def effective(self, options: JobOptions) -> JobOptions:
        return options

    def own(self, job: Job) -> dict[str, str]:
        return {}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    whole = make_clip(folder / "whole.mp4", 60, options=B_FRAMES, audio=tone(2.0))
    (folder / "text.mp4").write_text("not a video\n" * 40)
    return {
        "whole": whole,
        "trimmed": remux(whole, folder / "trimmed.mp4", video_shift_s=-0.5),
        "damaged": overwrite_middle(whole, folder / "damaged.mp4", 0.5, 0.6),
        "text": folder / "text.mp4",
    }


def job_of(clip: Path | str, *, parity: bool = True, **options: object) -> Job:
    reference = str(Path(__file__))  # any file: it is only hashed
    chosen = JobOptions.model_validate({"preprocess": {"parity": parity}, "fps": 16, **options})
    return Job("a", reference, str(clip), None, "dance", chosen, None)


def parts_before(job: Job) -> dict:
    """The parts of version 0.1.0."""
    return fingerprint_parts(job, InputIndex(FileHashes()).identify(job), Engine().identity)


def parts_now(job: Job, hashes: FileHashes | None = None) -> dict:
    index = InputIndex(hashes or FileHashes())
    inputs = index.identify(job)
    return job_parts(Engine(), job, inputs, {}, index.find_reader(job, inputs))


@pytest.mark.parametrize(("clip", "parity"), [("whole", True), ("trimmed", False), ("damaged", True), ("text", True)])
def test_fingerprint_without_difference_is_unchanged(clips: dict[str, Path], clip: str, parity: bool) -> None:
    job = job_of(clips[clip], parity=parity)
    assert parts_now(job) == parts_before(job)


def test_fingerprint_with_difference_names_reader_and_reason(clips: dict[str, Path]) -> None:
    job = job_of(clips["trimmed"])
    before, now = parts_before(job), parts_now(job)
    assert now == {**before, "reader": "decord"}
    assert differences(before, now) == ["reader: pyav → decord"]
    assert settings_digest(public_parts(now)) == settings_digest(public_parts(job_parts(Engine(), job, {}, {})))


def test_official_files_are_read_by_pyav(clips: dict[str, Path]) -> None:
    job = replace(job_of(clips["trimmed"]), official=str(clips["trimmed"].parent))
    assert InputIndex(FileHashes()).find_reader(job, {}) is None


def mark_done(out: Path, parts: dict) -> None:
    storage = open_storage(out)
    storage.write_bytes("jobs/a/output.mp4", b"video")
    identity, size, files = output_identity(storage, "jobs/a/output.mp4")
    key = "jobs/a/output.mp4"
    made = OutputRecord(
        uri=storage.uri(key), key=key, bytes=size, files=files, identity=identity, sha256=None, frames=1, fps="16",
        width=16, height=16, frames_sha256="0",
    )  # fmt: skip
    record = ResultRecord(
        job_id="a", status="succeeded", attempt=1, run_id="r", reason="", started_at="t", finished_at="t",
        fingerprint=fingerprint(parts), fingerprint_parts=parts, output=made, error=None,
    )  # fmt: skip
    storage.write_bytes("jobs/a/result.json", record.to_json())


def decide(out: Path, job: Job) -> Decision:
    return make_surveyor(Engine(), Ledger(open_storage(out)), ())(job, None)


def test_done_job_of_differing_file_runs_again_once_with_reason(clips: dict[str, Path], tmp_path: Path) -> None:
    job = job_of(clips["trimmed"])
    mark_done(tmp_path, parts_before(job))
    decision = decide(tmp_path, job)
    assert (decision.action, decision.reason) == ("run", "reader: pyav → decord")
    mark_done(tmp_path, parts_now(job))
    assert decide(tmp_path, job).reason == "done"


@pytest.mark.parametrize(("clip", "parity"), [("whole", True), ("trimmed", False)])
def test_done_job_of_other_file_stays_done(clips: dict[str, Path], tmp_path: Path, clip: str, parity: bool) -> None:
    job = job_of(clips[clip], parity=parity)
    mark_done(tmp_path, parts_before(job))
    assert decide(tmp_path, job).reason == "done"


def test_readers_are_compared_once_and_not_in_next_run(
    clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = FileHashes(tmp_path / "file-hashes.json")
    assert parts_now(job_of(clips["trimmed"]), hashes)["reader"] == "decord"
    assert "reader" not in parts_now(job_of(clips["whole"]), hashes)
    hashes.save()
    monkeypatch.setattr("runner.video.readers_differ", lambda *a: pytest.fail("compared again"))
    later = FileHashes(tmp_path / "file-hashes.json")
    assert parts_now(replace(job_of(clips["trimmed"]), id="b", prompt="sit"), later)["reader"] == "decord"
    assert "reader" not in parts_now(job_of(clips["whole"]), later)
    with pytest.raises(pytest.fail.Exception):  # other frames are sampled
        parts_now(job_of(clips["trimmed"], max_frames=9), later)


@pytest.mark.s3
def test_object_is_fetched_to_compare_readers(moto_s3, aws_env, clips: dict[str, Path]) -> None:
    aws_env(moto_s3)
    base = f"s3://{moto_s3.make_bucket()}/in"
    for name in ("whole", "trimmed"):
        open_storage(base).write_bytes(f"{name}.mp4", clips[name].read_bytes())
    assert parts_now(job_of(f"{base}/trimmed.mp4"))["reader"] == "decord"
    assert "reader" not in parts_now(job_of(f"{base}/whole.mp4"))
