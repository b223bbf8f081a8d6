"""The committed schema of a run report is the model's, and a report fits."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from runner.records.run_report import GpuSeconds, JobReport, ProcessReport, RunReport, StageSpan, report_schemas

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"


def make_report(**more) -> RunReport:
    """Of one process and one job, 10 seconds long."""
    spent = GpuSeconds(total=10.0, work=6.0, loading=1.0, idle=3.0)
    span = StageSpan(stage="generate", job_id="a", begin_s=2.0, end_s=8.0)
    process = ProcessReport(
        shard="00000-of-00001",
        host="h",
        pid=7,
        device="cpu",
        begin_s=0.0,
        end_s=10.0,
        finished=True,
        gpu_seconds=spent,
        spans=[span],
    )
    values = {
        "run_id": "r",
        "out": "out",
        "manifest": "m.yaml",
        "recipe": "fp32",
        "made_at": "2026-01-01T00:01:00.000+00:00",
        "started_at": "2026-01-01T00:00:00.000+00:00",
        "finished_at": "2026-01-01T00:00:10.000+00:00",
        "seconds": 10.0,
        "counts": {"total": 1, "succeeded": 1},
        "gpu_seconds": spent,
        "film_s": 2.0,
        "caches": {},
        "stages_s": {"denoise": 6.0},
        "processes": [process],
        "jobs": [JobReport(id="a", status="succeeded", reason="no record yet", gpu_s=6.0)],
    }
    return RunReport(**(values | more))


def test_the_committed_schema_is_the_model_s():
    ((name, schema),) = report_schemas().items()
    assert name == "report.v1.schema.json"
    committed = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    assert committed == schema, "run: python -m runner.records.run_report schemas"
    jsonschema.Draft202012Validator.check_schema(committed)


def test_a_report_fits_its_schema_and_reads_back():
    report = make_report()
    data = json.loads(report.to_json())
    jsonschema.validate(data, report_schemas()["report.v1.schema.json"])
    assert RunReport.model_validate(data) == report
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data | {"processes": [{"host": "h"}]}, report_schemas()["report.v1.schema.json"])
