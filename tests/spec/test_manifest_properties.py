"""Manifest, as properties: two ways of writing say the same, and no text brings out anything but ManifestInvalid.

Oracles: `yaml.safe_dump` and `json.dumps` write what the parser reads; jsonschema judges the exported schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runner.errors import ManifestInvalid
from runner.spec.manifest import manifest_schema, parse_manifest
from runner.spec.matrix import ID_PATTERN
from runner.spec.options import DEFAULT_PROMPT, JobOptions
from runner.spec.regression_limits import RegressionLimits
from runner.spec.source import decode
from runner.spec.text import TextInvalid
from tests.spec.test_manifest import BASE, EXAMPLE, LIMITED, WRONG, job, problems
from tests.spec.test_regression_limits import LIMITS, said

SCHEMA = manifest_schema()
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# `safe_dump(allow_unicode=True)` writes these line breaks and marks as they are, though no reader gives them back.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029\ufeff")
TEXT = st.text(LETTERS, max_size=20)
IDS = st.from_regex(ID_PATTERN, fullmatch=True).filter(lambda name: name not in (".", ".."))
PLACES = st.one_of(
    st.text(LETTERS, min_size=1, max_size=20).filter(
        lambda name: "://" not in name and name[0] not in "~/" and name[-1] != "/" and name.isprintable()
    ),
    st.from_regex(r"s3://[a-z]{3,8}/[a-z /]{1,8}[a-z]", fullmatch=True),
    st.from_regex(r"/[a-z /]{1,8}[a-z]", fullmatch=True),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "size": st.one_of(
            st.just("auto"), st.tuples(*[st.integers(1, 256)] * 2).map(lambda s: f"{16 * s[0]}x{16 * s[1]}")
        ),
        "fps": st.one_of(st.just("source"), st.integers(1, 120), st.floats(0.01, 120)),
        "start_s": st.floats(0, 1e9),
        "max_frames": st.integers(2, 10**6),
        "seed": st.integers(0, 2**63 - 1),
        "steps": st.one_of(st.none(), st.integers(1, 100)),
        "guidance_scale": st.one_of(st.integers(0, 20), st.floats(0, 20)),
        "negative_prompt": TEXT,
        "max_segment_frames": st.integers(3, 60).map(lambda k: 4 * k + 1),
        "overlap_frames": st.sampled_from([1, 5]),
        "keep_audio": st.booleans(),
        "output": st.fixed_dictionaries(
            {}, optional={"crf": st.integers(0, 51), "format": st.sampled_from(["mp4", "png"])}
        ),
        "preprocess": st.fixed_dictionaries({}, optional={"parity": st.booleans(), "detect_every": st.integers(1, 60)}),
    },
)
JOBS = st.lists(
    st.fixed_dictionaries(
        {"id": IDS, "reference": PLACES, "video": PLACES},
        optional={"prompt": TEXT, "options": OPTIONS, "regression": st.none() | LIMITS},
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda words: words["id"].lower(),
)
DEFAULTS = st.fixed_dictionaries({}, optional={"prompt": TEXT, "options": OPTIONS})


def deep(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """An independent statement of the merge: words over words, null over both."""
    merged = dict(under)
    for key, value in over.items():
        merged[key] = deep(under.get(key) or {}, value) if isinstance(value, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


@unhurried
@given(jobs=JOBS, defaults=DEFAULTS, limits=LIMITS, unicode=st.booleans(), flow=st.sampled_from([None, True, False]))
def test_yaml_and_json_lines_say_the_same(jobs, defaults, limits, unicode, flow):
    document = {"version": 1, "defaults": defaults, "regression": limits, "jobs": jobs}
    as_yaml = yaml.safe_dump(document, allow_unicode=unicode, default_flow_style=flow)
    as_lines = "\n".join(
        json.dumps(line, ensure_ascii=not unicode) for line in [{"defaults": defaults, "regression": limits}, *jobs]
    )
    expected = [
        (
            words["id"],
            *(p if "://" in (p := words[key]) else str(Path(BASE, p)) for key in ("reference", "video")),
            words.get("prompt", defaults.get("prompt", DEFAULT_PROMPT)),
            JobOptions.model_validate(deep(defaults.get("options", {}), words.get("options", {}))),
            RegressionLimits.model_validate(limits | said(words.get("regression") or {})),
        )
        for words in jobs
    ]
    for text, source in ((as_yaml, "m.yaml"), (as_yaml, "-"), (as_lines, "m.jsonl"), (as_lines, "-")):
        manifest = parse_manifest(text, base=BASE, source=source)
        assert [(j.id, j.reference, j.video, j.prompt, j.options, j.regression) for j in manifest.jobs] == expected
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


NASTY = [
    *(
        "*a",
        "&a ",
        "<<: ",
        "!!python/name:x ",
        "- ",
        "? ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        ": ",
        "\n",
        "\t",
        "#",
        "|\n",
        "~",
    ),
    *("null", "NaN", "\ud7ff", "\0", "\x85", "%YAML 9.9\n", "---\n", "...\n", "1_0", "0b", "9" * 20, "s3://"),
]
EDITS = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 12), st.one_of(st.sampled_from(NASTY), st.text(max_size=3))),
    min_size=1,
    max_size=6,
)
LINES = """\
{"defaults": {"options": {"seed": 1}}}
{"id": "a", "reference": "r.png", "video": "v.mp4", "options": {"fps": 8}}
"""


def told_or_read(text: str, source: str) -> None:
    """Nothing but ManifestInvalid comes out, and it says something."""
    try:
        manifest = parse_manifest(text, base=BASE, source=source)
    except ManifestInvalid as err:
        told = err.problems
        str(err).encode()  # can be printed
    else:
        told = [job.id for job in manifest.jobs]
    assert told
    assert all(told)


@unhurried
@given(original=st.sampled_from([EXAMPLE, LIMITED, WRONG, LINES]), edits=EDITS)
def test_mutations_are_told_or_read(original, edits):
    for at, length, put in edits:
        start = at % (len(original) + 1)
        original = original[:start] + put + original[start + length :]
    for source in ("m.yaml", "m.jsonl", "-"):
        told_or_read(original, source)


@unhurried
@given(st.binary(max_size=60))
@example(b"\xff\xfe\x00")
@example(b"!!timestamp 9999-99-99")
@example(b"!!int 0b")
@example(b"!!float .")
@example(b"!!bool x")
@example(b"? *x")
@example(b"{? {a: b} : c}")
@example(b"<<: [*a, {b: c}]")
def test_garbage_is_told(raw):
    try:
        text = decode(raw)
    except TextInvalid:
        return
    for source in ("m.yaml", "m.jsonl", "-"):
        told_or_read(text, source)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
MANIFEST_KEYS = ("version", "recipe", "memory", "defaults", "jobs", "matrix", "x-a", "references", "videos", "options")
LIMIT_KEYS = ("regression", *RegressionLimits.model_fields)
JOB_KEYS = ("id", "custom_id", "reference", "video", "mask", "prompt", "crf", "parity", *JobOptions.model_fields)
KEYS = st.sampled_from(MANIFEST_KEYS + JOB_KEYS + LIMIT_KEYS)
SHAPED = st.recursive(
    ANYTHING,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


@unhurried
@given(st.dictionaries(KEYS, SHAPED, max_size=4))
def test_any_value_under_any_key_is_told_or_read(words):
    told_or_read(yaml.safe_dump(words), "m.yaml")
    told_or_read(yaml.safe_dump({"version": 1, "defaults": words, "jobs": [words]}), "m.yaml")
    told_or_read(json.dumps(words), "m.jsonl")
    options = {"id": "a", "reference": "r", "video": "v", "options": words}
    told_or_read(json.dumps({"defaults": {"options": words}}) + "\n" + json.dumps(options), "m.jsonl")


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_accepts_the_example_and_refuses_what_the_parser_refuses():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    for text in (EXAMPLE, LIMITED):
        validator.validate(yaml.safe_load(text))
    for text in (
        job(zzz=1), job(id="../x"), job(options={"size": "480"}), job(options={"zzz": 1}), job(options={"seed": "5"}),
        job(options={"overlap_frames": 3}), job(options={"output": {"crf": 99}}), job(custom_id="b"), "jobs: []",
        job(regression=5), job(regression={"psnr": 30}), job(regression={"psnr_min": "30"}),
        job(regression={"ssim_min": 2}), job(regression={"seconds_max": 1.2}), job(regression={"memory_max": "0.5x"}),
        job() + "regression: []",
        job() + "matrix: {references: [r], videos: [v], regression: {same_frames: 1}}",
    ):  # fmt: skip
        problems(text)
        assert not validator.is_valid(yaml.safe_load(text)), text


def test_options_tell_their_own_defaults():
    fields = SCHEMA["$defs"]["JobOptions"]["properties"]
    assert {name: field["anyOf"][0].get("default") for name, field in fields.items() if "$ref" not in field["anyOf"][0]}
    assert fields["seed"]["anyOf"][0]["default"] == JobOptions().seed == 42
    assert set(fields) == set(JobOptions.model_fields)
