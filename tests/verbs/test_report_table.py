"""The printed report: totals, rows that fit the terminal, what failed and what to do, what is not known."""

from __future__ import annotations

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

from runner.records.record import ErrorRecord, ReuseRecord
from runner.records.run_report import GpuSeconds, JobReport
from runner.verbs.fitted_table import UNLIMITED
from runner.verbs.report import Reported
from runner.verbs.report_table import print_report
from tests.records.test_run_report import make_report

LONG = "anna-von-der-alten-muehle-samba-am-strand-0007-take-2"


def job(name: str, **more) -> JobReport:
    values = {"status": "succeeded", "reason": "no record yet", "wall_s": 1234.56, "gpu_s": 1001.2, "cost": 0.69251}
    values |= {"device_bytes": 21_400_000_000, "forecast_bytes": 22_900_000_000, "forecast_s": 998.0}
    return JobReport(id=name, **(values | {"output": f"s3://bucket/out/jobs/{name}/output.mp4"} | more))


ERROR = ErrorRecord(
    code="input.no_person", message="v.mp4: no person. Choose another clip", stage="prepare", retryable=False
)
FAILED = {"status": "failed", "output": None, "cost": None, "forecast_s": None, "device_bytes": None}
JOBS = [job("a"), job(LONG, warnings=["12 frames without a person"]), job("bad", error=ERROR, **FAILED)]


def printed(report, *, width: int | None = 80, files=("out/runs/r/report.html", "out/runs/r/report.json")) -> list[str]:
    """Lines; `width` None: standard output is no terminal."""
    stream = io.StringIO()
    terminal = {"force_terminal": True, "color_system": None, "width": width} if width else {"width": UNLIMITED}
    print_report(Reported(report, files), as_json=False, console=Console(file=stream, **terminal))
    return stream.getvalue().splitlines()


def rows_of(lines: list[str]) -> list[str]:
    """The lines of the table, its head among them."""
    first = next(number for number, line in enumerate(lines) if line.startswith("job "))
    return lines[first : lines.index("", first)]


def test_print_report_shows_totals_first():
    cache = ReuseRecord(hits=5, misses=2, hit_rate=0.7143)
    report = make_report(
        jobs=JOBS,
        out="s3://bucket/out",
        counts={"total": 3, "succeeded": 2, "failed": 1, "pending": 0},
        gpu_seconds=GpuSeconds(total=200.0, work=150.0, loading=30.5, idle=19.5),
        gpu_hour=2.49,
        cost=0.138333,
        cost_per_film_s=0.0691,
        caches={"prompt": cache},
    )
    assert printed(report)[:6] == [
        "run r in s3://bucket/out: 3 jobs, 2 succeeded · 1 failed",
        "10.0 s on 1 host, 1 process · 2.0 s of film",
        "GPU seconds 200.0: work 75.0% · loading 15.2% · idle 9.8%",
        "cost 0.138 at 2.49 per GPU hour · 0.0691 per second of film",
        "caches: prompt 5 of 7 hits",
        "",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_report_table_fits_terminal_and_names_missing_columns(width):
    report = make_report(jobs=JOBS, out="s3://bucket/out")
    lines = printed(report, width=width)
    table = rows_of(lines)
    note = next((line for line in table if line.startswith("no room for: ")), "")
    body = [line for line in table if line != note and not line.startswith("outputs are in")]
    assert all(cell_len(line.rstrip()) <= width for line in body)
    columns = ["status", "!", "wall s", "GPU s", "forecast s", "GB", "forecast GB", "cost", "output"]
    missing = note.partition(": ")[2].partition(";")[0].split(", ") if note else []
    head = body[0].split()
    for column in columns:
        assert (column in missing) != all(word in head for word in column.split()) or column in ("GB", "forecast GB")
    if width >= 80:
        assert "1001.2" in "".join(body) and "0.693" in "".join(body)
    outputs = "outputs are in s3://bucket/out/jobs/"
    assert (outputs in lines) == ("output" in missing)
    if width == 200:
        assert not note and len(body) == 4
        assert body[2].startswith(LONG) and body[2].rstrip().endswith(f"jobs/{LONG}/output.mp4")


def test_report_table_outside_terminal_is_not_cut_or_folded():
    lines = printed(make_report(jobs=JOBS, out="s3://bucket/out"), width=None)
    head, *rows = rows_of(lines)
    assert len(rows) == len(JOBS)
    assert " ".join(head.split()) == "job status ! wall s GPU s forecast s GB forecast GB cost output"
    assert rows[1].split() == [
        *(LONG, "succeeded", "!", "1234.6", "1001.2", "998.0", "21.4", "22.9", "0.693"),
        f"jobs/{LONG}/output.mp4",
    ]


def test_report_table_omits_columns_without_value():
    lines = printed(make_report(jobs=[JobReport(id="a", status="pending", reason="not begun")]), width=None)
    assert [line.split() for line in rows_of(lines)] == [["job", "status"], ["a", "pending"]]


def test_report_table_is_followed_by_failures_warnings_and_files():
    same = [job(name, warnings=["cut to the rendered span"]) for name in "abcde"]
    report = make_report(jobs=[*same, *JOBS[2:]], notes=["Each host's times come from its own clock."])
    lines = printed(report)
    assert lines[lines.index("failures") :] == [
        "failures",
        "bad  input.no_person: v.mp4: no person. Choose another clip",
        "",
        "warnings",
        "! a, b, c and 2 more  cut to the rendered span",
        "! Each host's times come from its own clock.",
        "",
        "report: out/runs/r/report.html",
        "report: out/runs/r/report.json",
    ]


def test_print_report_does_not_show_unknown_values_as_zero():
    nothing = GpuSeconds(total=0, work=0, loading=0, idle=0)
    text = "\n".join(printed(make_report(processes=[], gpu_seconds=nothing, gpu_hour=2.49)))
    assert "GPU seconds not known" in text
    assert "cost ? at 2.49 per GPU hour · ? per second of film" in text


def test_print_report_json_is_only_report(capsys):
    report = make_report()
    print_report(Reported(report, ("f",)), as_json=True)
    assert json.loads(capsys.readouterr().out) == report.model_dump(mode="json")


def test_print_report_hides_secrets_and_control_characters(capsys):
    error = ErrorRecord(code="x", message="https://me:secretword@host/\x1b[2J", stage="prepare", retryable=False)
    report = make_report(jobs=[job("bad", error=error, **FAILED)], notes=["https://me:secretword@host/"])
    print_report(Reported(report, ()), as_json=False)
    print_report(Reported(report, ()), as_json=True)
    said = capsys.readouterr().out
    assert "secretword" not in said and "\x1b" not in said
    assert said.count("me:***@host") == 4
