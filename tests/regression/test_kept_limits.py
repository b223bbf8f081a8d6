"""Kept limits: `run` keeps what the manifest says, and of several runs into one folder the newest counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from runner.errors import InputUnreadable
from runner.records.record import schemas
from runner.regression.kept_limits import keep_limits, limits_by_job, limits_of_manifest
from runner.spec.manifest import Manifest, parse_manifest
from runner.spec.regression_limits import RegressionLimits
from runner.storage import Storage, open_storage


def manifest_of(jobs: dict[str, Any], **said: Any) -> Manifest:
    """jobs: id → its own limits."""
    listed = [{"id": name, "reference": "r", "video": "v", "regression": own} for name, own in jobs.items()]
    return parse_manifest(json.dumps({"version": 1, **said, "jobs": listed}), base="/", source="m.json")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "out")


def set_time(storage: Storage, run_id: str, seconds: float) -> Path:
    path = Path(storage.root, "runs", run_id, "regression.json")
    os.utime(path, (seconds, seconds))
    return path


WHOLE = {"psnr_min": 40, "seconds_max": "1.5x", "same_frames": False}


def test_what_is_kept_is_what_the_manifest_says(storage):
    manifest = manifest_of({"a": None, "b": {"psnr_min": 30, "memory_max": "2x"}, "c": {}}, regression=WHOLE)
    keep_limits(storage, "night", manifest.jobs)
    found = limits_by_job(storage)
    assert found == limits_of_manifest(manifest)
    assert found["b"] == RegressionLimits.model_validate(WHOLE | {"psnr_min": 30, "memory_max": "2x"})
    data = json.loads(storage.read_bytes("runs/night/regression.json"))
    jsonschema.validate(data, schemas()["regression.v1.schema.json"])
    assert data["rows"] == [
        {"limits": {"same_frames": False, "psnr_min": 40.0, "seconds_max": "1.5x"}, "job_ids": ["a", "c"]},
        {
            "limits": {"same_frames": False, "psnr_min": 30.0, "seconds_max": "1.5x", "memory_max": "2.0x"},
            "job_ids": ["b"],
        },
    ]


def test_the_same_limits_over_s3(moto_s3, aws_env):
    storage = open_storage(f"s3://{aws_env(moto_s3).make_bucket()}/out")
    manifest = manifest_of({"a": None, "b": {"psnr_min": 30}}, regression=WHOLE)
    keep_limits(storage, "night", manifest.jobs)
    assert limits_by_job(storage) == limits_of_manifest(manifest)


def test_nothing_is_kept_where_no_job_has_a_limit(storage):
    keep_limits(storage, "night", manifest_of({"a": None, "b": {}}, regression={"psnr_min": None}).jobs)
    assert list(storage.list()) == []
    assert limits_by_job(storage) == {}


def test_the_newest_file_that_names_a_job_counts(storage):
    keep_limits(storage, "z-old", manifest_of({"a": {"psnr_min": 20}, "b": {"psnr_min": 21}}).jobs)
    keep_limits(storage, "a-new", manifest_of({"a": {"ssim_min": 0.9}, "c": None}).jobs)
    set_time(storage, "z-old", 1000)
    set_time(storage, "a-new", 2000)
    new = {"a": RegressionLimits(ssim_min=0.9), "b": RegressionLimits(psnr_min=21), "c": RegressionLimits()}
    assert limits_by_job(storage) == new
    set_time(storage, "z-old", 3000)
    assert limits_by_job(storage) == new | {"a": RegressionLimits(psnr_min=20)}


def test_limits_that_a_manifest_says_no_longer_are_gone(storage):
    keep_limits(storage, "old", manifest_of({"a": {"psnr_min": 20}}).jobs)
    keep_limits(storage, "z-new", manifest_of({"a": None}).jobs)
    assert limits_by_job(storage) == {"a": RegressionLimits()}


def test_the_same_limits_again_leave_the_file_as_it_is(storage):
    """A shard that is started again later must not make an old run's limits the newest."""
    jobs = manifest_of({"a": {"psnr_min": 20}}).jobs
    keep_limits(storage, "night", jobs)
    path = set_time(storage, "night", 1000)
    keep_limits(storage, "night", jobs)
    assert path.stat().st_mtime == 1000
    keep_limits(storage, "night", manifest_of({"a": {"psnr_min": 21}}).jobs)
    assert path.stat().st_mtime > 1000
    assert limits_by_job(storage)["a"].psnr_min == 21


def test_other_files_below_the_runs_are_no_limits(storage):
    for key in ("runs/night/x/regression.json", "runs/regression.json", "runs/night/00000.summary.json"):
        storage.write_bytes(key, b"no limits")
    assert limits_by_job(storage) == {}


def test_an_id_that_looks_like_a_secret_is_kept_whole(storage, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "night-of-the-dance")
    keep_limits(storage, "r", manifest_of({"night-of-the-dance": {"psnr_min": 20}}).jobs)
    assert list(limits_by_job(storage)) == ["night-of-the-dance"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"schema_version": 2, "rows": []}',
        b'{"schema_version": 1, "rows": [{"limits": {"psnr_mim": 3}, "job_ids": ["a"]}]}',
        b'{"schema_version": 1, "rows": [{"limits": {"seconds_max": 1.2}, "job_ids": ["a"]}]}',
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(storage, data):
    """Limits that go unread would let everything pass."""
    storage.write_bytes("runs/night/regression.json", data)
    with pytest.raises(InputUnreadable, match=r"runs/night/regression\.json") as caught:
        limits_by_job(storage)
    assert "--manifest" in caught.value.todo
