from __future__ import annotations

import json
from datetime import UTC, datetime

import jsonschema
import pytest

from runner.records.approval import Approval, Approvals, parse_time
from runner.records.record import schemas

VALUES = {
    "token": "0123456789abcdef",
    "who": "anna",
    "when": "2026-01-02T03:04:05.678+00:00",
    "why": "the new shoes 踊る",
    "run_id": "20260102T000000Z",
    "finished_at": "2026-01-02T01:00:00.000+00:00",
}


def test_approvals_fit_their_schema_and_survive_the_round_trip():
    approvals = Approvals(job_id="a", approvals=[Approval(**VALUES), Approval(**VALUES | {"draft": True})])
    data = approvals.to_json()
    jsonschema.validate(json.loads(data), schemas()["approved.v1.schema.json"])
    assert Approvals.parse(data) == approvals
    assert "踊る".encode() in data
    later = json.loads(data) | {"new in a later version": 1}
    assert Approvals.parse(json.dumps(later).encode()) == approvals


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"job_id": "a", "approvals": []}'])
def test_other_bytes_are_no_approvals(data):
    with pytest.raises(ValueError):  # noqa: PT011 - JSON and pydantic each say it in their words
        Approvals.parse(data)


@pytest.mark.parametrize("name", ["when", "finished_at"])
def test_a_time_that_cannot_be_compared_is_refused(name):
    stored = {"job_id": "a", "approvals": [VALUES | {name: "yesterday"}]}
    with pytest.raises(ValueError, match="not a list of approvals"):
        Approvals.parse(json.dumps(stored).encode())


def test_secrets_are_masked_and_digests_are_not():
    digest = "0123456789abcdef" * 4
    values = VALUES | {"out": "https://user:secret99@host/out", "frames_sha256": digest, "output_sha256": digest}
    data = Approvals(job_id="a", approvals=[Approval(**values)]).to_json()
    assert b"secret99" not in data
    stored = Approvals.parse(data).approvals[0]
    assert (stored.frames_sha256, stored.output_sha256, stored.token) == (digest, digest, VALUES["token"])


def test_a_sentence_tells_who_when_why_and_from_which_run():
    said = Approval(**VALUES).sentence()
    assert said == (
        "A render of run 20260102T000000Z was approved by anna at 2026-01-02T03:04:05.678+00:00: the new shoes 踊る"
    )
    assert Approval(**VALUES | {"draft": True}).sentence().startswith("A draft of run")
    assert Approval(**VALUES | {"removed": True}).sentence().startswith("A removal of run")


def test_times_of_all_offsets_can_be_compared():
    assert parse_time("2026-01-02T03:00:00Z") == parse_time("2026-01-02T05:00:00+02:00")
    assert parse_time("2026-01-02T03:00:00") == datetime(2026, 1, 2, 3, tzinfo=UTC)
    assert parse_time("2026-01-02") < parse_time("2026-01-02T00:00:00.001+00:00")
    with pytest.raises(ValueError, match="isoformat"):
        parse_time("yesterday")
