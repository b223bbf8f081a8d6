"""Inspections: the committed schema is the model's, and what is written fits it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from runner.records.inspection import (
    AdviceRecord,
    Inspection,
    LookRecord,
    PersonRecord,
    VideoRecord,
    inspection_schemas,
)

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"


def make_video(**more) -> VideoRecord:
    """Ten seconds of 640x480 at 25 frames a second, in which nothing stands out."""
    values = {
        "frames": 250,
        "duration_s": 10.0,
        "width": 640,
        "height": 480,
        "rotation_degrees": 0,
        "has_audio": True,
        "fps": "25",
        "fps_measured": 25.0,
        "variable_rate": False,
        "frame_s_shortest": 0.04,
        "frame_s_longest": 0.04,
        "cuts": [],
        "repeated_frames": 0,
        "repeats": None,
        "still": [],
        "blur": 0.3,
    }
    return VideoRecord(**(values | more))


def make_person(number: int = 1, **more) -> PersonRecord:
    """Somebody who is seen well all the time."""
    values = {
        "number": number,
        "seconds": 10.0,
        "begin_s": 0.0,
        "end_s": 9.9,
        "face_px": 90.0,
        "sharpness": 300.0,
        "hands_inside": 1.0,
        "fingers_seen": 1.0,
        "feet_inside": 1.0,
        "looks": [LookRecord(frame=0, box=(10.0, 20.0, 110.0, 420.0))],
    }
    return PersonRecord(**(values | more))


def make_inspection(**more) -> Inspection:
    values = {
        "source": "samba.mp4",
        "video": make_video(),
        "people_looked_for": True,
        "look_s": 0.1,
        "people": [make_person()],
        "advice": [AdviceRecord(code="face.tiny", text="face 18 px", person=1, numbers={"face_px": 18.0})],
        "sheet": None,
    }
    return Inspection(**(values | more))


def test_the_committed_schema_is_the_model_s():
    ((name, schema),) = inspection_schemas().items()
    assert name == "inspection.v1.schema.json"
    committed = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    assert committed == schema, "run: python -m runner.records.inspection schemas"
    jsonschema.Draft202012Validator.check_schema(committed)


def test_an_inspection_fits_its_schema_and_reads_back():
    found = make_inspection()
    data = json.loads(found.to_json())
    schema = inspection_schemas()["inspection.v1.schema.json"]
    jsonschema.validate(data, schema)
    assert Inspection.model_validate(data) == found
    for wrong in ({"people": None}, {"people": [{"number": 0}]}, {"video": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | wrong, schema)
