"""Submission: the words of a task's command line, read by the real command line."""

from __future__ import annotations

from typing import Any

import pytest

from runner.cli import parse_command
from runner.launch.submission import Submission, report_words, run_words


def submission(**other: Any) -> Submission:
    common: dict[str, Any] = {
        "name": "n",
        "run_id": "r-12",
        "manifest": "s3://bucket/m.jsonl",
        "out": "s3://bucket/out",
    }
    return Submission(**common | {"models": "s3://bucket/models", "image": "video-lab:1", "shards": 4} | other)


def read(words: list[str]) -> tuple[str, dict[str, Any], Any]:
    """(verb, settings that it takes, display), as the container would read its arguments."""
    verb, flags, display = parse_command(words)
    verb.settings(**flags)  # refuses values, and flags that do not go together
    return verb.name, flags, display


@pytest.mark.parametrize(
    ("other", "spot", "wanted", "absent"),
    [
        ({}, None, {}, ("shard", "gpus", "spot")),
        ({"share": "any"}, None, {"shard": "any"}, ("gpus",)),
        ({"gpus_per_task": 8}, "aws", {"gpus": "all", "spot": "aws"}, ("shard",)),
        ({"gpus_per_task": 2, "share": "any"}, None, {"gpus": "all"}, ("shard",)),
        ({"drain_s": 12.5}, "gcp", {"drain_s": 12.5, "spot": "gcp"}, ("shard", "gpus")),
        ({"drain_s": 20.0}, "file:/run/notice", {"drain_s": 20.0, "spot": "file:/run/notice"}, ()),
        ({"run_flags": ("--recipe", "fp4-distill", "--max-attempts", "2")}, None, {"recipe": "fp4-distill"}, ()),
    ],
)
def test_a_task_s_words_are_a_run(other, spot, wanted, absent):
    verb, flags, display = read(run_words(submission(**other), spot=spot))
    assert (verb, flags["manifest"]) == ("run", "s3://bucket/m.jsonl")
    assert (flags["out"], flags["models"], flags["run_id"]) == ("s3://bucket/out", "s3://bucket/models", "r-12")
    assert display.log_format == "json"
    for name, value in wanted.items():
        assert type(value)(flags[name]) == value
    assert not set(absent) & flags.keys()


def test_the_report_s_words_are_a_report():
    verb, flags, display = read(report_words(submission(gpu_hour=2.5)))
    assert verb == "report"
    assert (flags["out"], flags["run"], float(flags["gpu_hour"])) == ("s3://bucket/out", "r-12", 2.5)
    assert display.log_format == "json"
    assert "gpu_hour" not in read(report_words(submission()))[1]


def test_a_wait_has_a_limit():
    words = report_words(submission(), wait_s=7200)
    assert words[-3:] == ["--wait", "--timeout", "7200s"]
