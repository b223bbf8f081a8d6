"""Manifest: what is written is run, from YAML and from JSON lines; what is wrong is told, all of it, with its line.

Properties, with oracles, are in test_manifest_properties.py.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import textwrap
from typing import Any

import pytest
import yaml

from runner.errors import ManifestInvalid
from runner.spec import text as module
from runner.spec.manifest import Manifest, parse_manifest
from runner.spec.options import DEFAULT_PROMPT, JobOptions
from runner.spec.regression_limits import RegressionLimits
from runner.spec.text import parse_yaml

BASE = "/data/show"


def parse(text: str, source: str = "m.yaml", base: str = BASE) -> Manifest:
    return parse_manifest(textwrap.dedent(text), base=base, source=source)


def problems(text: str, source: str = "m.yaml", base: str = BASE) -> list[str]:
    with pytest.raises(ManifestInvalid) as caught:
        parse(text, source, base)
    assert caught.value.exit_code == 2
    return caught.value.problems


def job(**said: Any) -> str:
    """A manifest of one job, `said` over the least that a job says."""
    words = {"id": "a", "reference": "a.png", "video": "b.mp4"} | said
    return yaml.safe_dump({"version": 1, "jobs": [words]}, allow_unicode=True)


def only_problem(text: str, source: str = "m.yaml") -> str:
    found = problems(text, source)
    assert len(found) == 1, found
    return found[0]


# --- what a manifest says ---------------------------------------------------------------------------------------------

EXAMPLE = """\
version: 1
recipe: bf16
memory: stream
x-fast: &fast {steps: 4, output: {crf: 30}}
defaults:
  prompt: "a dance"
  options: {size: 480x832, fps: 30, seed: 7, preprocess: {detect_every: 3}}
jobs:
  - id: anna-waltz
    reference: refs/anna.png
    video: s3://bucket/dances/waltz.mp4
    options: {max_frames: 81, preprocess: {parity: yes}}
  - custom_id: cleared
    reference: /elsewhere/b.png
    video: file:///elsewhere/my%20dance.mp4
    mask: masks/b.mp4
    prompt:
    options: {<<: *fast, mode: replace, seed: null, preprocess: null}
matrix:
  references: [refs/anna.png, refs/贝拉.png]
  videos: [dances/samba.mp4, dances/tango 2.mp4]
  options: {keep_audio: on}
"""


def test_parse_of_example_manifest_reads_every_key():
    manifest = parse(EXAMPLE)
    assert (manifest.version, manifest.recipe, manifest.memory, manifest.source) == (1, "bf16", "stream", "m.yaml")
    first, second, *matrix = manifest.jobs
    assert (first.id, first.reference, first.video, first.mask, first.prompt, first.line) == (
        "anna-waltz", f"{BASE}/refs/anna.png", "s3://bucket/dances/waltz.mp4", None, "a dance", 9,
    )  # fmt: skip
    defaults = {"size": "480x832", "fps": 30.0, "seed": 7, "preprocess": {"detect_every": 3}}
    assert first.options == JobOptions.model_validate(
        defaults | {"max_frames": 81, "preprocess": {"detect_every": 3, "parity": True}}
    )
    assert (second.id, second.reference, second.video) == ("cleared", "/elsewhere/b.png", "/elsewhere/my dance.mp4")
    assert (second.mask, second.prompt, second.line) == (f"{BASE}/masks/b.mp4", DEFAULT_PROMPT, 13)
    assert second.options == JobOptions.model_validate(
        {"size": "480x832", "fps": 30.0, "mode": "replace", "steps": 4, "output": {"crf": 30}}
    )
    assert [(j.reference, j.video) for j in matrix] == [
        (f"{BASE}/refs/{reference}.png", f"{BASE}/dances/{video}.mp4")
        for reference in ("anna", "贝拉")
        for video in ("samba", "tango 2")
    ]
    assert matrix[0].id == "anna-samba"
    assert all(j.options == JobOptions.model_validate(defaults | {"keep_audio": True}) for j in matrix)


def test_json_lines_with_header_and_comments_are_read():
    text = """\
        # the night's work

        {"defaults": {"prompt": "a dance", "options": {"steps": 4}}, "recipe": "bf16"}
        {"id": "a", "reference": "a.png", "video": "b.mp4"}
          # indented
        {"custom_id": "b", "reference": "s3://x/a.png", "video": "b.mp4", "options": {"steps": null, "fps": "source"}}
        """
    for source in ("jobs.jsonl", "-", "s3://bucket/jobs"):
        manifest = parse(text, source)
        assert manifest.recipe == "bf16"
        assert [(j.id, j.line, j.options.steps, j.options.fps) for j in manifest.jobs] == [
            ("a", 4, 4, 16.0), ("b", 6, None, "source"),
        ]  # fmt: skip


def test_manifest_format_without_suffix_is_found_by_content():
    assert parse('{"version": 1, "jobs": [{"id": "a", "reference": "r", "video": "v"}]}', "-").jobs[0].id == "a"
    assert parse('{version: 1, jobs: [{"id": "a", "reference": "r", "video": "v"}]}', "-").jobs[0].id == "a"
    assert parse('{\n"version": 1,\n"jobs": [{"id": "a", "reference": "r", "video": "v"}]\n}', "-").jobs[0].line == 3
    assert parse('{"id": "a", "reference": "r", "video": "v"}', "-").jobs[0].id == "a"


def test_yaml_dates_numbers_and_booleans_are_read_by_type_of_field():
    options = {"start_s": 1, "guidance_scale": 0.5, "seed": 2**62}
    (made,) = parse(
        job(options=options).replace("id: a\n", "id: 2026-01-02\n").replace("seed", "keep_audio: no\n    seed")
    ).jobs
    assert made.id == "2026-01-02"
    assert made.options == JobOptions(start_s=1.0, guidance_scale=0.5, seed=2**62)
    (made,) = parse(job(prompt="placeholder").replace("placeholder", "!!str 12")).jobs
    assert made.prompt == "12"


def test_yaml_aliases_and_merge_keys_are_resolved():
    manifest = parse("""\
        version: 1
        jobs:
          - &a {id: a, reference: a.png, video: v.mp4, options: &o {steps: 3, seed: 1}}
          - {<<: *a, id: b, options: {<<: [{seed: 9}, *o], fps: 8}}
          - {<<: *a, id: c}
        """)
    assert [(j.id, j.options.steps, j.options.seed, j.options.fps) for j in manifest.jobs] == [
        ("a", 3, 1, 16.0), ("b", 3, 9, 8.0), ("c", 3, 1, 16.0),
    ]  # fmt: skip


LIMITED = """\
version: 1
regression: {same_frames: true, psnr_min: 40, seconds_max: 1.5x}
jobs:
  - {id: plain, reference: r.png, video: v.mp4}
  - {id: own, reference: r.png, video: v.mp4, regression: {psnr_min: 30, memory_max: 2x, same_frames: null}}
  - {id: cleared, reference: r.png, video: v.mp4, regression: null}
matrix:
  references: [a.png]
  videos: [b.mp4, c.mp4]
  regression: {ssim_min: 0.9}
"""


def test_regression_limits_of_job_override_those_of_manifest():
    whole = {"same_frames": True, "psnr_min": 40, "seconds_max": "1.5x"}
    expected = {
        "plain": whole,
        "own": whole | {"psnr_min": 30, "memory_max": "2x"},
        "cleared": whole,
        "a-b": whole | {"ssim_min": 0.9},
        "a-c": whole | {"ssim_min": 0.9},
    }
    found = {job.id: job.regression for job in parse(LIMITED).jobs}
    assert found == {name: RegressionLimits.model_validate(words) for name, words in expected.items()}


def test_regression_limits_of_job_from_files_override_those_of_manifest():
    words = {"id": "a", "options": {"preprocess": {"from": "files"}}, "regression": {"same_frames": False}}
    text = yaml.safe_dump({"version": 1, "regression": {"same_frames": True, "psnr_min": 40}, "jobs": [words]})
    assert [job.regression for job in parse(text).jobs] == [RegressionLimits(same_frames=False, psnr_min=40)]


def test_regression_limits_in_json_lines_are_read():
    text = """\
        {"regression": {"psnr_min": 40}}
        {"id": "a", "reference": "r", "video": "v"}
        {"id": "b", "reference": "r", "video": "v", "regression": {"psnr_min": 30, "memory_max": "1.1x"}}
        """
    first, second = (job.regression for job in parse(text, "-").jobs)
    assert first == RegressionLimits(psnr_min=40)
    assert second == RegressionLimits.model_validate({"psnr_min": 30, "memory_max": "1.1x"})


def test_manifest_without_regression_has_no_limits():
    assert [job.regression for job in parse(job()).jobs] == [RegressionLimits()]


def test_wrong_regression_limits_are_listed_with_lines():
    text = """\
        version: 1
        regression: {psnr_mim: 30, seconds_max: 1.2}
        jobs:
          - {id: a, reference: r, video: v, regression: 5}
          - id: b
            reference: r
            video: v
            psnr_min: 4
            regression:
              ssim_min: 2
              memory_max: 0.5x
        matrix:
          references: [r]
          videos: [w]
          regression: {same_frames: 1}
        """
    keys = ", ".join(RegressionLimits.model_fields)
    factor = "must be a factor of the baseline, 1 or more, e.g. 1.2x"
    assert problems(text) == [
        f"line 2: regression.seconds_max: {factor}",
        "line 2: regression.psnr_mim: unknown key; did you mean psnr_min?",
        f"line 4: jobs[0].regression: must be a mapping (keys: {keys}), not the number 5",
        "line 8: jobs[1].psnr_min: belongs under regression",
        "line 10: jobs[1].regression.ssim_min: must be at most 1, not 2",
        f"line 11: jobs[1].regression.memory_max: {factor}",
        "line 15: matrix.regression.same_frames: must be yes or no, not the number 1",
    ]
    lines = '{"regression": {"psnr_min": "x"}}\n{"id": "a", "reference": "r", "video": "v", "regression": []}'
    first, second = problems(lines, "-")
    assert first == "line 1: regression.psnr_min: must be a number, not the text 'x'"
    assert second == f"line 2: regression: must be a mapping (keys: {keys}), not a list"


# --- what can be wrong with it ----------------------------------------------------------------------------------------

WRONG = """\
version: 2
recipee: fp4
memory: strem
defaults:
  promt: 4
  options: {size: 480x830, fps: abc, seed: 1_000, overlap_frames: 3}
jobs:
  - id: 007
    reference: refs/anna.png
    video: https://x/y.mp4
    seed: 5
    options: {stps: 4, seed: "5", max_frames: 1.5, preprocess: {detect_evry: 3}, output: 5}
  - id: ../x
    reference: [a]
    mask: m.png
    options: {mode: replce}
  - {id: a, reference: a.png, video: b.mp4, options: {mode: replace}}
  - {id: A, reference: a.png, video: b.mp4, mask: m.png}
  - {id: 12, reference: a.png, video: b/, options: {max_segment_frames: 9, overlap_frames: 5}}
  - 5
  - {id: a, reference: a.png, video: b.mp4, custom_id: q}
matrix:
  references: [a.png, ./a.png]
"""


def test_manifest_with_many_problems_lists_all_of_them():
    expected = [
        "line 1: version: 2 is unknown; this runner reads version: 1",
        "line 2: recipee: unknown key; did you mean recipe?",
        "line 3: memory: must be auto, resident, stream or minimal, not the text 'strem'; did you mean stream?",
        "line 5: defaults.promt: unknown key; did you mean prompt?",
        "line 6: defaults.options.fps: must be frames a second, at least 0.01 and at most 120, or source",
        "line 6: defaults.options.overlap_frames: must be 1 or 5, not the number 3",
        "line 6: defaults.options.seed: 1_000 means different things to different YAML tools; "
        "quote it ('1_000') if it is text, or write the number plainly, in digits",
        "line 6: defaults.options.size: width and height must be multiples of 16; the nearest is 480x832",
        "line 8: jobs[0].id: 007 means different things to different YAML tools; "
        "quote it ('007') if it is text, or write the number without the leading zero",
        "line 10: jobs[0].video: https:// is not supported; write a path or s3://bucket/key",
        "line 11: jobs[0].seed: belongs under options",
        "line 12: jobs[0].options.max_frames: must be a whole number, not the number 1.5",
        "line 12: jobs[0].options.output: must be a mapping (keys: format, crf, interpolate, pad_last), "
        "not the number 5",
        "line 12: jobs[0].options.preprocess.detect_evry: unknown key; did you mean detect_every?",
        "line 12: jobs[0].options.seed: must be a whole number, not the text '5'; write it without quotes",
        "line 12: jobs[0].options.stps: unknown key; did you mean steps?",
        "line 13: jobs[1].id: '../x' may hold only A-Z a-z 0-9 . _ - (it becomes a folder's name); try x",
        "line 13: jobs[1].video: is required",
        "line 14: jobs[1].reference: must be text, not a list",
        "line 16: jobs[1].options.mode: must be animate or replace, not the text 'replce'; did you mean replace?",
        "line 18: jobs[3].id: A differs only in case from a, which is taken by line 17; "
        "ids are folders, and must be unique",
        "line 18: jobs[3].mask: is used in mode replace only; drop it, or set options.mode: replace",
        "line 19: jobs[4].id: must be text, not the number 12; put it in quotes: '12'",
        "line 19: jobs[4].options: max_segment_frames must be at least 13 when overlap_frames is 5",
        "line 19: jobs[4].video: names a folder; name one file",
        "line 20: jobs[5]: must be a mapping",
        "line 21: jobs[6].custom_id: is another name of id; give one of the two",
        "line 21: jobs[6].id: a is taken by line 17; ids are folders, and must be unique",
        "line 22: matrix.videos: is required",
        "line 23: matrix.references[1]: is listed already, on line 23",
    ]
    found = problems(WRONG)
    lines = [int(re.match(r"line (\d+)", problem)[1]) for problem in found]
    assert lines == sorted(lines)
    found = [problem.split(" (keys: prompt")[0] for problem in found]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "480x830"}, "the nearest is 480x832"),
        ({"size": "480×832"}, "for example 480x832"),
        ({"size": "8192x480"}, "longer than 4096"),
        ({"size": 480}, "must be text, not the number 480"),
        ({"fps": 0}, "at least 0.01"),
        ({"fps": 0.0001}, "at least 0.01"),
        ({"fps": 1e-308}, "at least 0.01"),
        ({"fps": 1e308}, "at most 120"),
        ({"start_s": 1e308}, "must be at most 1000000000"),
        ({"fps": True}, "at least 0.01"),
        ({"fps": float("nan")}, "at least 0.01"),
        ({"loras": [{"name": "a"}, {"name": "b"}, {"name": "a", "strength": 2}]}, "options.loras: names 'a' twice"),
        ({"start_s": -1}, "must be at least 0, not -1"),
        ({"start_s": float("inf")}, "must be a finite number"),
        ({"start_s": "1:30"}, "must be a number, not the text '1:30'"),
        ({"max_frames": 1}, "must be at least 2, not 1"),
        ({"seed": -1}, "must be at least 0"),
        ({"seed": 2**63}, "must be less than 9223372036854775808"),
        ({"seed": 1.5}, "must be a whole number, not the number 1.5"),
        ({"seed": True}, "must be a whole number, not the yes/no value true"),
        ({"seed": [1]}, "must be a whole number, not a list"),
        ({"steps": 101}, "must be at most 100"),
        ({"guidance_scale": "1e0"}, "must be a number, not the text '1e0'; YAML takes it for text"),
        ({"guidance_scale": "1"}, "must be a number, not the text '1'; write it without quotes"),
        ({"keep_audio": 1}, "must be yes or no, not the number 1"),
        ({"keep_audio": "yes"}, "must be yes or no, not the text 'yes'"),
        ({"negative_prompt": 5}, "put it in quotes: '5'"),
        ({"max_segment_frames": 80}, "try 77 or 81"),
        ({"overlap_frames": 1.0}, "must be a whole number"),
        ({"overlap_frames": True}, "must be a whole number"),
        ({"output": {"crf": 52}}, "options.output.crf: must be at most 51, not 52"),
        ({"output": {"format": "mov"}}, "must be mp4 or png"),
        ({"crf": 20}, "options.crf: belongs under options.output"),
        ({"detect_evry": 20}, "did you mean options.preprocess.detect_every?"),
        ({"zzz": 20}, "options.zzz: unknown key; known here: mode, size"),
        ([], "must be a mapping"),
    ],
)
def test_wrong_option_is_named_with_line(options, message):
    told = only_problem(job(options=options))
    assert re.match(r"line \d+: jobs\[0\]\.options", told)
    assert message in told


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"id": ""}, "jobs[0].id: must not be empty"),
        ({"id": "."}, "names a folder"),
        ({"id": ".."}, "names a folder"),
        ({"id": "a/b"}, "try a-b"),
        ({"id": "舞"}, "may hold only"),
        ({"id": "x" * 129}, "129 characters"),
        ({"id": None}, "jobs[0].id: is required"),
        ({"id": False}, "put it in quotes: 'false'"),
        ({"id": None, "custom_id": "../x"}, "jobs[0].custom_id: '../x' may hold only"),
        ({"reference": None}, "must be text, not nothing"),
        ({"reference": ""}, "must not be empty"),
        ({"video": "dances/"}, "names a folder"),
        ({"prompt": 5}, "put it in quotes: '5'"),
        ({"image": "a.png"}, "jobs[0].image: unknown key"),
        ({"refrence": "a.png"}, "did you mean reference?"),
        ({"seed": 5}, "belongs under options"),
        ({"mask": "m.mp4"}, "mode replace only"),
        ({"mask": 5, "options": {"mode": "replace"}}, "must be text, not the number 5"),
    ],
)
def test_wrong_key_or_value_of_job_is_named(said, message):
    assert message in only_problem(job(**said))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("[]", "must be a mapping"),
        ("version: 1", "has no jobs"),
        ("version: 1\njobs:\nmatrix:\n", "has no jobs"),
        ("jobs: [{id: a, reference: r, video: v}]", "version: is required"),
        ("version: yes\njobs: [{id: a, reference: r, video: v}]", "version: must be a whole number"),
        ("version: 1\nrecipe: none\njobs: [{id: a, reference: r, video: v}]", "line 2: recipe: no recipe 'none'."),
        ("version: 1\nrecipe: fp4+unipc+euler\njobs: [{id: a, reference: r, video: v}]", "both 'unipc' and 'euler'."),
        ("version: 1\nrecipe: ''\njobs: [{id: a, reference: r, video: v}]", "line 2: recipe: must not be empty"),
        ("version: 1\njobs: a.png", "line 2: jobs: must be a list, not the text 'a.png'"),
        ("version: 1\njobs: [{id: a, reference: r, video: v}", "line 2: not valid YAML"),
        ("version: 1\njobs:\n\t- a", "line 3: not valid YAML"),
        ("version: 1\n---\nversion: 1", "line 2: a second document"),
        ("version: 1\njobs: [*gone]", "line 2: jobs[0]: the alias *gone has no anchor &gone"),
        ("version: 1\njobs: &j [*j]", "line 2: jobs[0]: the alias *j contains itself"),
        ("version: 1\njobs: [{<<: 5, id: a, reference: r, video: v}]", "jobs[0].<<: must be a mapping"),
        ("version: 1\n? [a]\n: b\njobs: [{id: a, reference: r, video: v}]", "line 2: a key must be text"),
        ("version: 1\njobs: [{id: !!python/name:os.system x, reference: r, video: v}]", "tag !!python/name:os.sys"),
        ("version: 1\njobs: !!python/object/apply:os.system [{id: a, reference: r, video: v}]", "plain text"),
        ("version: 1\njobs: [{id: a, reference: r, video: v, options: {seed: !!int x}}]", "'x' is not a valid int"),
        ("version: 1\njobs:\n - {id: a, reference: r, video: v,\n    id: b}", "line 4: jobs[0].id: written twice; the"),
        ("version: 1\nversion: 1\njobs: [{id: a, reference: r, video: v}]", "line 2: version: written twice"),
        ("version: 1\nmatrix: {references: [], videos: [v]}", "matrix.references: must not be empty"),
        ("version: 1\nmatrix: {references: [r], videos: v}", "matrix.videos: must be a list"),
        ("version: 1\njobs: [{id: r-v, reference: r, video: v}]\nmatrix: {references: [r], videos: [v]}", "by line 2"),
    ],
)  # fmt: skip
def test_wrong_document_is_refused_with_reason(text, message):
    assert message in only_problem(text)


JOBS = "jobs: [{id: a, reference: r, video: v, options: {stps: 4}}, {id: b, video: v}]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (JOBS, ["version: is required", "options.stps: unknown key", "jobs[1].reference: is required"]),
        ("defaults: {promt: x}\n" + JOBS, ["version:", "defaults.promt:", "jobs[0].options.stps:", "jobs[1].ref"]),
        ("memory: strem\n" + JOBS, ["version:", "memory:", "jobs[0].options.stps:", "jobs[1].reference:"]),
        ("memory: auto", ["version: is required", "has no jobs"]),
        ("memory: auto\njob: []", ["version: is required", "job: unknown key; did you mean jobs?"]),
        ("jobs: a.png", ["version: is required", "jobs: must be a list"]),
        ("matrix: {references: [], videos: [v]}", ["version: is required", "matrix.references: must not be empty"]),
    ],
)
def test_missing_version_hides_no_other_problem(text, expected):
    found = problems(text)
    assert len(found) == len(expected)
    for sentence in expected:
        assert any(sentence in problem for problem in found), (sentence, found)


def test_unknown_recipe_is_listed_with_other_problems():
    """`get_recipe` decides, whether the manifest is YAML or JSON lines."""
    text = "version: 1\nmemory: strem\nrecipe: fp4-distil+fp8\n" + JOBS
    known = "Recipes: fp4-distill, fp4-fast, fp4, bf16, fp32; after a +: "
    near = f"recipe: no recipe 'fp4-distil+fp8'; did you mean 'fp4-distill+fp8'? {known}"
    assert [problem.split(": ")[1] for problem in problems(text)] == [
        "memory", "recipe", "jobs[0].options.stps", "jobs[1].reference",
    ]  # fmt: skip
    assert problems(text)[1].startswith(f"line 3: {near}")
    lines = '{"recipe": "nonsense"}\n{"id": "a", "reference": "r", "vido": "v"}'
    assert problems(lines, "m.jsonl")[0].startswith(f"line 1: recipe: no recipe 'nonsense'. {known}")
    assert len(problems(lines, "m.jsonl")) == 3
    assert parse(f"recipe: fp4-distill+fp8+steps4\n{job()}").recipe == "fp4-distill+fp8+steps4"


def test_broken_json_lines_are_all_listed():
    found = problems(
        """\
        {"id": "a", "reference": "r", "video": "v",}
        {"id": "b", "reference": "r", "video": "v", "id": "c"}
        {"id": "c", "reference": "r", "video": NaN}
        {"id": "d", "reference": "r", "vido": "v"}
        {"defaults": {}}
        ["e"]
        {"id": "\\ud800", "reference": "r", "video": "v"}
        {"id": "D", "reference": "r", "video": "v", "options": {"stps": 3}}
        """,
        "-",
    )
    starts = [
        "line 1: not valid JSON", "line 2: id: written twice", "line 3: not valid JSON: NaN",
        "line 4: vido: unknown key; did you mean video?", "line 4: video: is required",
        "line 5: only the first line", "line 6: must be a mapping", "line 7: '\\ud800' has half a character",
        "line 8: id: D differs only in case from d", "line 8: options.stps: unknown key; did you mean steps?",
    ]  # fmt: skip
    assert len(found) == len(starts)
    assert all(any(problem.startswith(start) for problem in found) for start in starts), found


def test_wrong_default_is_listed_once_and_jobs_are_still_checked():
    listed = [{"id": f"j{i}", "reference": "r", "video": "v", "options": {"steps": 4}} for i in range(5)]
    listed[3]["options"]["steps"] = 0
    text = yaml.safe_dump({"version": 1, "defaults": {"options": {"seed": -1, "fps": "x"}}, "jobs": listed})
    assert [re.sub(r"line \d+: ", "", problem).split(":")[0] for problem in problems(text)] == [
        "defaults.options.fps", "defaults.options.seed", "jobs[3].options.steps",
    ]  # fmt: skip


def test_yaml_with_huge_expansion_or_nesting_is_refused():
    laughs = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    laughs += [f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]" for name, after in itertools.pairwise("abcdefghi")]
    assert "expands to more than" in only_problem("\n".join(laughs))
    wide = "x-a: &a {" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}\njobs:\n" + "- {<<: *a}\n" * 2000
    assert "expands to more than" in only_problem(wide)
    assert "nested more than" in only_problem("[" * 100_000)
    assert "nested more than" in only_problem("- " * 5_000 + "a")
    assert "nested more than" in only_problem("[" * 100_000, "m.jsonl")
    assert "nested more than" in only_problem('{"a": ' * 70 + "1" + "}" * 70, "m.jsonl")
    assert "too many digits" in only_problem('{"a": ' + "9" * 5000 + "}", "m.jsonl")
    assert "more than" in only_problem("[" + "1," * 2_100_000 + "1]", "m.jsonl")
    wide_matrix = {"references": [f"r{i}" for i in range(500)], "videos": [f"v{i}" for i in range(500)]}
    assert "250000 jobs" in only_problem(json.dumps({"version": 1, "matrix": wide_matrix}))


def test_pure_python_yaml_loader_gives_same_manifest(monkeypatch):
    """Where the wheel has no libyaml; the two differ in how they mark a scalar without quotes."""
    with_c = parse(EXAMPLE), problems(WRONG)
    monkeypatch.setattr(module, "_LOADER", yaml.SafeLoader)
    assert (parse(EXAMPLE), problems(WRONG)) == with_c
    assert "not valid YAML" in only_problem("version: \x07")
    assert "half a character" in only_problem('version: "\\ud800"')


def test_matrix_ids_stay_when_entries_move():
    def ids(references: str) -> dict[str, str]:
        text = f"version: 1\nmatrix: {{references: [{references}], videos: [v w.mp4, u.mp4]}}"
        return {os.path.basename(j.reference) + j.video: j.id for j in parse(text).jobs}

    assert ids("贝拉.png, anna.png") == ids("./anna.png, ./贝拉.png")


def test_yaml_line_numbers_are_kept_for_every_style():
    root, found = parse_yaml("a:\n  b:\n    - c: 1\n      d:\n        e\n")
    assert not found
    assert root is not None
    paths: list[tuple[int | str, ...]] = [(), ("a",), ("a", "b"), ("a", "b", 0, "c"), ("a", "b", 0, "d")]
    assert [root.at(path).line for path in paths] == [1, 1, 2, 3, 4]


def test_replace_needs_no_mask_in_jobs_or_matrix() -> None:
    made = parse(
        "version: 1\ndefaults: {options: {mode: replace}}\njobs:\n  - {id: a, reference: r, video: v}\n"
        "matrix: {references: [r], videos: [v]}\n"
    )
    assert [(one.options.mode, one.mask) for one in made.jobs] == [("replace", None)] * 2
