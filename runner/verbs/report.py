"""Report: collects one run over all its shards from the output folder, and writes its report.

In:   `ReportSettings`. Out: a `RunReport`, and its files beside the run's summaries or in the folder `to`.
Never: inputs, models; the meaning of the report's numbers, which is in report_building.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from runner.batch.run_jobs import read_run_jobs
from runner.errors import ConfigInvalid, InputError, first_few
from runner.records.events import default_logging
from runner.records.output_layout import (
    REPORT_HTML,
    REPORT_JSON,
    RUN_JOBS,
    RUNS,
    SUMMARY,
    run_folder,
    run_key,
    shard_of_summary,
    split_run_key,
)
from runner.records.record import RunJobsRecord, RunSummary
from runner.records.run_report import RunReport
from runner.storage import ObjectInfo, Storage, is_remote, local_path, open_storage
from runner.timing import now
from runner.verbs.flag_values import parse_age
from runner.verbs.report_building import RunFacts, build_report
from runner.verbs.report_page import write_page
from runner.verbs.settings import ReportSettings
from runner.verbs.status import StatusReader, read_jobs, read_run_status
from runner.verbs.status_watch import wait_for_end

__all__ = ["Reported", "report"]

READS_AT_ONCE = 32
NAMED = 5  # runs that an error names


@dataclass(frozen=True)
class Reported:
    """report: the collected report. files: places of its files, for users."""

    report: RunReport
    files: tuple[str, ...]


@default_logging()
def report(settings: ReportSettings) -> Reported:
    """The verb `report`: collect the facts of a run and write its report; with `wait`, after no job is left.

    After `timeout` the report has the facts so far. Raises ConfigInvalid, also for a run that has not begun by then;
    storage.*.
    """
    storage = open_storage(settings.out)
    facts = _collect(storage, _wait(storage, settings) if settings.wait else settings.run)
    found = build_report(facts, made_at=now(), gpu_hour=settings.gpu_hour)
    addresses = {job.id: _address(storage, job.output, beside=settings.to is None) for job in found.jobs if job.output}
    if settings.to is None:
        place, folder = storage, run_folder(facts.run_id)
    else:
        place, folder = open_storage(settings.to), ""
    with TemporaryDirectory(prefix="video-lab-report-") as scratch:
        page = Path(scratch) / REPORT_HTML
        write_page(found, page, posters=storage.read_bytes, link=addresses.get)
        place.write_bytes(folder + REPORT_JSON, found.to_json())
        place.publish(page, folder + REPORT_HTML)  # last: if the page exists, so does the other file
    return Reported(found, tuple(place.uri(folder + name) for name in (REPORT_HTML, REPORT_JSON)))


def _wait(storage: Storage, settings: ReportSettings) -> str | None:
    """Wait until no job of the run is left; return the run's id."""
    timeout_s = None if settings.timeout is None else parse_age(settings.timeout)
    read = StatusReader(storage, settings.run).read
    return wait_for_end(read, every_s=settings.every, timeout_s=timeout_s).run_id


def _address(storage: Storage, output: str, *, beside: bool) -> str:
    """Return an output's address for a link. `beside`: the page is in the run's folder, so the link is relative."""
    root = storage.root.rstrip("/") + "/"
    if beside and output.startswith(root):
        return quote("../../" + output.removeprefix(root))
    return output if is_remote(output) else local_path(output).absolute().as_uri()


def _collect(storage: Storage, run_id: str | None) -> RunFacts:
    """Return the facts of one run from the output folder; by default of the run that began last."""
    runs = _list_runs(storage)
    chosen = _choose(storage, runs, run_id)
    files = runs[chosen]
    notes: list[str] = []
    kept = _read_kept(storage, chosen, notes) if RUN_JOBS in files else None
    found = read_run_status(storage, chosen) if kept else read_jobs(storage)
    shards = [shard for name in sorted(files) if (shard := shard_of_summary(name)) is not None]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        data = pool.map(lambda shard: storage.read_bytes(run_key(chosen, shard, SUMMARY)), shards)
        summaries = _parse_summaries(zip(shards, data, strict=True), notes)
    return RunFacts(
        run_id=chosen,
        out=storage.root,
        kept=kept,
        summaries=summaries,
        rows={row.id: row for row in found.rows},
        records=found.records,
        marks=found.marks,
        kept_at=min(info.modified for info in files.values()),
        notes=notes,
    )


def _list_runs(storage: Storage) -> dict[str, dict[str, ObjectInfo]]:
    """Return run id → its list of jobs and its summaries, by name; only runs that have one of these."""
    found: dict[str, dict[str, ObjectInfo]] = {}
    for info in storage.list(RUNS):
        names = split_run_key(info.key)
        if names is not None and (names[1] == RUN_JOBS or shard_of_summary(names[1]) is not None):
            found.setdefault(names[0], {})[names[1]] = info
    return found


def _choose(storage: Storage, runs: dict[str, dict[str, ObjectInfo]], run_id: str | None) -> str:
    """Return `run_id` if there is such a run; without it the run that began last.

    Runs of an older version have no list of jobs; among them it is the run that ended last.
    """
    if not runs:
        todo = "Name the folder that was given to --out of a run"
        raise ConfigInvalid("has no run", where=storage.root, todo=todo)
    # The jobs are written when a run begins, the summaries while it lasts.
    ages = {run: (RUN_JOBS in files, (files.get(RUN_JOBS) or _newest(files)).modified) for run, files in runs.items()}
    by_age = sorted(runs, key=lambda run: (ages[run], run), reverse=True)
    if run_id is None:
        return by_age[0]
    if run_id not in runs:
        known = f"The newest runs there are {first_few(by_age, NAMED)}; leave out --run for the newest"
        raise ConfigInvalid(f"there is no run {run_id}", where=storage.root, todo=known)
    return run_id


def _newest(files: dict[str, ObjectInfo]) -> ObjectInfo:
    return max(files.values(), key=lambda info: info.modified)


def _read_kept(storage: Storage, run_id: str, notes: list[str]) -> RunJobsRecord | None:
    try:
        return read_run_jobs(storage, run_id)
    except InputError as error:
        notes.append(f"{error.message}.")
        return None


def _parse_summaries(read: Iterable[tuple[str, bytes | None]], notes: list[str]) -> dict[str, RunSummary]:
    found = {}
    for shard, data in read:
        if data is None:  # removed after the listing
            continue
        try:
            found[shard] = RunSummary.model_validate(json.loads(data))
        except ValueError as error:
            notes.append(f"The summary of shard {shard} cannot be read: {str(error).splitlines()[0]}.")
    return found
