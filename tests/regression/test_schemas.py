"""The committed schemas of a comparison and of a night are those of the models, and a report fits."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from runner.regression.findings import NightComparison
from runner.regression.nights import Night, collect_nights
from runner.regression.schemas import comparison_schemas
from tests.regression.night_records import digest_list, rendered
from tests.regression.report_samples import make_comparison, make_finding

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"


@pytest.mark.parametrize("name", sorted(comparison_schemas()))
def test_the_committed_schema_is_the_model_s(name):
    committed = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    assert committed == comparison_schemas()[name], "run: python -m runner.regression.schemas schemas"


def test_a_comparison_fits_its_schema_and_reads_back():
    comparison = make_comparison([make_finding("broken"), make_finding("identical")])
    data = json.loads(comparison.to_json())
    jsonschema.validate(data, comparison_schemas()["comparison.v1.schema.json"])
    assert NightComparison.model_validate(data) == comparison
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data | {"exit_code": "four"}, comparison_schemas()["comparison.v1.schema.json"])


def test_a_night_fits_its_schema_and_reads_back():
    (found,) = collect_nights([(rendered(digest_list(1, 2)), None)], "night-1")
    data = json.loads(found.to_json())
    jsonschema.validate(data, comparison_schemas()["night.v1.schema.json"])
    assert Night.model_validate(data) == found
