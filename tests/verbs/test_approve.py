"""The verb `approve`: which jobs, who, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import ConfigInvalid
from runner.storage import open_storage
from runner.verbs.approve import approve, default_approver, fits
from runner.verbs.settings import ApproveSettings
from tests.regression.night_stores import write_render


@pytest.fixture
def lab(tmp_path):
    out = open_storage(tmp_path / "out")
    for job in ("anna", "bela"):
        write_render(out, tmp_path / "scratch", job)
    return tmp_path


def accept(lab: Path, **more):
    settings = {"why": "looked at", "cache": lab / "cache"} | more
    return approve(ApproveSettings(out=str(lab / "out"), baseline=str(lab / "base"), **settings))


def approvals(lab: Path, job: str) -> list[dict]:
    return json.loads((lab / f"base/cpu/fp4-distill/jobs/{job}/approved.json").read_bytes())["approvals"]


def test_approve_records_who_when_why_and_run_of_every_job(lab):
    assert [(row.id, row.action) for row in accept(lab, who="Kim")] == [("anna", "approved"), ("bela", "approved")]
    (one,) = approvals(lab, "anna")
    assert (one["who"], one["why"], one["run_id"]) == ("Kim", "looked at", "20260101T000000Z")
    assert one["out"] == str(lab / "out") and one["when"].startswith("20")


def test_approve_again_changes_nothing(lab):
    accept(lab)
    assert {row.action for row in accept(lab)} == {"unchanged"}
    assert len(approvals(lab, "anna")) == 1


def test_approve_with_job_globs_chooses_jobs(lab):
    assert [row.id for row in accept(lab, job=["a*"])] == ["anna"]
    with pytest.raises(ConfigInvalid, match="has no job that fits c"):
        accept(lab, job=["c*"])
    assert fits("anna", ()) and fits("anna", ["x", "a?na"]) and not fits("anna", ["A*"])


def test_approve_refuses_failed_job_and_accepts_others(lab):
    record = json.loads((lab / "out/jobs/anna/result.json").read_bytes()) | {"status": "failed"}
    record["error"] = {"code": "input.no_person", "message": "no person", "stage": "prepare", "retryable": False}
    (lab / "out/jobs/anna/result.json").write_text(json.dumps(record))
    refused, accepted = accept(lab)
    assert refused.action == "refused" and "input.no_person" in refused.detail
    assert accepted.action == "approved"


def test_approve_removes_missing_jobs_only_with_missing_flag(lab, tmp_path):
    accept(lab)
    for path in (lab / "out/jobs/bela").iterdir():
        path.unlink()
    assert [row.id for row in accept(lab)] == ["anna"]
    rows = accept(lab, missing=True, why="no longer rendered")
    assert [(row.id, row.action) for row in rows] == [("anna", "unchanged"), ("bela", "removed")]
    assert approvals(lab, "bela")[0]["removed"] and len(approvals(lab, "bela")) == 2
    assert [row.id for row in accept(lab, missing=True)] == ["anna"]


def test_approve_with_invalid_flag_is_refused_before_reading(lab):
    for wrong in ({"why": "  "}, {"why": "x" * 2001}, {"who": ""}, {"as_of": "yesterday"}, {"as_of": "2026-01-01"}):
        with pytest.raises(ConfigInvalid, match="--"):
            accept(lab, **wrong)


def test_default_approver_is_user_at_host():
    user, _, host = default_approver().partition("@")
    assert user and host
