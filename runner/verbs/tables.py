"""Tables: prints the results of verbs: tables and lines on standard output, errors on standard error.

In:   rows, text. Out: text without secrets and without characters that change a terminal. Never: decisions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from runner.errors import RunnerError
from runner.records.record import JobLine
from runner.redact import escape_control, for_people, redact, redact_tree
from runner.verbs.fitted_table import UNLIMITED, TableLayout, new_table, print_fitted, print_table

if TYPE_CHECKING:
    from runner.finishing.interpolation import InterpolationForecast
    from runner.spec.manifest import Manifest
    from runner.verbs.approve import ApproveRow
    from runner.verbs.clean import CleanRow
    from runner.verbs.compare import Compared
    from runner.verbs.doctor import Check
    from runner.verbs.dry_run import Action
    from runner.verbs.outcome import RunOutcome
    from runner.verbs.plan import FastForecast, Forecast, SvdqForecast
    from runner.verbs.quantize import Quantized
    from runner.verbs.submit import Submitted
    from runner.verbs.weights import Verification
    from runner.weights.fetch import Fetched

__all__ = [
    "coloured",
    "open_console",
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
    "print_submitted",
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
    "would run": "yellow",
    "leased by another runner": "yellow",
    "exhausted": "red",
    "would fail": "red",
}


SPARE_COLUMNS = ("overlap", "padding", "denoised", "GB ", "PFLOP", "steps", "segments")  # of a plan, first to last
SHORT_REASON = 32  # characters of a reason that fit a column of a narrow table
ACTIONS: Mapping[Action, str] = MappingProxyType(
    {
        "run": "would run",
        "skip": "skipped",
        "leased": "leased by another runner",
        "exhausted": "exhausted",
        "fail": "would fail",
    }
)


def print_text(text: str) -> None:
    """Print one or more lines on standard output."""
    _write(for_people(text))


def print_error(text: str) -> None:
    """Print text on standard error, after flushing standard output. A stream that cannot be written is ignored."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()
    except (OSError, ValueError):
        pass
    with suppress(OSError, ValueError):
        print(for_people(text), file=sys.stderr)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print a JSON-able value; in ASCII if standard output is not UTF-8."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(redact_tree(value), ensure_ascii=not unicode, indent=indent)
    _write("".join(f"\\u{ord(c):04x}" if c != "\n" and escape_control(c) != c else c for c in text))


def _write(text: str) -> None:
    try:
        print(text)
    except BrokenPipeError:
        _stop_writing()


def _stop_writing() -> None:
    """Drop all further output: the reader of standard output has closed it (`video-lab run … | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_run(outcome: RunOutcome, console: Console | None = None) -> None:
    """Print the run's table, errors and warnings, counts and folders. For a dry run: what would run."""
    console = console or open_console()
    print_fitted(console, _layouts_of_decisions(outcome) if outcome.dry_run else _layouts_of_run(outcome))
    for line in outcome.lines:
        if line.error is not None:
            _print_line(console, line.id, f"[red]{escape(line.error.code)}[/]: {escape(line.error.message)}")
    warned: dict[str, list[str]] = {}
    for line in outcome.lines:
        for warning in line.warnings:
            warned.setdefault(warning, []).append(line.id)
    for warning, ids in warned.items():  # a warning that many jobs share is one line
        _print_line(console, ids[0] if len(ids) == 1 else f"{len(ids)} jobs", f"[yellow]![/] {escape(warning)}")
    counts = _counts_of_decisions(outcome) if outcome.dry_run else dict(outcome.counts)
    counts["with warnings"] = sum(bool(line.warnings) for line in outcome.lines)
    found = " · ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    console.print(found, soft_wrap=True)
    console.print(f"outputs: {escape(outcome.outputs)}", soft_wrap=True)
    if outcome.dry_run:
        console.print("dry run: nothing was rendered or written", soft_wrap=True)
    else:
        console.print(f"summary: {escape(outcome.summary)}", soft_wrap=True)
    if outcome.sheet is not None:
        console.print(escape(outcome.sheet), soft_wrap=True)


def _print_line(console: Console, job_id: str, markup: str) -> None:
    console.print(f"{escape(job_id)}: {markup}", soft_wrap=True)


def _layouts_of_run(outcome: RunOutcome) -> list[Callable[[], TableLayout]]:
    """Return layouts, the fullest first: full outputs, outputs below the run's or the job's folder, short reasons."""
    lines = outcome.lines
    full = [line.output or "" for line in lines]
    below = [output.removeprefix(outcome.outputs) for output in full]
    names = [output.removeprefix(f"{line.id}/") for output, line in zip(below, lines, strict=True)]

    def layout(outputs: Sequence[str], longest: int, folds: bool = False) -> TableLayout:
        reasons, moved = _split_reasons(lines, longest)
        if not any(outputs) and any(full):
            moved.append("no room for: output")
        seconds = ["" if line.seconds is None else f"{line.seconds:.1f}" for line in lines]
        more = {"seconds": seconds, "why": [escape(reason) for reason in reasons]}
        more |= {"output": [escape(output) for output in outputs]}
        more = {name: cells for name, cells in more.items() if any(cells)}
        table = new_table("job", "status", *more, whole=("status", *more), gap=1 if folds else 2)
        for index, line in enumerate(lines):
            warned = f" [yellow]!{len(line.warnings)}[/]" if line.warnings else ""
            cells = [column[index] for column in more.values()]
            table.add_row(escape(line.id), coloured(line.status) + warned, *cells)
        return TableLayout(table, moved, folds)

    kinds = [(outputs, longest) for outputs in (full, below, names) for longest in (UNLIMITED, SHORT_REASON)]
    found = [partial(layout, *kind) for kind in (*kinds, (names, 0))]
    return [*found, partial(layout, names, 0, folds=True), partial(layout, [""] * len(lines), 0, folds=True)]


def _layouts_of_decisions(outcome: RunOutcome) -> list[Callable[[], TableLayout]]:
    def layout(longest: int) -> TableLayout:
        reasons, moved = _split_reasons(outcome.lines, longest)
        table = new_table("job", "what", *(["why"] if any(reasons) else []), whole=("what", "why"))
        for line, reason in zip(outcome.lines, reasons, strict=True):
            action = ACTIONS[(outcome.actions or {})[line.id]]
            table.add_row(escape(line.id), coloured(action), *([escape(reason)] if any(reasons) else []))
        return TableLayout(table, moved)

    return [partial(layout, longest) for longest in (UNLIMITED, SHORT_REASON, 0)]


def _counts_of_decisions(outcome: RunOutcome) -> dict[str, int]:
    found = Counter((outcome.actions or {}).values())
    return {"total": len(outcome.lines)} | {name: found[action] for action, name in ACTIONS.items()}


def _split_reasons(lines: Sequence[JobLine], longest: int) -> tuple[list[str], list[str]]:
    """Return the cells of the column `why`, and the lines below the table for reasons longer than `longest`.

    A reason that several jobs share is one line with their number.
    """
    cells = [line.reason if len(line.reason) <= longest else "" for line in lines]
    moved: dict[str, list[str]] = {}
    for line, cell in zip(lines, cells, strict=True):
        if line.reason and not cell:
            moved.setdefault(line.reason, []).append(line.id)
    found = []
    for reason, ids in moved.items():
        found.append(f"{escape(ids[0]) if len(ids) == 1 else f'{len(ids)} jobs'}: {escape(reason)}")
    return cells, found


def print_problems(manifest: Manifest, problems: Sequence[tuple[str, RunnerError]], *, checked: bool) -> None:
    console = open_console()
    for job_id, error in problems:
        console.print(f"[red]{escape(job_id)}[/]  {error.code}: {escape(error.message)}", soft_wrap=True)
    found = f"{len({job_id for job_id, _ in problems})} cannot be rendered"
    found += "" if checked else ", inputs not checked"
    console.print(f"{escape(manifest.source)}: {len(manifest.jobs)} jobs, {found}", soft_wrap=True)


def print_plan(
    rows: Sequence[Forecast],
    gpu: str | None = None,
    warnings: Sequence[str] = (),
    fast: FastForecast | None = None,
    svdq: SvdqForecast | None = None,
) -> None:
    """Print the forecast of each job and the totals.

    `gpu`: name of the GPU of the forecast seconds; None leaves the column out. The column GB has the device's peak per
    memory mode. `warnings`: of the whole run. `fast`: forecast of the recipe whose precision depends on the device.
    `svdq`: for a recipe in an SVDQuant format: its file, and its seconds on every GPU that computes it.

    On a narrow terminal some columns are left out; they are named below the table.
    """
    console = open_console()
    cells = {row.job_id: _plan_cells(row, gpu) for row in rows}
    columns = list(dict.fromkeys(name for found in cells.values() for name in found))

    def layout(left_out: Sequence[str]) -> TableLayout:
        kept = [name for name in columns if name not in left_out]
        table = new_table("job", *kept, whole=kept)
        for job_id, found in cells.items():
            table.add_row(escape(job_id), *(found.get(name, "-") for name in kept))
        return TableLayout(table, [f"no room for: {', '.join(left_out)}"] if left_out else [])

    ranked = [next((name for name in columns if name.startswith(start)), None) for start in SPARE_COLUMNS]
    spare = [name for name in ranked if name is not None]
    print_fitted(console, [partial(layout, spare[:count]) for count in range(len(spare) + 1)])
    for row in rows:
        if row.error is not None:
            _print_line(console, row.job_id, f"[red]{escape(row.error.code)}[/]: {escape(row.error.message)}")
        if row.interpolation is not None:
            _print_line(console, row.job_id, _interpolated(row.interpolation, gpu))
        for warning in row.warnings:
            _print_line(console, row.job_id, f"[yellow]![/] {escape(warning)}")
    for warning in warnings:
        console.print(f"[yellow]![/] {escape(warning)}", soft_wrap=True)
    total = f"{len(rows)} jobs, {sum(row.tflop for row in rows) / 1e3:.4g} PFLOP by the models' shapes"
    if gpu is None:
        console.print(f"{total}; no known GPU here: use --gpu NAME to forecast seconds", soft_wrap=True)
    else:
        seconds = sum(row.seconds or 0.0 for row in rows)
        console.print(
            f"{total}; {seconds:.4g} s on one {gpu} (forecast, without loading, compiling and encoding new prompts)",
            soft_wrap=True,
        )
    for line in (fast, svdq):
        if line is not None:
            console.print(escape(str(line)), soft_wrap=True)


def _interpolated(between: InterpolationForecast, gpu: str | None) -> str:
    rate = f"{float(between.fps):.4g} frames a second"
    text = f"interpolated to {between.frames} frames, {rate}: {between.tflop:.3g} TFLOP"
    if gpu is not None and between.seconds is not None:
        text += f", at least {between.seconds:.2g} s on {gpu}"
    return f"{text}, {between.memory_bytes / 1e9:.2g} GB between segments"


def _plan_cells(row: Forecast, gpu: str | None) -> dict[str, str]:
    """Return column → cell; empty for a job that cannot be planned."""
    plan = row.plan
    if plan is None:
        return {}
    cells = {
        "frames": str(plan.frames),
        "size": f"{plan.width}x{plan.height}",
        "segments": f"{plan.segments} x {plan.segment_frames}",
        "denoised": str(plan.denoised_frames),
        "padding": f"{plan.padding_frames / plan.denoised_frames:.1%}",
        "overlap": f"{plan.overlap_total / plan.denoised_frames:.1%}",
        "steps": str(plan.steps),
        "PFLOP": f"{plan.tflop / 1e3:.4g}",
    }
    if row.memory:
        cells[f"GB {' / '.join(row.memory)}"] = " / ".join(f"{peak / 1e9:.3g}" for peak in row.memory.values())
    if gpu:
        cells[f"s on {gpu}"] = f"{plan.seconds:.3g}" if plan.seconds is not None else "?"
    return cells


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table of checks. On a narrow terminal the remedies are below the table."""

    def layout(todo_below: bool) -> TableLayout:
        columns = ["check", "result", "found"] + ([] if todo_below else ["what to do"])
        table = new_table(*columns, whole=("check", "result"))
        for check in checks:
            cells = [escape(check.name), coloured(check.status), escape(check.found)]
            table.add_row(*cells, *([] if todo_below else [escape(check.todo)]))
        below = [f"{escape(check.name)}: {escape(check.todo)}" for check in checks if check.todo]
        return TableLayout(table, below if todo_below else [])

    print_fitted(open_console(), [partial(layout, todo_below) for todo_below in (False, True)])


def print_clean(out: str, rows: Sequence[CleanRow], command: str, *, as_json: bool) -> None:
    """Print the leftovers. `command` removes them; it is shown if a leftover would be removed."""
    console = open_console()
    if as_json:
        for row in rows:
            fields = dataclasses.asdict(row.leftover) | {"action": row.action, "reason": row.reason}
            print_json({name: value for name, value in fields.items() if name not in ("upload_id", "abandoned")})
        return
    if rows:
        table = new_table("what", "bytes", "age", "where", "action")
        for row in rows:
            left = row.leftover
            action = f"{row.action}: {row.reason}" if row.reason else row.action
            table.add_row(left.kind, str(left.bytes), _age(row.age_s), escape(left.uri), escape(action))
        print_table(console, table)
    counts = []
    for action in ("would remove", "removed", "kept", "failed"):
        sizes = [row.leftover.bytes for row in rows if row.action == action]
        if sizes:
            counts.append(f"{action} {len(sizes)} ({_size(sum(sizes))})")
    console.print(f"{escape(out)}: " + (" · ".join(counts) or "no leftovers"), soft_wrap=True)
    if any(row.action == "would remove" for row in rows):
        console.print(f"to remove them, run: {escape(command)}", soft_wrap=True)


def print_comparison(found: Compared, *, as_json: bool) -> None:
    """Print each job that is not identical, changes of the environment, and the command that accepts the jobs."""
    night = found.comparison
    if as_json:
        print_json(night.model_dump(mode="json"))
        return
    console = open_console()
    differing = [job for job in night.jobs if job.verdict != "identical"]
    if differing:
        table = new_table("job", "verdict", "PSNR", "SSIM", "seconds", "what")
        for job in differing:
            measured = job.measurements
            psnr = "" if measured is None or measured.psnr is None else f"{measured.psnr.worst:.1f}"
            ssim = "" if measured is None or measured.ssim is None else f"{measured.ssim.worst:.3f}"
            seconds = "" if job.seconds is None else f"{job.seconds:.1f}"
            sentences = [job.text, *(breach.text for breach in job.breaches[1:]), *job.notes]
            table.add_row(
                escape(job.id), coloured(job.verdict), psnr, ssim, seconds, escape("; ".join(dict.fromkeys(sentences)))
            )
        print_table(console, table)
    for change in night.environment:
        console.print(f"environment: {escape(change)}", soft_wrap=True)
    counts = " · ".join(f"{count} {name}" for name, count in night.counts.items() if name != "total")
    console.print(f"{escape(night.out)} against {escape(night.baseline)}: {counts}", soft_wrap=True)
    if found.report is not None:
        console.print(f"report: {escape(found.report)}", soft_wrap=True)
    if night.approve:
        console.print(f"to accept the differences, run: {escape(night.approve)}", soft_wrap=True)
    for line in found.suggestions:
        console.print(escape(line), soft_wrap=True)


def print_approved(baseline: str, rows: Sequence[ApproveRow], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            print_json(dataclasses.asdict(row))
        return
    console = open_console()
    table = new_table("job", "action", "what")
    for row in rows:
        table.add_row(escape(row.id), coloured(row.action), escape("; ".join([row.detail, *row.notes])))
    print_table(console, table)
    found = {name: sum(row.action == name for row in rows) for name in ("approved", "removed", "unchanged", "refused")}
    counts = " · ".join(f"{count} {name}" for name, count in found.items() if count)
    console.print(f"{escape(baseline)}: {counts}", soft_wrap=True)


def print_quantized(made: Quantized) -> None:
    file = made.transformer
    print_text(f"{file.path}: {file.layers} layers in {file.format}, {file.bytes / 1e9:.3f} GB")
    if made.text_encoder is not None:
        text = made.text_encoder
        print_text(f"{text.path}: {text.linears} layers in INT4, {text.bytes_written / 1e9:.3f} GB")
    if made.exported is not None:
        print_text(f"{made.exported}: the same layers in another program's format")
    for remark in made.remarks:
        print_text(remark)


def print_fetched(fetched: Fetched, *, dry_run: bool) -> None:
    done = "would be fetched" if dry_run else f"{fetched.downloaded_bytes / 1e9:.2f} GB fetched"
    print_text(f"{fetched.folder}: {fetched.files} files, {fetched.bytes / 1e9:.2f} GB, {done}")


def print_submitted(found: Submitted) -> None:
    """Print what was submitted and how to watch it, or which files were written and how to submit them."""
    jobs = "1 job" if found.jobs == 1 else f"{found.jobs} jobs"
    tasks = "1 task" if found.tasks.tasks == 1 else f"{found.tasks.tasks} tasks"
    print_text(f"run {found.run_id} on {found.platform}: {jobs} in {tasks} ({found.tasks.reason})")
    if found.folder is not None:
        print_text(f"written into {found.folder}: {', '.join(found.files)}; nothing was sent")
        print_text(f"to submit it, run {Path(found.folder, 'submit.sh')}")
        return
    if found.uploaded:
        print_text(f"input files sent: {found.uploaded}")
    for job in found.ids:
        print_text(f"{job.role:<6} {job.id}")
    print_text("to watch or stop it:")
    for line in found.watch:
        print_text(f"  {line}")


def print_verification(found: Verification) -> None:
    """Print one line per file; or the layers of a quantised file and their sums; or the errors per read option."""
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
        print_text(f"{settled.file}, layer {settled.layer}: relative error of the weights for each set of read options")
        for comparison in settled.comparisons:
            print_text(f"  {comparison.error:8.4f}  {comparison.options}")
        print_text(
            f"use: --assume {settled.assume}"
            if settled.assume
            else "no read options fit: the two files may hold different weights"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


class _Console(Console):
    """Redacts every text that it prints or puts into a table. A broken pipe does not end the process with code 1."""

    def render_str(self, text: str, **how: Any) -> Text:
        rendered = super().render_str(escape_control(text), **how)
        if (public := redact(rendered.plain)) != rendered.plain:
            rendered.plain = public
        return rendered

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _stop_writing()


def open_console() -> Console:
    """Return the console on which tables are printed."""
    # Without a terminal rich assumes 80 columns and would cut paths and messages, so nothing is wrapped there.
    console = _Console()
    return console if console.is_terminal else _Console(width=UNLIMITED)


def coloured(status: str) -> str:
    """Return a status as coloured markup."""
    return f"[{COLOURS.get(status, 'default')}]{status.replace('_', ' ')}[/]"
