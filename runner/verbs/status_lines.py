"""Status lines: the sentences that `status` prints about a run.

In:   a `RunStatus`. Out: lines of text. Never: printing, reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING

from runner.timing import hours_and_minutes

if TYPE_CHECKING:
    from runner.verbs.status import RunStatus, StatusRow

__all__ = [
    "FOLD_FROM",
    "counts_line",
    "details",
    "notable_rows",
    "others_line",
    "pace_line",
    "short_reason",
    "source_line",
]

HOSTS_NAMED = 4  # of more hosts only the number is shown
FOLD_FROM = 50  # rows; a longer table shows only the jobs that may need action


def counts_line(found: RunStatus) -> str:
    """Return e.g. `312 of 500 done · 3 failed · 2 running (gpu-a heard of 4 s ago, …) · 183 pending`.

    Jobs outside the run's manifest are not counted.
    """
    counts = found.counts
    done = f"{counts['succeeded']} of {counts['total']} done" if found.run_id else f"{counts['succeeded']} done"
    parts = [done, f"{counts['failed']} failed"]
    for state, heard in (("running", "heard of"), ("lost", "last heard of")):
        if counts[state]:
            rows = [row for row in found.rows if row.listed and row.status == state]
            parts.append(f"{counts[state]} {state} ({_hosts(rows, heard)})")
    parts += [f"{counts['pending']} pending"] if counts["pending"] else []
    parts += [f"{counts['with_warnings']} with warnings"] if counts["with_warnings"] else []
    return " · ".join(parts)


def _hosts(rows: Sequence[StatusRow], heard: str) -> str:
    """Return the hosts of the rows and when each was last heard of."""
    ages: dict[str, float] = {}
    for row in rows:
        host, age = row.host or "unknown host", row.heard_s or 0.0
        ages[host] = min(age, ages.get(host, age))
    if len(ages) <= HOSTS_NAMED:
        return ", ".join(f"{host} {heard} {age:.0f} s ago" for host, age in sorted(ages.items()))
    return f"{len(ages)} hosts {heard} {min(ages.values()):.0f} to {max(ages.values()):.0f} s ago"


def source_line(found: RunStatus) -> str:
    """Return the line that names the counted run and its manifest."""
    if found.run_id is None:
        return f"{found.out}: no run has written its list of jobs, so jobs that have not begun are not counted"
    return f"{found.out}, run {found.run_id} of {found.manifest}:"


def others_line(found: RunStatus) -> str | None:
    """Return e.g. `jobs of other manifests: 3 succeeded · 1 failed`; None if there are no others."""
    parts = [f"{count} {state}" for state, count in found.other_counts.items() if count]
    return f"jobs of other manifests: {' · '.join(parts)}" if parts else None


def pace_line(found: RunStatus, zone: tzinfo | None = None) -> str:
    """Return e.g. `12.4 jobs an hour · ETA 14:46:40 (in 3:12:00)`. `zone`: of the ETA; None: this machine's."""
    if not found.left:
        return "no job is left"
    rate, eta = found.rate_per_hour, found.eta_s
    pace = "no job of this run has ended yet" if rate is None else f"{rate:.{1 if rate < 100 else 0}f} jobs an hour"
    if not found.counts["running"]:
        return f"{pace} · no job is running"
    if eta is None:
        return pace
    at, now = (
        datetime.fromtimestamp(round(moment), UTC).astimezone(zone) for moment in (found.read_at + eta, found.read_at)
    )
    day = "" if at.date() == now.date() else f"{at:%Y-%m-%d} "
    return f"{pace} · ETA {day}{at:%H:%M:%S} (in {hours_and_minutes(eta)})"


def notable_rows(rows: Sequence[StatusRow]) -> list[StatusRow]:
    """Return the rows that may need action: neither done without a warning, nor not yet begun."""
    return [row for row in rows if row.warnings or not (row.status == "succeeded" or row.reason == "not begun")]


def short_reason(row: StatusRow) -> str:
    """Return a reason short enough for a table: `input.unreadable`, `generating on gpu-a, heard of 4 s ago`."""
    if row.host is not None:
        stage = row.stage or "started"
        last = "last " if row.status == "lost" else ""
        return f"{stage} on {row.host}, {last}heard of {row.heard_s or 0:.0f} s ago"
    return row.code or row.reason.partition(":")[0]


def details(rows: Sequence[StatusRow]) -> list[tuple[str, str]]:
    """Return (job, sentence) for reasons and warnings that a table has no room for, in the order of the rows.

    A warning begins with `!`.
    """
    found = []
    for row in rows:
        if row.status != "running" and row.reason != short_reason(row):
            found.append((row.id, row.reason))
        found += [(row.id, f"! {warning}") for warning in row.warnings]
    return found
