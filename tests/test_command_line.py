"""The command line itself: exact flags, what `--help` of each verb promises, and how results become exit codes."""

from __future__ import annotations

import re
import shlex
from dataclasses import MISSING
from pathlib import Path

import pytest

from runner.batch.shards import Shard
from runner.cli import main, parse_command
from runner.errors import ConfigInvalid, DeviceLost, InputNotFound, StorageUnavailable
from runner.records.record import JobLine
from runner.regression.findings import NightComparison
from runner.spec.manifest import parse_manifest
from runner.verbs.approve import ApproveRow
from runner.verbs.clean import CleanRow
from runner.verbs.commands import EXIT_CODES, VERBS
from runner.verbs.compare import Compared
from runner.verbs.doctor import Check
from runner.verbs.flags import flag_name, flags_of
from runner.verbs.outcome import RunOutcome, counts_of_lines
from runner.verbs.plan import Forecast, RunForecast
from runner.verbs.status import RunStatus, StatusRow
from runner.verbs.validate import Validation
from runner.verbs.weights import Verification
from runner.weights.verify import Row, Settled
from tests.goldens.collect import help_texts

ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {verb.name: verb for verb in VERBS}
FLAGS = [
    (verb.name, flag_name(item)) for verb in VERBS for item, flag in flags_of(verb.settings) if not flag.positional
]
FLAGS += [(verb.name, name) for verb in VERBS for name in ("--log-format", "--verbose", "--help")]
FLAGS += [(verb.name, "--json") for verb in VERBS if verb.json_prints]


def refused(capsys, *words: str) -> str:
    """What is said of a line that cannot be parsed."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("verb", "flag"), FLAGS)
def test_shortened_or_mistyped_flag_is_refused_with_suggestion(verb, flag, capsys):
    known = {name for found, name in FLAGS if found == verb}
    for wrong in {flag[:-1], flag + flag[-1], flag.upper()} - known:
        said = refused(capsys, *verb.split(), wrong, "x")
        assert said.startswith(f"video-lab {verb}: error: no flag {wrong}; ")
        if not wrong.isupper():
            assert re.search(rf"did you mean .*{flag}\b", said)


def test_flags_before_verb_or_of_other_verb_are_refused(capsys):
    assert "no flag --verson; did you mean --version?" in refused(capsys, "--verson")
    assert "no flag --out" in refused(capsys, "--out", "x", "run", "m.yaml")
    assert "no flag --cache; see video-lab weights fetch --help" in refused(capsys, "weights", "fetch", "--cache", "x")
    assert "no flag -v" in refused(capsys, "status", "-v", "out")
    assert "no flag --retry; did you mean --retry-failed?" in refused(capsys, "run", "m.yaml", "--retry")


def test_values_and_words_after_two_dashes_are_no_flags():
    verb, fields, _ = parse_command(["status", "--", "--out"])
    assert (verb.name, fields) == ("status", {"out": "--out"})
    _, fields, _ = parse_command(["run", "-", "--out=-x", "--drain-s", "-5"])
    assert fields == {"manifest": "-", "out": "-x", "drain_s": "-5"}


@pytest.mark.parametrize("name", BY_NAME)
def test_help_of_verb_ends_with_exit_codes_and_two_examples(name):
    verb = BY_NAME[name]
    text = help_texts()[name]
    codes = re.findall(r"(?<=\s)(\d+) (?=[a-zA-Z])", text.partition("exit codes:")[2].partition("An unexpected")[0])
    assert [int(code) for code in codes] == sorted(verb.codes)
    assert set(verb.codes) <= EXIT_CODES.keys()
    assert {0, 2} <= set(verb.codes)
    for code in verb.codes:
        assert f"{code} {EXIT_CODES[code]}" in text
    assert text.endswith(" ".join(verb.examples))
    assert len(verb.examples) == 2
    for example in verb.examples:
        first, *words = shlex.split(example)
        assert first == "video-lab"
        parsed, fields, _ = parse_command(words)
        assert parsed is verb
        settings = verb.settings(**fields)
        for place in (str(getattr(settings, "manifest", "")), str(getattr(settings, "calibrate", ""))):
            assert not place.startswith("manifests/") or (ROOT / place).is_file()


def help_groups(name: str, capsys) -> dict[str, list[str]]:
    """Heading of each group of a verb's help → its flags, in order; at 80 columns, as a terminal shows it."""
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    groups: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if re.fullmatch(r"[a-z ]+:", line):
            groups[line.removesuffix(":")] = flags = []
        elif found := re.match(r"  (?:-h, )?(--[a-z][a-z-]*)", line):
            flags.append(found.group(1))
    return {heading: flags for heading, flags in groups.items() if flags}


@pytest.mark.parametrize("name", BY_NAME)
def test_help_of_verb_shows_common_flags_before_advanced_ones(name, capsys):
    verb = BY_NAME[name]
    groups = help_groups(name, capsys)
    assert sorted(flag for flags in groups.values() for flag in flags) == sorted(f for v, f in FLAGS if v == name)
    if not verb.common:
        assert list(groups) == ["flags"]
        assert len(groups["flags"]) <= 16
        return
    assert list(groups) == ["common flags", "advanced"]
    assert groups["common flags"] == ["--help", *("--" + field.replace("_", "-") for field in verb.common)]
    assert len(verb.common) <= 9
    required = {flag_name(item) for item, flag in flags_of(verb.settings) if item.default is MISSING}
    required &= {flag_name(item) for item, flag in flags_of(verb.settings) if item.default_factory is MISSING}
    assert {flag for flag in required if flag.startswith("--")} <= set(groups["common flags"])


@pytest.mark.parametrize("name", BY_NAME)
def test_help_of_verb_begins_with_usage_and_one_line_of_purpose(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    usage, rest = capsys.readouterr().out.split("\n\n", 1)
    assert usage.startswith(f"usage: video-lab {name} ")
    assert usage.endswith("[flags]")
    assert rest.splitlines()[0] == BY_NAME[name].text
    assert len(BY_NAME[name].text) <= 100


def test_help_of_weights_has_all_exit_codes_of_its_verbs():
    below = {code for verb in VERBS if verb.name.startswith("weights ") for code in verb.codes}
    text = help_texts()["weights"]
    assert all(f"{code} {EXIT_CODES[code]}" in text for code in below)
    assert text.endswith(f"{BY_NAME['weights fetch'].examples[0]} {BY_NAME['weights verify'].examples[0]}")


MANIFEST = parse_manifest("version: 1\njobs: [{id: a, reference: r, video: v}]\n", base=".")
GONE = InputNotFound("no such file", where="r")
AWAY = StorageUnavailable("does not answer", where="s3://bucket")
SUBMIT = ["m.yaml", "--out", "s3://b/out", "--models", "s3://b/models", "--image", "i:1", "--shards", "2"]
CALLS = {
    "run": (["m.yaml", "--out", "out"], "runner.verbs.run.run"),
    "validate": (["m.yaml"], "runner.verbs.validate.validate"),
    "plan": (["m.yaml"], "runner.verbs.plan.plan"),
    "status": (["out"], "runner.verbs.status.status"),
    "report": (["out"], "runner.verbs.report.report"),
    "compare": (["out", "--baseline", "b"], "runner.verbs.compare.compare"),
    "approve": (["out", "--baseline", "b", "--why", "w"], "runner.verbs.approve.approve"),
    "clean": (["out"], "runner.verbs.clean.clean"),
    "doctor": ([], "runner.verbs.doctor.doctor"),
    "preprocess": (["--reference", "r", "--video", "v", "--out", "o"], "runner.verbs.preprocess.preprocess"),
    "inspect": (["v.mp4"], "runner.verbs.inspect.inspect"),
    "quantize": ([], "runner.verbs.quantize.quantize"),
    "submit aws-batch": ([*SUBMIT, "--queue", "q"], "runner.verbs.submit.submit_aws_batch"),
    "submit gcp-batch": ([*SUBMIT, "--location", "us-central1"], "runner.verbs.submit.submit_gcp_batch"),
    "submit kubernetes": (SUBMIT, "runner.verbs.submit.submit_kubernetes"),
    "submit slurm": (SUBMIT, "runner.verbs.submit.submit_slurm"),
    "weights fetch": ([], "runner.verbs.weights.fetch"),
    "weights verify": ([], "runner.verbs.weights.verify"),
    "weights demo": ([], "runner.verbs.weights.demo"),
}


def status_of(*states):
    rows = [StatusRow(id=str(n), status=state) for n, state in enumerate(states)]
    return RunStatus("out", None, None, tuple(rows), {})


def compared(code: int) -> Compared:
    return Compared(
        NightComparison(
            out="out", baseline="b", made_at="2026-01-01T00:00:00Z", seconds=1, exit_code=code, counts={}, jobs=[]
        )
    )


def call(monkeypatch, name: str, result: object) -> int:
    """The exit code of a verb whose function returns `result`, or raises it."""

    def answer(*_: object) -> object:
        if isinstance(result, BaseException):
            raise result
        return result

    words, function = CALLS[name]
    monkeypatch.setattr(function, answer)
    return main([*name.split(), *words])


@pytest.mark.parametrize(
    ("name", "result", "code"),
    [
        ("validate", Validation(MANIFEST, ()), 0),
        ("validate", Validation(MANIFEST, (("a", GONE),)), 1),
        ("plan", RunForecast((), None), 0),
        ("plan", RunForecast((Forecast("a", None, GONE),), None), 1),
        ("status", status_of("succeeded"), 0),
        ("status", status_of("succeeded", "failed"), 1),
        ("status", status_of("succeeded", "failed", "pending"), 3),
        ("status", status_of("running"), 3),
        ("status", status_of("lost"), 3),
        *(("compare", compared(code), code) for code in (0, 1, 2, 4)),
        ("approve", [ApproveRow("a", "approved", ""), ApproveRow("b", "unchanged", "")], 0),
        ("approve", [ApproveRow("a", "approved", ""), ApproveRow("b", "refused", "")], 1),
        ("clean", [], 0),
        ("doctor", [Check("python", "warn", "")], 0),
        ("doctor", [Check("python", "fail", "")], 2),
        ("preprocess", {}, 0),
        ("preprocess", GONE, 1),
        ("inspect", GONE, 1),
        ("quantize", GONE, 1),
        ("weights verify", Verification(files=(Row("a", "unknown", 1, None, ""),)), 0),
        ("weights verify", Verification(files=(Row("a", "corrupt", 1, None, ""),)), 2),
        ("weights verify", Verification(files=(Row("a", "missing", 0, None, ""),)), 2),
        ("weights verify", Verification(settled=Settled(Path("f"), "l", (), "nibble=low")), 0),
        ("weights verify", Verification(settled=Settled(Path("f"), "l", (), None)), 2),
        *((name, ConfigInvalid("no"), 2) for name in CALLS),
        *((name, AWAY, 3) for name, verb in BY_NAME.items() if 3 in verb.codes),
        *((name, KeyboardInterrupt(), 130) for name in CALLS),
        *((name, ValueError("a bug"), 1) for name in CALLS),
    ],
)
def test_results_and_errors_become_exit_codes(monkeypatch, capsys, name, result, code):
    assert call(monkeypatch, name, result) == code
    if not isinstance(result, KeyboardInterrupt | ValueError):
        assert code in BY_NAME[name].codes


def test_clean_with_failed_removal_exits_with_code_of_error(monkeypatch, capsys):
    from runner.storage import Leftover

    left = Leftover("out/x", "x", 1, 0.0, "staged file")
    assert call(monkeypatch, "clean", [CleanRow(left, "failed", "away", 1.0, AWAY)]) == 3
    assert "failed 1" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_error_that_stopped_run_is_last_line(monkeypatch, capsys, flags):
    error = DeviceLost("the GPU is lost", todo="Start the same command again")
    lines = (JobLine(id="a", status="not_run", reason="the run ended before it"),)
    outcome = RunOutcome(
        3, "r", Shard(0, 1), "", counts_of_lines(lines), lines, "out/jobs/", "out/runs/r/", None, error
    )
    monkeypatch.setattr("runner.verbs.run.run", lambda *_: outcome)
    assert main(["run", "m.yaml", "--out", "out", *flags]) == 3
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "device.lost: the GPU is lost. Start the same command again"
    assert ("not run" in said.out) == (not flags)
