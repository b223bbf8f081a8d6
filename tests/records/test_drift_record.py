"""Drift record: what is worth a warning, and what is not."""

from __future__ import annotations

import json

from runner.records.drift_record import DELTA_E_LIMIT, DriftRecord


def record(colour: str, *segments: dict, against: str = "first segment") -> DriftRecord:
    rows = [{"segment": at, "share": 0.5, "laplacian": 1.0, **row} for at, row in enumerate(segments, 1)]
    return DriftRecord.model_validate({"colour": colour, "against": against, "segments": rows})


def change(delta_e: float) -> dict:
    return {"gain": (1.0, 1.0, 1.0), "offset": (0.0, 0.0, 0.0), "delta_e": delta_e}


CORRECTED = {"correction": {"method": "seam", "gain": (1.0, 1.0, 1.0), "offset": (1.0, 0.0, 0.0)}}


def test_drift_beyond_limit_is_warned_once_with_remedy():
    within, beyond = DELTA_E_LIMIT - 0.01, DELTA_E_LIMIT + 0.5
    assert record("off", {}, {"remaining": within}).warnings == []
    (said,) = record("off", {}, {"remaining": 2.1}, {"remaining": beyond}, {}).warnings
    assert "segment 3 of 4 are 2.5 delta E from those of the first segment; set colour: anchor" in said
    (said,) = record("anchor", {"remaining": beyond}, against="driving video").warnings
    assert "of the driving video; check the video" in said


def test_drift_step_is_warned_at_published_joint():
    (said,) = record("off", {}, {"joint": change(2.4), "overlap": change(0.1)}, {"overlap": change(2.2)}).warnings
    assert "2.4 delta E at the joint before segment 2 of 3; set colour: seam or anchor" in said
    assert record("off", {}, {"joint": change(0.1), "overlap": change(9)}).warnings == []  # the joint is what is seen
    assert record("seam", {}, {"joint": change(2.4), **CORRECTED}).warnings == []


def test_drift_record_json_round_trips_and_allows_new_fields():
    whole = record(
        "seam", {}, {"overlap": change(1), "joint": change(2), "still": change(3), "remaining": 3} | CORRECTED
    )
    read = json.loads(json.dumps(whole.model_dump(mode="json")))
    assert DriftRecord.model_validate(read) == whole
    assert DriftRecord.model_validate({**read, "more": 1}) == whole
