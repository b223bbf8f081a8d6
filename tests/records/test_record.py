from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from runner.errors import InputNotFound
from runner.records.record import ErrorRecord, ResultRecord, environment, reuse_of, schemas

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"


def a_failure(**more) -> ResultRecord:
    values = {
        "job_id": "a",
        "status": "failed",
        "attempt": 1,
        "run_id": "r",
        "reason": "no record yet",
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:00:01+00:00",
        "fingerprint": "f" * 64,
        "fingerprint_parts": {"prompt": "踊る"},
        "error": ErrorRecord.of(InputNotFound("no such file", where="x.mp4", todo="Check the path"), "prepare"),
    }
    return ResultRecord(**(values | more))


@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_committed_schema_is_the_code_s_own(name):
    committed = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    assert committed == schemas()[name], "run: python -m runner.records.record schemas"
    jsonschema.Draft202012Validator.check_schema(committed)


def test_a_record_fits_its_schema_and_survives_the_round_trip():
    record = a_failure()
    data = json.loads(record.to_json())
    jsonschema.validate(data, schemas()["result.v1.schema.json"])
    assert ResultRecord.model_validate(data) == record
    assert "踊る".encode() in record.to_json()
    assert data["error"] == {
        "code": "input.not_found",
        "message": "x.mp4: no such file. Check the path",
        "stage": "prepare",
        "retryable": False,
        "todo": "Check the path",
    }


def test_a_record_of_the_wrong_shape_does_not_fit():
    data = json.loads(a_failure().to_json())
    for wrong in ({"status": "maybe"}, {"attempt": 0}, {"schema_version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | wrong, schemas()["result.v1.schema.json"])


def test_a_record_of_an_older_version_tells_no_way_of_hashing_frames():
    output = {
        "uri": "out/jobs/a/output.mp4",
        "key": "jobs/a/output.mp4",
        "bytes": 1,
        "files": 1,
        "identity": "sha256:0",
        "sha256": "0",
        "frames": 1,
        "fps": "16",
        "width": 64,
        "height": 48,
        "frames_sha256": "0",
    }
    old = ResultRecord.model_validate(json.loads(a_failure().to_json()) | {"status": "succeeded", "output": output})
    assert old.output.frames_hash is None
    new = ResultRecord.model_validate(json.loads(old.to_json()) | {"output": output | {"frames_hash": 2}})
    assert new.output.frames_hash == 2
    for record in (old, new):
        jsonschema.validate(json.loads(record.to_json()), schemas()["result.v1.schema.json"])


def test_lookups_are_told_by_cache():
    counters = {
        "prompt_cache_hits": 1,
        "clip_cache_misses": 2,
        "pose_cache_hits": 2,
        "pose_cache_misses": 1,
        "loads": 7,
    }
    reuse = reuse_of(counters, {"prompt_cache_bytes": 65536, "steps": 3})
    assert {name: (use.hits, use.misses, use.hit_rate, use.bytes) for name, use in reuse.items()} == {
        "prompt": (1, 0, 1.0, 65536),
        "clip": (0, 2, 0.0, None),
        "pose": (2, 1, 0.6667, None),
    }
    data = json.loads(a_failure(caches=counters, reuse=reuse).to_json())
    jsonschema.validate(data, schemas()["result.v1.schema.json"])
    assert ResultRecord.model_validate(data).reuse == reuse
    assert ResultRecord.model_validate({k: v for k, v in data.items() if k != "reuse"}).reuse == {}  # an older record


def test_environment_names_the_versions_that_decide_frames():
    packages = environment()["packages"]
    assert {"torch", "diffusers", "transformers", "av"} <= packages.keys()


def test_environment_names_the_gpus_and_their_driver(monkeypatch):
    """Frames are promised equal for the same GPU model and versions: so the record must tell them."""
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: f"NVIDIA Test {handle}",
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = environment.__wrapped__()
    assert (found["driver"], found["gpus"]) == ("580.65.06", ["NVIDIA Test 0", "NVIDIA Test 1"])
    nvml.nvmlDeviceGetName = None  # whatever it raises
    found = environment.__wrapped__()
    assert (found["driver"], found["gpus"]) == (None, [])
