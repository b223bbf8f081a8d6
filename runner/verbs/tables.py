"""Tables: all that verbs print: tables and lines on standard output, errors on standard error.

In:   rows, text. Out: text without secrets and without characters that change a terminal. Never: decisions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from runner.errors import RunnerError
from runner.records.record import JobLine
from runner.redact import escape_control, for_people, redact, redact_tree

if TYPE_CHECKING:
    from runner.spec.manifest import Manifest
    from runner.verbs.approve import ApproveRow
    from runner.verbs.clean import CleanRow
    from runner.verbs.compare import Compared
    from runner.verbs.doctor import Check
    from runner.verbs.plan import Forecast
    from runner.verbs.quantize import Quantized
    from runner.verbs.status import RunStatus
    from runner.verbs.weights import Verification
    from runner.weights.fetch import Fetched

__all__ = [
    "print_approved",
    "print_checks",
    "print_clean",
    "print_comparison",
    "print_error",
    "print_fetched",
    "print_json",
    "print_plan",
    "print_problems",
    "print_quantized",
    "print_run",
    "print_status",
    "print_text",
    "print_verification",
]

COLOURS = {
    "succeeded": "green",
    "ok": "green",
    "skipped": "dim",
    "not_run": "yellow",
    "running": "yellow",
    "pending": "dim",
    "lost": "red",
    "warn": "yellow",
    "failed": "red",
    "fail": "red",
    "identical": "green",
    "approved": "green",
    "unchanged": "dim",
    "changed": "yellow",
    "uncalibrated": "yellow",
    "draft": "yellow",
    "removed": "yellow",
    "new": "red",
    "missing": "red",
    "broken": "red",
    "refused": "red",
}


def print_text(text: str) -> None:
    """One line, or several, on standard output."""
    _write(for_people(text))


def print_error(text: str) -> None:
    """The same on standard error. A stream that cannot be written changes no outcome."""
    with suppress(OSError, ValueError):
        print(for_people(text), file=sys.stderr)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """A JSON-able value; in ASCII where standard output has no UTF-8."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(redact_tree(value), ensure_ascii=not unicode, indent=indent)
    _write("".join(f"\\u{ord(c):04x}" if c != "\n" and escape_control(c) != c else c for c in text))


def _write(text: str) -> None:
    try:
        print(text)
    except BrokenPipeError:
        _stop_writing()


def _stop_writing() -> None:
    """Nothing reads standard output any more (`video-lab run … | head`): what is printed from now on is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_run(
    lines: Sequence[JobLine], counts: Mapping[str, int], where: Sequence[str], console: Console | None = None
) -> None:
    """The run's table, its counts, and where to look."""
    console = console or _console()
    table = _table("job", "status", "seconds", "why / what")
    for line in lines:
        detail = f"{line.error.code}: {line.error.message}" if line.error else line.output or line.reason
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        table.add_row(escape(line.id), _status(line.status), seconds, escape(detail))
    console.print(table)
    console.print(" · ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items() if count))
    for place in where:
        console.print(escape(place), soft_wrap=True)


def print_problems(manifest: Manifest, problems: Sequence[tuple[str, RunnerError]], *, checked: bool) -> None:
    console = _console()
    for job_id, error in problems:
        console.print(f"[red]{escape(job_id)}[/]  {error.code}: {escape(error.message)}", soft_wrap=True)
    found = f"{len({job_id for job_id, _ in problems})} of them cannot be rendered"
    found += "" if checked else ", inputs not checked"
    console.print(f"{escape(manifest.source)}: {len(manifest.jobs)} jobs, {found}", soft_wrap=True)


def print_plan(rows: Sequence[Forecast], gpu: str | None = None) -> None:
    """`gpu`: whose seconds the rows forecast; without one there is no such column. GB: the device's peak by mode."""
    console = _console()
    columns = ["frames", "size", "segments", "denoised", "padding", "overlap", "steps", "PFLOP"]
    modes = next((list(row.memory) for row in rows if row.memory), [])
    columns += [f"GB {' / '.join(modes)}"] if modes else []
    columns += [f"s on {gpu}"] if gpu else []
    table = _table("job", *columns)
    plans = [row.plan for row in rows if row.plan is not None]
    for row in rows:
        plan = row.plan
        if plan is None:
            table.add_row(escape(row.job_id), f"[red]{escape(str(row.error))}[/]", *[""] * (len(columns) - 1))
            continue
        cells = [
            str(plan.frames),
            f"{plan.width}x{plan.height}",
            f"{plan.segments} x {plan.segment_frames}",
            str(plan.denoised_frames),
            f"{plan.padding_frames / plan.denoised_frames:.1%}",
            f"{plan.overlap_total / plan.denoised_frames:.1%}",
            str(plan.steps),
            f"{plan.tflop / 1e3:.4g}",
        ]
        cells += [" / ".join(f"{row.memory[mode] / 1e9:.3g}" for mode in modes)] if modes else []
        cells += [f"{plan.seconds:.3g}" if plan.seconds is not None else "?"] if gpu else []
        table.add_row(escape(row.job_id), *cells)
    console.print(table)
    total = f"{len(rows)} jobs, {sum(plan.tflop for plan in plans) / 1e3:.4g} PFLOP by the models' shapes"
    if gpu is None:
        console.print(f"{total}; no known GPU here: --gpu NAME forecasts seconds")
        return
    seconds = sum(plan.seconds or 0.0 for plan in plans)
    console.print(
        f"{total}; {seconds:.4g} s on one {gpu}: a forecast, without loading, compiling and encoding new prompts"
    )


def print_status(found: RunStatus, *, as_json: bool) -> None:
    if as_json:
        for row in found.rows:
            print_json(row.model_dump(mode="json"))
        return
    console = _console()
    table = _table("job", "status", "attempt", "seconds", "detail")
    for row in found.rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        table.add_row(escape(row.id), _status(row.status), str(row.attempt), seconds, escape(row.detail))
    console.print(table)
    counts = " · ".join(f"{count} {name}" for name, count in found.counts.items())
    console.print(f"{escape(found.out)}: {counts}", soft_wrap=True)


def print_checks(checks: Sequence[Check]) -> None:
    console = _console()
    table = _table("check", "result", "found", "what to do")
    for check in checks:
        table.add_row(escape(check.name), _status(check.status), escape(check.found), escape(check.todo or ""))
    console.print(table)


def print_clean(out: str, rows: Sequence[CleanRow], command: str, *, as_json: bool) -> None:
    """`command`: what removes them, shown if there is something that would be removed."""
    console = _console()
    if as_json:
        for row in rows:
            told = dataclasses.asdict(row.leftover) | {"action": row.action, "reason": row.reason}
            print_json({name: value for name, value in told.items() if name not in ("upload_id", "abandoned")})
        return
    if rows:
        table = _table("what", "bytes", "age", "where", "action")
        for row in rows:
            left = row.leftover
            action = f"{row.action}: {row.reason}" if row.reason else row.action
            table.add_row(left.kind, str(left.bytes), _age(row.age_s), escape(left.uri), escape(action))
        console.print(table)
    counts = []
    for action in ("would remove", "removed", "kept", "failed"):
        sizes = [row.leftover.bytes for row in rows if row.action == action]
        if sizes:
            counts.append(f"{action} {len(sizes)} ({_size(sum(sizes))})")
    console.print(f"{escape(out)}: " + (" · ".join(counts) or "no leftovers"), soft_wrap=True)
    if any(row.action == "would remove" for row in rows):
        console.print(f"to remove them: {escape(command)}", soft_wrap=True)


def print_comparison(found: Compared, *, as_json: bool) -> None:
    """The jobs that are not identical, one line each; what differs around them; the command that accepts them."""
    night = found.comparison
    if as_json:
        print_json(night.model_dump(mode="json"))
        return
    console = _console()
    told = [job for job in night.jobs if job.verdict != "identical"]
    if told:
        table = _table("job", "verdict", "PSNR", "SSIM", "seconds", "what")
        for job in told:
            measured = job.measurements
            psnr = "" if measured is None or measured.psnr is None else f"{measured.psnr.worst:.1f}"
            ssim = "" if measured is None or measured.ssim is None else f"{measured.ssim.worst:.3f}"
            seconds = "" if job.seconds is None else f"{job.seconds:.1f}"
            sentences = [job.text, *(breach.text for breach in job.breaches[1:]), *job.notes]
            table.add_row(
                escape(job.id), _status(job.verdict), psnr, ssim, seconds, escape("; ".join(dict.fromkeys(sentences)))
            )
        console.print(table)
    for change in night.environment:
        console.print(f"environment: {escape(change)}", soft_wrap=True)
    counts = " · ".join(f"{count} {name}" for name, count in night.counts.items() if name != "total")
    console.print(f"{escape(night.out)} against {escape(night.baseline)}: {counts}", soft_wrap=True)
    if found.report is not None:
        console.print(f"report: {escape(found.report)}", soft_wrap=True)
    if night.approve:
        console.print(f"to accept what differs: {escape(night.approve)}", soft_wrap=True)
    for line in found.suggestions:
        console.print(escape(line), soft_wrap=True)


def print_approved(baseline: str, rows: Sequence[ApproveRow], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            print_json(dataclasses.asdict(row))
        return
    console = _console()
    table = _table("job", "action", "what")
    for row in rows:
        table.add_row(escape(row.id), _status(row.action), escape("; ".join([row.detail, *row.notes])))
    console.print(table)
    found = {name: sum(row.action == name for row in rows) for name in ("approved", "removed", "unchanged", "refused")}
    counts = " · ".join(f"{count} {name}" for name, count in found.items() if count)
    console.print(f"{escape(baseline)}: {counts}", soft_wrap=True)


def print_quantized(made: Quantized) -> None:
    file = made.transformer
    print_text(f"{file.path}: {file.layers} layers in {file.format}, {file.bytes / 1e9:.3f} GB")
    if made.text_encoder is not None:
        text = made.text_encoder
        print_text(f"{text.path}: {text.linears} layers in INT4, {text.bytes_written / 1e9:.3f} GB")


def print_fetched(fetched: Fetched, *, dry_run: bool) -> None:
    done = "would be fetched" if dry_run else f"{fetched.downloaded_bytes / 1e9:.2f} GB fetched"
    print_text(f"{fetched.folder}: {fetched.files} files, {fetched.bytes / 1e9:.2f} GB, {done}")


def print_verification(found: Verification) -> None:
    """A line a file; or the layers of a quantised file and their sum; or each reading of a published file."""
    for file in found.files:
        print_text(f"{file.status:<8} {file.bytes or 0:>15,}  {file.path}  {file.note or ''}".rstrip())
    for row in found.plan:
        shape = "x".join(map(str, row.shape))
        print_text(f"{row.name:<60} {shape:>14} {row.packed_bytes:>13,} {row.other_bytes:>13,}")
    if found.plan:
        packed, other = (sum(getattr(row, name) for row in found.plan) for name in ("packed_bytes", "other_bytes"))
        quantised = sum(bool(row.packed_bytes) for row in found.plan)
        print_text(f"{quantised} layers quantised: {packed / 1e9:.3f} GB; the rest {other / 1e9:.3f} GB")
    if (settled := found.settled) is not None:
        print_text(f"{settled.file}, layer {settled.layer}: relative error of the weights, by how they are read")
        for comparison in settled.comparisons:
            print_text(f"  {comparison.error:8.4f}  {comparison.assumptions}")
        print_text(f"use: --assume {settled.assume}" if settled.assume else "no reading fits: not the same weights?")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


class _Console(Console):
    """Redacts every text that it prints or puts into a table. A broken pipe does not end the process with 1."""

    def render_str(self, text: str, **how: Any) -> Text:
        rendered = super().render_str(escape_control(text), **how)
        if (public := redact(rendered.plain)) != rendered.plain:
            rendered.plain = public
        return rendered

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _stop_writing()


def _console() -> Console:
    # Off a terminal rich assumes 80 columns and would cut paths and messages: there, nothing is wrapped.
    console = _Console()
    return console if console.is_terminal else _Console(width=200)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _status(status: str) -> str:
    return f"[{COLOURS.get(status, 'default')}]{status.replace('_', ' ')}[/]"
