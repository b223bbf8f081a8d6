"""Frozen manifest: what is read from its text is what was written, job by job and fingerprint by fingerprint."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.batch.fingerprint import fingerprint_parts
from runner.errors import ConfigInvalid, ManifestInvalid
from runner.records.record import InputRecord
from runner.spec import frozen_manifest as module
from runner.spec.frozen_manifest import freeze_manifest, replace_places, write_manifest
from runner.spec.manifest import Job, Manifest, parse_manifest
from tests.spec.test_manifest import BASE, EXAMPLE
from tests.spec.test_manifest_properties import DEFAULTS, IDS, JOBS, OPTIONS, PLACES, unhurried
from tests.spec.test_regression_limits import LIMITS

RUN_KEYS = st.fixed_dictionaries(
    {},
    optional={
        "recipe": st.sampled_from(["bf16", "fp4-distill+euler", "fp4-fast+steps4"]),
        "memory": st.sampled_from(["auto", "stream"]),
    },
)
SUBJECT = st.sampled_from(["centre", 2, [0, 1.5, 20, 30]])
MASK = st.fixed_dictionaries({}, optional={"iterations": st.integers(0, 50), "w_len": st.none() | st.integers(1, 9)})
LORAS = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["a", "b"])}, optional={"strength": st.floats(-4, 4)}),
    max_size=1,
)
MORE = st.fixed_dictionaries({"loras": LORAS, "preprocess": st.fixed_dictionaries({"subject": SUBJECT, "mask": MASK})})
PEOPLE = st.fixed_dictionaries({"id": IDS.map("p-{}".format)}, optional={"options": MORE | OPTIONS})
MASKED = st.fixed_dictionaries({"reference": PLACES, "video": PLACES, "mask": PLACES})
FOLDERS = PLACES.map(lambda place: {"from": place})


def parts_of(job: Job) -> dict[str, Any]:
    """With the places in the place of what lies there."""
    uris = {"reference": job.reference, "video": job.video, "mask": job.mask or ""}
    inputs = {name: InputRecord(uri=uri, bytes=0, identity=uri) for name, uri in uris.items()}
    return fingerprint_parts(job, inputs, {})


def same(found: Manifest, wanted: Manifest) -> None:
    assert (found.version, found.recipe, found.memory) == (wanted.version, wanted.recipe, wanted.memory)
    assert [job.id for job in found.jobs] == [job.id for job in wanted.jobs]
    for one, other in zip(found.jobs, wanted.jobs, strict=True):
        assert json.dumps(parts_of(one)) == json.dumps(parts_of(other))
        assert (one.official, one.regression) == (other.official, other.regression)
        if one.official is None:
            assert replace(one, line=None) == replace(other, line=None)


@settings(unhurried, max_examples=40)
@given(jobs=JOBS, defaults=DEFAULTS, limits=LIMITS, run_keys=RUN_KEYS, extra=PEOPLE, mask=MASKED, folder=FOLDERS)
def test_what_is_written_is_read_again(jobs, defaults, limits, run_keys, extra, mask, folder):
    """Jobs of each kind: plain ones, one with a mask, one with official files, under defaults and limits."""
    options = dict(extra.get("options", {}))
    masked = extra | mask | {"options": options | {"mode": "replace"}}
    official = {"id": "o-" + extra["id"], "options": options | {"preprocess": folder}}
    taken = {job["id"].lower() for job in jobs}
    jobs = jobs + [job for job in (masked, official) if job["id"].lower() not in taken]
    header = {"version": 1, "defaults": defaults, "regression": limits} | run_keys
    try:
        manifest = parse_manifest("\n".join(map(json.dumps, [header, *jobs])), base=BASE, source="m.jsonl")
    except ManifestInvalid:
        return  # e.g. a folder that ends in a slash
    same(parse_manifest(write_manifest(manifest), base="/nowhere", source="frozen.jsonl"), manifest)
    assert freeze_manifest(manifest).decode() == write_manifest(manifest)


def test_the_text_has_a_line_of_run_keys_and_a_line_a_job_and_no_default():
    manifest = parse_manifest(EXAMPLE, base=BASE, source="m.yaml")
    header, first, second, *matrix = map(json.loads, write_manifest(manifest).splitlines())
    assert header == {
        "version": 1,
        "recipe": "bf16",
        "memory": "stream",
        "defaults": {"options": {"size": "480x832", "fps": 30.0}},
    }
    assert first == {
        "id": "anna-waltz",
        "reference": f"{BASE}/refs/anna.png",
        "video": "s3://bucket/dances/waltz.mp4",
        "prompt": "a dance",
        "options": {"seed": 7, "max_frames": 81, "preprocess": {"detect_every": 3, "parity": True}},
    }
    assert second == {
        "id": "cleared",
        "reference": "/elsewhere/b.png",
        "video": "/elsewhere/my dance.mp4",
        "mask": f"{BASE}/masks/b.mp4",
        "options": {"mode": "replace", "steps": 4, "output": {"crf": 30}},
    }
    assert len(matrix) == 4
    assert all(line["options"] == {"seed": 7, "preprocess": {"detect_every": 3}, "keep_audio": True} for line in matrix)


def test_a_choice_of_the_default_stays_a_choice():
    """Who says `subject: largest` is not warned of several people, also after the manifest was written and read."""
    inputs = {"reference": "/a.png", "video": "/b.mp4"}
    jobs = [{"id": "silent", **inputs}, {"id": "chosen", "options": {"preprocess": {"subject": "largest"}}, **inputs}]
    defaults = {"options": {"preprocess": {"smooth": True}}}
    document = json.dumps({"version": 1, "defaults": defaults, "jobs": jobs})
    manifest = parse_manifest(document, base="/", source="m.json")
    moved = freeze_manifest(replace_places(manifest, str.upper)).decode()
    again = parse_manifest(moved, base="/", source="frozen.jsonl")
    for found in (manifest.jobs, again.jobs, pickle.loads(pickle.dumps(again.jobs))):
        assert ["subject" in job.options.preprocess.model_fields_set for job in found] == [False, True]


def test_what_all_jobs_of_a_matrix_have_in_common_is_written_once(monkeypatch):
    """Else a matrix that a manifest may hold would have too many values to be read once it is written out."""
    columns = {name: [f"{name}/{n}.x" for n in range(30)] for name in ("references", "videos")}
    options = {"size": "480x832", "seed": 7, "steps": 4, "fps": 30, "output": {"crf": 20}}
    document = {"version": 1, "matrix": columns | {"prompt": "a dance", "options": options}}
    manifest = parse_manifest(json.dumps(document), base="s3://bucket/show", source="m.yaml")
    monkeypatch.setattr("runner.spec.source.MAX_VALUES", 900 * 9)
    data = freeze_manifest(manifest)
    assert len(manifest.jobs) == 900
    assert len(data) < 900 * 120
    assert set(json.loads(data.splitlines()[-1])) == {"id", "reference", "video"}


def test_a_manifest_that_would_be_too_large_is_refused(monkeypatch):
    manifest = parse_manifest(EXAMPLE, base=BASE, source="m.yaml")
    monkeypatch.setattr(module, "MAX_BYTES", 500)
    with pytest.raises(ConfigInvalid, match=r"^m\.yaml: the manifest with its 6 jobs written out is too large"):
        freeze_manifest(manifest)
    monkeypatch.undo()
    monkeypatch.setattr("runner.spec.source.MAX_VALUES", 30)
    with pytest.raises(ConfigInvalid, match="with its 6 jobs written out is too large"):
        freeze_manifest(manifest)


def test_places_are_replaced_and_nothing_else():
    text = {"version": 1, "jobs": [
        {"id": "a", "reference": "r.png", "video": "v.mp4", "mask": "m.mp4", "options": {"mode": "replace"}},
        {"id": "b", "options": {"seed": 5, "preprocess": {"from": "folder/"}}},
    ]}  # fmt: skip
    manifest = parse_manifest(json.dumps(text), base=BASE, source="m.yaml")
    moved = replace_places(manifest, lambda place: place.replace(BASE, "s3://bucket/in"))
    first, second = moved.jobs
    assert (first.reference, first.video, first.mask) == tuple(
        f"s3://bucket/in/{x}" for x in ("r.png", "v.mp4", "m.mp4")
    )
    assert (second.official, second.reference) == ("s3://bucket/in/folder", "s3://bucket/in/folder/src_ref.png")
    assert second.video == "s3://bucket/in/folder/src_pose.mp4"
    same(parse_manifest(freeze_manifest(moved).decode(), base="/", source="f.jsonl"), moved)
    for job, other in zip(manifest.jobs, moved.jobs, strict=True):
        parts, others = ({k: v for k, v in parts_of(j).items() if not k.startswith("input.")} for j in (job, other))
        assert parts == others


def test_a_scheme_of_another_machine_is_taken_only_where_it_is_named():
    line = '{"id": "a", "reference": "gs://bucket/r.png", "video": "gs://bucket/v.mp4"}'
    with pytest.raises(ManifestInvalid, match="gs:// is not supported"):
        parse_manifest(line, base=BASE, source="m.jsonl")
    with pytest.raises(ManifestInvalid, match="must name a bucket and a key"):
        parse_manifest(line.replace("bucket/v.mp4", "bucket"), base=BASE, source="m.jsonl", foreign=["gs"])
    manifest = parse_manifest(line, base=BASE, source="m.jsonl", foreign=["gs"])
    assert manifest.jobs[0].reference == "gs://bucket/r.png"
    assert json.loads(freeze_manifest(manifest).splitlines()[1]) == json.loads(line)
