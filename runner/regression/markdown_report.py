"""Markdown report: the results of `compare`, as the summary of a CI step.

In:   a `NightComparison`. Out: GitHub-flavoured Markdown. Never: how a verdict is made.

Ids, texts and errors are escaped, so that they cannot become a heading, a link, an image, HTML or a table's border.
"""

from __future__ import annotations

import re
from typing import get_args

from runner.regression.findings import FrameValues, JobFinding, NightComparison, Verdict

__all__ = ["markdown"]

LIMIT = 1_000_000  # bytes; GitHub accepts 1 MiB per step
CELL = 500  # maximum characters of a cell
WITHOUT_ROW = ("identical", "draft")
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~@$:/<>&-]|(?i:(?<=www))\.)")
# All non-printable characters and all kinds of line ends.
UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
HEADER = "| Verdict | Job | What | Worst frame | PSNR | SSIM | Seconds |\n|---|---|---|--:|--:|--:|--:|\n"


def markdown(comparison: NightComparison, limit: int = LIMIT) -> str:
    """Return the summary, of at most `limit` bytes in UTF-8: counts, environment, the approve command, then jobs.

    Failures come first. The last line counts the jobs that do not fit. The part without jobs (some hundred bytes and
    the approve command) is never shortened, even if it exceeds `limit`.
    """
    rows = [_row(job) for job in comparison.jobs if job.verdict not in WITHOUT_ROW]
    head = _head(comparison)
    if not rows:
        return head
    room = limit - len((head + HEADER + _rest(len(rows))).encode())
    shown = 0
    while shown < len(rows) and (room := room - len(rows[shown].encode())) >= 0:
        shown += 1
    text = head + HEADER + "".join(rows[:shown])
    return text + (_rest(len(rows) - shown) if shown < len(rows) else "")


def _rest(jobs: int) -> str:
    return f"\n{jobs} more {'job is' if jobs == 1 else 'jobs are'} in the HTML report.\n"


def _head(comparison: NightComparison) -> str:
    total = comparison.counts.get("total", len(comparison.jobs))
    counts = [f"{count} {verdict}" for verdict in get_args(Verdict) if (count := comparison.counts.get(verdict, 0))]
    lines = [
        f"## Night comparison: {total} {'job' if total == 1 else 'jobs'}, {', '.join(counts) or 'none compared'}",
        "",
        f"Night {_escape(comparison.out)}, baseline {_escape(comparison.baseline)}, exit code {comparison.exit_code}",
        "",
    ]
    if comparison.environment:
        lines += ["The environment differs:", "", *(f"- {_escape(line)}" for line in comparison.environment), ""]
    if comparison.approve:
        command = UNPRINTED.sub(" ", comparison.approve)
        # The fence must be longer than any run of backticks within it.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
        lines += ["To accept new and changed renders:", "", f"{fence}sh", command, fence, ""]
    return "\n".join(lines) + "\n"


def _row(job: JobFinding) -> str:
    measured = job.measurements
    psnr, ssim = (measured.psnr, measured.ssim) if measured is not None else (None, None)
    frame = psnr.worst_frame if psnr is not None else job.first_frame
    what = " ".join([job.text, *(breach.text for breach in job.breaches if breach.text != job.text)])
    if job.error:
        what += f" {job.error}"
    cells = [
        f"**{job.verdict}**",
        _escape(job.id),
        _escape(what),
        "" if frame is None else str(frame),
        _number(psnr, 1),
        _number(ssim, 4),
        _seconds(job),
    ]
    return f"| {' | '.join(cells)} |\n"


def _number(metric: FrameValues | None, digits: int) -> str:
    return "" if metric is None else f"{metric.worst:.{digits}f}"


def _seconds(job: JobFinding) -> str:
    if job.seconds is None:
        return ""
    return f"{job.seconds:.1f}" + (f" ({job.seconds / job.seconds_median:.2f}×)" if job.seconds_median else "")


def _escape(text: str) -> str:
    """Return one line of plain text, at most `CELL` characters."""
    line = UNPRINTED.sub(" ", text).strip()
    return SPECIAL.sub(r"\\\1", line if len(line) <= CELL else line[: CELL - 1] + "…")
