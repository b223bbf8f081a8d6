"""Report page: writes the report of a run as one HTML file that needs no network and no other files.

In:   a `RunReport`, the previews of its jobs. Out: one HTML file. Never: where records or previews are stored.

Ids, notes and errors are untrusted text: templates escape them, and the page's script writes them as text. The page
holds jobs and spans as JSON. Its script draws only those in view, so that a page of 10,000 jobs can be opened. The
previews are at the end of the file, in blocks of `BLOCK` jobs. A block is parsed when one of its rows is shown.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from runner.errors import RunnerError
from runner.records.run_report import JobReport, JobState, ProcessReport, RunReport
from runner.regression.html_page import (
    content_policy,
    may_be_linked,
    template_environment,
    template_text,
    written_whole,
)
from runner.timing import hours_and_minutes

__all__ = ["PICTURE_BYTES", "STATES", "write_page"]

# What each status means, in the order of the chips.
STATES: dict[JobState, str] = {
    "succeeded": "rendered by this run",
    "failed": "its last attempt failed",
    "lost": "begun, but its runner has stopped reporting",
    "running": "a runner is working on it",
    "pending": "not begun",
    "skipped": "done before this run",
}
DONE = ("succeeded", "skipped")

PICTURE_HEIGHT = 120  # pixels, at most: a row shows it at 60; high-density screens use all 120
PICTURE_WIDTH = 240  # pixels, at most, e.g. of a panorama
PICTURE_QUALITY = 72  # of JPEG; assumed: a thumbnail shows no artefacts
# Bytes of all previews together, before base64. A browser holds the page in memory; assumed: a phone can open it.
PICTURE_BYTES = 24_000_000
BLOCK = 100  # jobs of one block of previews
READS_AT_ONCE = 16  # a request takes about 20 ms on the way

WORST = 12  # rows of a table of forecasts
SHOWN_AT_ONCE = 20  # jobs of a list, causes of a group; the rest is folded
STAGES = ("load", "prepare", "generate", "deliver")
LANES = ("prepare", "generate", "deliver")
JOB_MARK = "‹job›"  # replaces the id in texts that differ only in it
SHORTEST_ID = 3  # letters: a shorter id would often match other words of a text


def write_page(
    report: RunReport,
    dest: Path,
    *,
    posters: Callable[[str], bytes | None],
    link: Callable[[str], str | None] = lambda _: None,
) -> None:
    """Write the page to `dest`, completely or not at all.

    posters: returns the bytes of a preview (a JPEG) by its key, or None if there is none; called from several threads.
    link: returns the address of a job's output by the job's id, or None; an address that a browser cannot open is shown
    as text. Raises ConfigInvalid without jinja2; StorageFull, StorageDenied.
    """
    _environment()  # raises for a missing package before the previews are fetched
    with written_whole(Path(dest), "pictures") as (page, pictures):
        with pictures.open("wb") as out:
            without = _write_pictures(report.jobs, posters, out)
        text = _render(report, without, link)
        with page.open("wb") as out, pictures.open("rb") as blocks:
            out.write(text.encode(errors="backslashreplace"))  # a path may hold bytes that are not UTF-8
            shutil.copyfileobj(blocks, out)
            out.write(b"</body>\n</html>\n")


# -- previews ----------------------------------------------------------------------------------------------------------


def _write_pictures(
    jobs: Sequence[JobReport], posters: Callable[[str], bytes | None], out: IO[bytes]
) -> dict[int, str]:
    """Write the blocks of previews. Return job's place → reason, for jobs whose poster cannot be shown."""
    left, without = PICTURE_BYTES, dict[int, str]()
    full = f"the page holds {PICTURE_BYTES / 1e6:g} MB of pictures"
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        for block, first in enumerate(range(0, len(jobs), BLOCK)):
            numbers = range(first, min(first + BLOCK, len(jobs)))
            keys = [jobs[number].poster if left > 0 else None for number in numbers]
            rows: list[str | None] = []
            for number, made in zip(numbers, pool.map(lambda key: _thumbnail(key, posters), keys), strict=True):
                picture, why = made
                if jobs[number].poster is None:
                    why = ""
                elif left <= 0 or (picture is not None and len(picture) > left):
                    picture, why, left = None, full, 0
                if picture is not None:
                    left -= len(picture)
                rows.append(None if picture is None else base64.b64encode(picture).decode())
                if why:
                    without[number] = why
            if any(rows):
                out.write(
                    f'<script type="application/json" id="pictures-{block}">{json.dumps(rows)}</script>\n'.encode()
                )
    return without


def _thumbnail(key: str | None, posters: Callable[[str], bytes | None]) -> tuple[bytes | None, str]:
    """Return (a small JPEG, ""), or (None, the reason)."""
    if key is None:
        return None, ""
    try:
        data = posters(key)
    except RunnerError as error:
        return None, error.message
    if data is None:
        return None, "its file is missing"
    return _shrink(data)


def _shrink(data: bytes) -> tuple[bytes | None, str]:
    from PIL import Image

    small = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.thumbnail((PICTURE_WIDTH, PICTURE_HEIGHT), Image.Resampling.LANCZOS)
            image.convert("RGB").save(small, format="JPEG", quality=PICTURE_QUALITY, optimize=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's errors for damaged files
        return None, "its file is not a readable JPEG"
    return small.getvalue(), ""


# -- what the page's script draws --------------------------------------------------------------------------------------


@dataclass
class _Words:
    """Texts shared by many jobs, each stored once."""

    all: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def place(self, text: str) -> int:
        if text not in self.places:
            self.places[text] = len(self.all)
            self.all.append(text)
        return self.places[text]


def _data(report: RunReport, without: dict[int, str], link: Callable[[str], str | None]) -> dict[str, Any]:
    words = _Words()
    numbers = {job.id: number for number, job in enumerate(report.jobs)}
    jobs = [_job_data(job, words, without.get(number), link) for number, job in enumerate(report.jobs)]
    processes = [_process_data(process, numbers, words) for process in report.processes]
    return {
        "began": report.started_at,
        "seconds": _round(report.seconds, 3) or 0,
        "block": BLOCK,
        "lanes": LANES,
        "stages": STAGES,
        "words": words.all,
        "jobs": jobs,
        "processes": processes,
    }


def _job_data(job: JobReport, words: _Words, without: str | None, link: Callable[[str], str | None]) -> dict[str, Any]:
    address = link(job.id) if job.output else None
    known = {
        "id": job.id,
        "status": words.place(job.status),
        "reason": words.place(job.reason) if job.reason else None,
        "attempt": job.attempt,
        "host": words.place(job.host) if job.host else None,
        "shard": words.place(job.shard) if job.shard else None,
        "wall": _round(job.wall_s, 2),
        "gpu": _round(job.gpu_s, 2),
        "forecast": _round(job.forecast_s, 2),
        "memory": job.device_bytes,
        "memory_forecast": job.forecast_bytes,
        "host_memory": job.host_bytes,
        "stages": [[words.place(name), _round(seconds, 3)] for name, seconds in job.stages_s.items()],
        "frames": job.frames,
        "fps": job.fps,
        "film": _round(job.film_s, 2),
        "size": [job.width, job.height] if job.width and job.height else None,
        "output": job.output,
        "link": address if address and may_be_linked(address) else None,
        "picture": 1 if job.poster is not None and not without else None,
        "without": words.place(without) if without else None,
        "cost": _round(job.cost, 6),
        "code": words.place(job.error.code) if job.error else None,
        "error": _error_text(job) or None,
        "warnings": job.warnings,
    }
    return {name: value for name, value in known.items() if value is not None and value != []}


def _process_data(process: ProcessReport, numbers: dict[str, int], words: _Words) -> dict[str, Any]:
    """Return a process as JSON.

    A span is [stage, job's place or −1, begin, end, place of the id's text if the job is not in the report].
    """
    spans = []
    for span in process.spans:
        begin, end = _round(span.begin_s, 3), _round(span.end_s, 3)
        if begin is None or end is None:
            continue
        begin = max(begin, 0.0)  # negative if the host's clock is behind
        row: list[float] = [STAGES.index(span.stage), numbers.get(span.job_id or "", -1), begin, max(begin, end)]
        if span.job_id is not None and row[1] < 0:
            row.append(words.place(span.job_id))
        spans.append(row)
    return {
        "host": process.host,
        "shard": process.shard,
        "begin": _round(process.begin_s, 3) or 0,
        "end": _round(process.end_s, 3) or 0,
        "finished": process.finished,
        "spans": spans,
    }


def _round(value: float | None, digits: int) -> float | None:
    """Return the rounded value; None for None and for values that JSON cannot hold."""
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _error_text(job: JobReport) -> str:
    if job.error is None:
        return ""
    todo = job.error.todo or ""
    return job.error.message if job.error.message.endswith(todo) else f"{job.error.message}. {todo}"


# -- what the templates draw -------------------------------------------------------------------------------------------


@dataclass
class _Cause:
    """One text, and its jobs: their places and ids."""

    text: str
    jobs: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class _FailureGroup:
    """Failures with one code and one remedy."""

    code: str
    todo: str
    causes: list[_Cause] = field(default_factory=list)
    steps: set[str] = field(default_factory=set)  # stages in which the jobs failed

    @property
    def jobs(self) -> int:
        return sum(len(cause.jobs) for cause in self.causes)


def _failures(jobs: Sequence[JobReport]) -> list[_FailureGroup]:
    """Return the failure groups, the largest first; in a group, the cause with the most jobs first."""
    groups: dict[tuple[str, str], _FailureGroup] = {}
    texts: dict[tuple[str, str], list[tuple[str, int, str]]] = {}
    for number, job in enumerate(jobs):
        if job.error is not None and job.status not in DONE:
            key = (job.error.code, _without_id(job.error.todo or "", job.id))
            cause = job.error.message
            if job.error.todo and cause.endswith(job.error.todo):
                cause = cause.removesuffix(job.error.todo).rstrip().removesuffix(".")
            group = groups.setdefault(key, _FailureGroup(*key))
            group.steps |= {job.error.stage} - {""}
        elif job.status == "lost":
            key, cause = ("lost", ""), job.reason or STATES["lost"]
            groups.setdefault(key, _FailureGroup(*key))
        else:
            continue
        texts.setdefault(key, []).append((cause, number, job.id))
    for key, group in groups.items():
        group.causes = _grouped(texts[key])
    return sorted(groups.values(), key=lambda group: -group.jobs)


def _grouped(texts: Iterable[tuple[str, int, str]]) -> list[_Cause]:
    """Group equal texts, also those that differ only in the job's id; the most jobs first."""
    causes: dict[str, _Cause] = {}
    for text, number, job_id in texts:
        cause = causes.setdefault(_without_id(text, job_id), _Cause(text))
        if cause.text != text:
            cause.text = _without_id(text, job_id)
        cause.jobs.append((number, job_id))
    return sorted(causes.values(), key=lambda cause: -len(cause.jobs))


def _without_id(text: str, job_id: str) -> str:
    if len(job_id) < SHORTEST_ID or job_id not in text:
        return text
    return re.sub(rf"(?<![\w-]){re.escape(job_id)}(?![\w-])", JOB_MARK, text)


@dataclass(frozen=True)
class _Forecast:
    number: int
    id: str
    measured: float
    expected: float

    @property
    def ratio(self) -> float:
        return self.measured / self.expected

    @property
    def away(self) -> float:
        """Factor between measured and forecast, 1 or more: 2 for half and for twice the forecast."""
        return max(self.ratio, 1 / self.ratio)

    @property
    def bar(self) -> float:
        """Length of the bar: −50 (half the forecast or less) to 50 (twice or more)."""
        return round(max(-1.0, min(1.0, math.log2(self.ratio))) * 50, 1)


@dataclass(frozen=True)
class _Forecasts:
    """Forecast and measurement of one value, for the jobs that have both; the least accurate forecast first."""

    name: str
    unit: str
    rows: list[_Forecast]

    @property
    def median(self) -> float:
        return statistics.median(row.ratio for row in self.rows)

    @property
    def span(self) -> tuple[float, float]:
        ratios = [row.ratio for row in self.rows]
        return min(ratios), max(ratios)


def _forecasts(jobs: Sequence[JobReport]) -> list[_Forecasts]:
    found = []
    for name, unit, values in (
        ("GPU seconds", "s", [(job.gpu_s, job.forecast_s) for job in jobs]),
        ("Device memory", "B", [(job.device_bytes, job.forecast_bytes) for job in jobs]),
    ):
        rows = [
            _Forecast(number, jobs[number].id, measured, expected)
            for number, (measured, expected) in enumerate(values)
            if measured and expected and measured > 0 and expected > 0
            if math.isfinite(measured) and math.isfinite(expected)
        ]
        rows.sort(key=lambda row: -row.away)
        found.append(_Forecasts(name, unit, rows))
    return found


@dataclass(frozen=True)
class _Share:
    """A part of a bar: its begin and length, in percent of the bar."""

    name: str
    seconds: float
    begin: float
    percent: float


def _shares(report: RunReport) -> list[_Share]:
    spent = report.gpu_seconds
    parts = {"work": spent.work, "loading": spent.loading, "idle": spent.idle}
    whole = max(spent.total, sum(parts.values()))
    shares, begin = [], 0.0
    for name, seconds in parts.items():
        percent = 100 * seconds / whole if whole > 0 else 0.0
        shares.append(_Share(name, seconds, round(begin, 3), round(percent, 3)))
        begin += percent
    return shares


def _headline(counts: dict[str, int], total: int) -> str:
    done = sum(counts.get(state, 0) for state in DONE)
    parts = [f"{done} of {total} {'job' if total == 1 else 'jobs'} done"]
    parts += [f"{counts[state]} {state}" for state in ("failed", "lost", "running", "pending") if counts.get(state)]
    return " · ".join(parts)


def _processes(report: RunReport) -> str:
    """Return e.g. `2 on NVIDIA H200, 1 without a model`."""
    counts = Counter(process.device for process in report.processes)
    return ", ".join(
        f"{count} on {device}" if device else f"{count} without a model" for device, count in counts.items()
    )


def _render(report: RunReport, without: dict[int, str], link: Callable[[str], str | None]) -> str:
    from jinja2.utils import htmlsafe_json_dumps

    environment = _environment()
    style = "".join(template_text(environment, name) for name in ("page.css", "run_report.css"))
    script = "".join(template_text(environment, name) for name in ("common.js", "timeline.js", "jobs.js"))
    total = report.counts.get("total", len(report.jobs))
    warnings = [(note, number, job.id) for number, job in enumerate(report.jobs) for note in job.warnings]
    stages = [(name, seconds) for name, seconds in report.stages_s.items() if math.isfinite(seconds)]
    return str(
        environment.get_template("run_report.html").render(
            report=report,
            policy=content_policy(script, style),
            style=style,
            script=script,
            data=htmlsafe_json_dumps(_data(report, without, link), separators=(",", ":"), allow_nan=False),
            headline=_headline(report.counts, total),
            total=total,
            states=[(state, report.counts.get(state, 0), meaning) for state, meaning in STATES.items()],
            processes=_processes(report),
            shares=_shares(report),
            lanes=LANES,
            failures=_failures(report.jobs),
            warnings=_grouped(warnings),
            forecasts=_forecasts(report.jobs),
            stages=stages,
            longest=max((seconds for _, seconds in stages), default=0.0),
            shown_at_once=SHOWN_AT_ONCE,
            worst=WORST,
        )
    )


@cache
def _environment() -> Any:
    environment = template_environment("runner.verbs", "report_templates")
    environment.filters |= {
        "clock": hours_and_minutes,
        "money": _money,
        "moment": _moment,
        "share": _share,
        "amount": _amount,
    }
    return environment


def _moment(time: str) -> str:
    """Return a UTC time in ISO 8601 as `2026-11-30 02:15:09 UTC`; other texts unchanged."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)", time)
    return f"{found[1]} {found[2]} UTC" if found else time


def _money(value: float) -> str:
    """Return an amount with two decimals, or four if it is below 1: 12.35; 0.0041."""
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _share(percent: float) -> str:
    return f"{percent:.1f} %"


def _amount(value: float, unit: str) -> str:
    filters: dict[str, Callable[[float], str]] = _environment().filters
    return filters["duration" if unit == "s" else "megabytes"](value)
