from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from runner.batch.fingerprint import fingerprint_parts, public_parts, settings_digest
from runner.batch.run_jobs import keep_run_jobs, list_runs, read_run_jobs
from runner.errors import InputUnreadable, WeightsMissing
from runner.records.record import InputRecord, ResultRecord, schemas
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import open_storage

MODEL = {"transformer": "sha256:1"}
INPUTS = {"video": InputRecord(uri="v.mp4", bytes=1, identity="sha256:2")}


def a_job(name: str, prompt: str = "ok", **options) -> Job:
    return Job(name, "r.png", "v.mp4", None, prompt, JobOptions(**options), None)


def parts(job: Job, inputs=None) -> dict:
    return fingerprint_parts(job, inputs or {}, MODEL)


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path)


def kept_parts(job: Job) -> dict:
    return public_parts(parts(job))


def keep(storage, run_id, *jobs, force=False) -> None:
    keep_run_jobs(storage, run_id, jobs, parts, manifest="m.yaml", recipe="bf16", force=force)


def test_jobs_are_kept_in_the_manifest_s_order(storage):
    keep(storage, "r", a_job("b"), a_job("a", seed=7), force=True)
    kept = read_run_jobs(storage, "r")
    assert list(kept.jobs) == ["b", "a"]
    assert (kept.run_id, kept.manifest, kept.recipe, kept.force) == ("r", "m.yaml", "bf16", True)
    assert kept.jobs["b"] != kept.jobs["a"]
    jsonschema.validate(json.loads(storage.read_bytes("runs/r/jobs.json")), schemas()["jobs.v1.schema.json"])


def test_a_job_that_cannot_be_identified_is_kept_without_a_digest(storage):
    def missing(job: Job) -> dict:
        if job.id == "a":
            raise WeightsMissing("no LoRA glow.safetensors")
        return parts(job)

    keep_run_jobs(storage, "r", [a_job("a"), a_job("b")], missing, manifest="m", recipe="bf16")
    assert read_run_jobs(storage, "r").jobs == {"a": None, "b": settings_digest(kept_parts(a_job("b")))}


def test_the_run_that_began_last_is_the_newest_whatever_its_id(storage, tmp_path):
    assert list(list_runs(storage)) == []
    for run_id in ("z", "a"):
        keep(storage, run_id, a_job("a"))
    assert list(list_runs(storage)) == ["a", "z"]
    keep(storage, "z", a_job("a"))  # the same bytes, begun again
    assert list(list_runs(storage)) == ["z", "a"]
    storage.write_bytes("runs/other/0-of-1.summary.json", b"{}")
    assert list(list_runs(storage)) == ["z", "a"]


def test_a_source_that_knows_no_job_keeps_nothing(storage):
    keep(storage, "r")
    assert list_runs(storage) == {}
    assert read_run_jobs(storage, "r") is None


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"run_id": 1}', b"\xff"])
def test_a_damaged_file_says_which(storage, data):
    storage.write_bytes("runs/r/jobs.json", data)
    with pytest.raises(InputUnreadable, match=r"runs/r/jobs\.json: the jobs of run r cannot be read"):
        read_run_jobs(storage, "r")


# -- the digest --------------------------------------------------------------------------------------------------------


def as_kept(job: Job, inputs=INPUTS) -> dict:
    """The parts as a record on the storage has them."""
    record = ResultRecord(
        job_id=job.id,
        status="succeeded",
        attempt=1,
        run_id="r",
        reason="",
        started_at="",
        finished_at="",
        fingerprint="",
        fingerprint_parts=parts(job, inputs),
    )
    return ResultRecord.model_validate_json(record.to_json()).fingerprint_parts


@pytest.mark.parametrize(
    "prompt", ["ok", "踊る", "see https://user:hush@host/a?X-Amz-Signature=abc", "password=hush token: hush"]
)
def test_a_record_has_the_digest_of_the_job_that_it_was_made_of(prompt):
    job = a_job("a", prompt, seed=5)
    assert settings_digest(as_kept(job)) == settings_digest(kept_parts(job))


@pytest.mark.parametrize(
    "change", [{"prompt": "other"}, {"options": JobOptions(seed=6)}, {"options": JobOptions(fps=8)}]
)
def test_other_settings_have_another_digest(change):
    job = a_job("a", seed=5)
    assert settings_digest(as_kept(job)) != settings_digest(kept_parts(replace(job, **change)))


def test_the_contents_of_inputs_are_no_part_of_the_digest():
    other = {"video": InputRecord(uri="v.mp4", bytes=2, identity="sha256:3")}
    assert settings_digest(as_kept(a_job("a"), other)) == settings_digest(kept_parts(a_job("a")))
