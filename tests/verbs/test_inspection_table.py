"""The printed inspection: facts, a row a person, a line an advice; or one JSON object."""

from __future__ import annotations

import json

from runner.records.inspection import AdviceRecord
from runner.verbs.inspection_table import print_inspection
from tests.records.test_inspection import make_inspection, make_person


def test_print_inspection_shows_facts_people_and_advice_as_lines(capsys):
    advice = [
        AdviceRecord(code="people.several", text="2 people: [choose]", person=None, numbers={}),
        AdviceRecord(code="face.tiny", text="face 18 px: expect no expression", person=2, numbers={}),
    ]
    people = [make_person(1), make_person(2, face_px=18.0, seconds=2.5)]
    print_inspection(make_inspection(people=people, advice=advice, sheet="s.png"), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "samba.mp4: 640x480 · 250 frames in 10.00 s · 25 fps · no cuts · blur 0.30 · sound"
    assert lines[1].startswith(
        "person  seconds  from  to   face px  sharpness  hands inside  fingers seen  feet inside"
    )
    assert lines[3].split() == ["2", "2.5", "0.0", "9.9", "18", "300", "100%", "100%", "100%"]
    assert lines[4:] == ["! 2 people: [choose]", "! person 2: face 18 px: expect no expression", "sheet: s.png"]


def test_print_inspection_without_advice_says_no_advice(capsys):
    print_inspection(make_inspection(people=[], advice=[]), as_json=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["no advice: no problem was found"]


def test_print_inspection_json_is_one_object_without_secrets(capsys):
    found = make_inspection(source="s3://b/v.mp4?X-Amz-Signature=0123456789abcdef0123456789abcdef")
    print_inspection(found, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    data = json.loads(line)
    assert data["people"][0]["number"] == 1 and data["video"]["frames"] == 250
    assert "0123456789abcdef" not in line
