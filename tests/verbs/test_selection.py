"""Selection: globs and a limit choose the same jobs at every call; a glob that fits no job is told with near ids."""

from __future__ import annotations

import json

import pytest

from runner.errors import ConfigInvalid
from runner.spec.manifest import parse_manifest
from runner.verbs.chosen_jobs import choose_jobs
from runner.verbs.plan import plan
from runner.verbs.selection import fits, select_jobs
from runner.verbs.settings import PlanSettings, RunSettings, ValidateSettings
from runner.verbs.validate import validate

IDS = ("anna-wave", "bela-wave", "Anna-samba", "anna-jacks", "cleo")


@pytest.fixture
def manifest(tmp_path):
    jobs = [{"id": name, "reference": "none.png", "video": "none.mp4"} for name in IDS]
    return parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=str(tmp_path), source="m.json")


def chosen(manifest, *only: str, limit: int | None = None) -> list[str]:
    return [job.id for job in select_jobs(manifest.jobs, only, limit)]


def test_globs_choose_in_the_manifest_s_order_and_the_limit_counts_what_they_leave(manifest):
    assert chosen(manifest) == list(IDS)
    assert chosen(manifest, "cleo", "anna-*") == ["anna-wave", "anna-jacks", "cleo"]
    assert chosen(manifest, "anna-*", limit=1) == ["anna-wave"]
    assert chosen(manifest, "*-wave", "*a-wave") == ["anna-wave", "bela-wave"], "each job once"
    assert chosen(manifest, limit=2) == ["anna-wave", "bela-wave"]
    assert chosen(manifest, limit=99) == list(IDS)


def test_upper_and_lower_case_are_told_apart():
    assert fits("Anna-samba", ["A*"]) and not fits("Anna-samba", ["a*"])
    assert fits("anything", [])


def test_a_glob_that_fits_no_job_is_told_with_the_nearest_ids(manifest):
    with pytest.raises(ConfigInvalid) as caught:
        chosen(manifest, "anna-*", "ana-wave", "anna-samba*", "zzz")
    message = caught.value.message
    assert "no job of the manifest fits 'ana-wave'; did you mean anna-wave or " in message
    assert "no job of the manifest fits 'anna-samba*'; did you mean Anna-samba" in message
    assert "fits 'zzz';" not in message and "fits 'zzz'" in message
    assert "'anna-*'" not in caught.value.what and caught.value.exit_code == 2


def test_the_limit_comes_before_the_shard(manifest):
    settings = {"manifest": manifest, "out": "out", "limit": 4}
    shares = [choose_jobs(RunSettings(**settings, shard=f"{index}/2")) for index in range(2)]
    ids = [[job.id for job in jobs] for _, jobs, _, _ in shares]
    assert sorted(ids[0] + ids[1]) == sorted(IDS[:4]) and all(ids)
    assert [job.id for job in shares[0][0].jobs] == list(IDS), "the manifest stays whole"


def test_validate_and_plan_take_the_same_jobs(manifest):
    found = validate(ValidateSettings(manifest=manifest, only=["anna-*"], limit=1))
    assert [name for name, _ in found.problems] == ["anna-wave"] * 2
    assert [job.id for job in found.manifest.jobs] == ["anna-wave"]
    assert [row.job_id for row in plan(PlanSettings(manifest=manifest, models=None, only=["*-wave"])).jobs] == [
        "anna-wave",
        "bela-wave",
    ]


@pytest.mark.parametrize("make", [RunSettings, PlanSettings, ValidateSettings])
@pytest.mark.parametrize("limit", [0, -1, "1.5", "x", True])
def test_a_limit_is_one_or_more(make, limit):
    more = {"out": "out"} if make is RunSettings else {}
    with pytest.raises(ConfigInvalid, match="--limit: must be a whole number, 1 or more"):
        make(manifest="m.yaml", limit=limit, **more)
