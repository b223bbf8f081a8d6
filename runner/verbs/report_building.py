"""Report building: builds one `RunReport` from the files of a run's shards.

In:   `RunFacts`: summaries, records, marks and the rows of `status`. Out: a `RunReport`. Never: storage, clocks.

Each host's times come from its own clock. Times of two hosts are comparable as far as their clocks agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any, get_args

from runner.batch.shards import Shard
from runner.batch.shared_run import merge_lines
from runner.errors import first_few
from runner.records.output_layout import POSTER, job_key
from runner.records.record import (
    AttemptMark,
    JobLine,
    OutputRecord,
    ProcessUsage,
    ResultRecord,
    ReuseRecord,
    RunJobsRecord,
    RunSummary,
)
from runner.records.run_report import GpuSeconds, JobReport, JobState, ProcessReport, RunReport, StageSpan
from runner.timing import unix_time
from runner.verbs.status import SeenMark, StatusRow

__all__ = ["RunFacts", "build_report"]

NAMED = 5  # jobs that a note names


@dataclass(frozen=True)
class RunFacts:
    """The facts of one run.

    kept: the jobs of its manifest; None if it wrote no list of jobs. summaries: by shard. rows, records, marks: by job,
    for every job of the output folder, of any run. kept_at: write time of the run's oldest file, seconds since 1970.
    notes: sentences about files that could not be read.
    """

    run_id: str
    out: str
    kept: RunJobsRecord | None
    summaries: Mapping[str, RunSummary]
    rows: Mapping[str, StatusRow]
    records: Mapping[str, ResultRecord]
    marks: Mapping[str, SeenMark]
    kept_at: float
    notes: Sequence[str] = ()


@dataclass
class _ShardProcess:
    """One process of one shard; times in seconds since 1970."""

    shard: str
    host: str
    begin: float
    end: float
    usage: ProcessUsage | None = None  # None: it wrote no summary
    exit_code: int | None = None
    stopped_by: str | None = None
    records: list[ResultRecord] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.usage is not None and self.usage.finished

    def spent(self) -> GpuSeconds:
        """Return the process's GPU seconds.

        The summary of a killed process lacks the last jobs; the records give at least their work.
        """
        recorded = sum(_gpu_s(record) or 0.0 for record in self.records)
        work = max(recorded, self.usage.work_s if self.usage else 0.0)
        loading = self.usage.loading_s if self.usage else 0.0
        total = max(self.end - self.begin, work + loading)
        work, loading, total = round(work, 3), round(loading, 3), round(total, 3)
        idle = round(max(0.0, total - work - loading), 3)
        return GpuSeconds(total=round(work + loading + idle, 3), work=work, loading=loading, idle=idle)

    def device(self) -> str:
        named = (record.computed_by.get("device", "") for record in self.records)
        return (self.usage.device if self.usage else "") or next(filter(None, named), "")


def build_report(facts: RunFacts, *, made_at: str, gpu_hour: float | None = None) -> RunReport:
    """Return the report. `gpu_hour`: the price of one device per hour."""
    processes = _processes(facts)
    jobs = _jobs(facts)
    own = {job_id: record for job_id, record in facts.records.items() if record.run_id == facts.run_id}
    own = {job.id: own[job.id] for job in jobs if job.id in own}
    begin, end = _lasting(facts, processes, own.values())
    spent = [process.spent() for process in processes]
    sums = {name: round(sum(getattr(one, name) for one in spent), 3) for name in ("total", "work", "loading", "idle")}
    cost = sums["total"] * gpu_hour / 3600 if gpu_hour is not None and processes else None
    jobs = _with_costs(jobs, own, cost)
    film_s = sum(job.film_s or 0.0 for job in jobs if job.status == "succeeded")
    states = Counter[str](job.status for job in jobs)
    newest = max(facts.summaries.values(), key=lambda summary: summary.started_at, default=None)
    about = facts.kept or newest
    under_way = any(seen.mark.run_id == facts.run_id for seen in facts.marks.values())
    ended = bool(processes or facts.summaries) and not under_way and all(process.finished for process in processes)
    ended = ended and all(summary.finished_at is not None for summary in facts.summaries.values())
    return RunReport(
        run_id=facts.run_id,
        out=facts.out,
        manifest=about.manifest if about else "",
        recipe=about.recipe if about else "",
        made_at=made_at,
        started_at=_iso(begin),
        finished_at=_iso(end) if ended else None,
        seconds=round(end - begin, 3),
        counts={"total": len(jobs)} | {state: states[state] for state in get_args(JobState)},
        gpu_seconds=GpuSeconds(**sums),
        film_s=round(film_s, 6),
        gpu_hour=gpu_hour,
        cost=cost,
        cost_per_film_s=cost / film_s if cost is not None and film_s else None,
        caches=_caches(own.values()),
        stages_s=_longest_first(record.timings_s for record in own.values()),
        processes=[_process_report(process, one, begin) for process, one in zip(processes, spent, strict=True)],
        jobs=jobs,
        notes=[*facts.notes, *_notes(facts, processes, jobs, own)],
    )


# -- processes ---------------------------------------------------------------------------------------------------------


def _processes(facts: RunFacts) -> list[_ShardProcess]:
    """Return the processes by host, shard and start, each with the records that it wrote.

    A record or a mark of a process without a summary extends the process's end.
    """
    found: list[_ShardProcess] = []
    for shard, summary in facts.summaries.items():
        for usage in summary.processes:
            begin = unix_time(usage.started_at)
            if begin is None:
                continue
            process = _ShardProcess(shard, usage.host, begin, begin + usage.seconds, usage)
            if usage is summary.processes[-1]:
                process.exit_code, process.stopped_by = summary.exit_code, summary.stopped_by
            found.append(process)
    for record in sorted(facts.records.values(), key=lambda record: record.started_at):
        begin, end = unix_time(record.started_at), unix_time(record.finished_at)
        if record.run_id != facts.run_id or not record.host or begin is None or end is None:
            continue
        of_shard = [process for process in found if (process.shard, process.host) == (record.shard, record.host)]
        maker = _latest(of_shard, begin)
        if maker is None:
            maker = _ShardProcess(record.shard, record.host, begin, end)
            found.append(maker)
        maker.records.append(record)
        if not maker.finished:
            maker.end = max(maker.end, end)
    for seen in facts.marks.values():
        holder = _process_of_mark(facts.run_id, found, seen.mark)
        if holder is not None and not holder.finished:
            holder.end = max(holder.end, seen.heard_at)
    return sorted(found, key=lambda process: (process.host, process.shard, process.begin))


def _process_of_mark(run_id: str, processes: Iterable[_ShardProcess], mark: AttemptMark) -> _ShardProcess | None:
    begin = unix_time(mark.started_at)
    if mark.run_id != run_id or mark.process is None or begin is None:
        return None
    who = mark.host, mark.process.pid
    return _latest([one for one in processes if one.usage is not None and (one.host, one.usage.pid) == who], begin)


def _latest(processes: Iterable[_ShardProcess], moment: float) -> _ShardProcess | None:
    """Return the process that began last before `moment`."""
    return max((one for one in processes if one.begin <= moment), key=lambda one: one.begin, default=None)


def _process_report(process: _ShardProcess, spent: GpuSeconds, run_begin: float) -> ProcessReport:
    spans = []
    for span in process.usage.loading if process.usage else ():
        begin, end = (process.begin - run_begin + at for at in (span.begin_s, span.end_s))
        spans.append(StageSpan(stage="load", begin_s=round(begin, 3), end_s=round(end, 3)))
    for record in process.records:
        after = (unix_time(record.started_at) or process.begin) - run_begin
        for stage in ("prepare", "generate", "deliver"):
            lasted = record.spans.get(stage)
            if lasted is not None:
                begin, end = round(after + lasted.begin_s, 3), round(after + lasted.end_s, 3)
                spans.append(StageSpan(stage=stage, job_id=record.job_id, begin_s=begin, end_s=end))
    return ProcessReport(
        shard=process.shard,
        host=process.host,
        pid=process.usage.pid if process.usage else None,
        device=process.device(),
        begin_s=round(process.begin - run_begin, 3),
        end_s=round(process.end - run_begin, 3),
        finished=process.finished,
        exit_code=process.exit_code,
        stopped_by=process.stopped_by,
        gpu_seconds=spent,
        spans=sorted(spans, key=lambda span: span.begin_s),
    )


def _lasting(
    facts: RunFacts, processes: Iterable[_ShardProcess], records: Iterable[ResultRecord]
) -> tuple[float, float]:
    """Return (start, end) of the run, in seconds since 1970.

    From its processes, and from summaries without processes; without these, from records and marks.
    """
    found = [(process.begin, process.end) for process in processes]
    for summary in facts.summaries.values():
        begin = unix_time(summary.started_at)
        if not summary.processes and begin is not None:
            found.append((begin, begin + summary.seconds))
    if not found:
        moments = [(unix_time(record.started_at), unix_time(record.finished_at)) for record in records]
        moments += [
            (unix_time(seen.mark.started_at), seen.heard_at)
            for seen in facts.marks.values()
            if seen.mark.run_id == facts.run_id
        ]
        found = [(begin, end) for begin, end in moments if begin is not None and end is not None]
    if not found:
        found = [(facts.kept_at, facts.kept_at)]
    begin = min(begin for begin, _ in found)
    return begin, max(begin, *(end for _, end in found))


# -- jobs --------------------------------------------------------------------------------------------------------------


def _jobs(facts: RunFacts) -> list[JobReport]:
    """Return the jobs in the manifest's order, then other jobs of the run. Without costs."""
    listed = list(facts.kept.jobs) if facts.kept else []
    lines = [line for summary in facts.summaries.values() for line in summary.jobs]
    merged = {line.id: line for line in merge_lines(listed, lines)}
    taken = [job_id for job_id, record in facts.records.items() if record.run_id == facts.run_id]
    taken += [job_id for job_id, seen in facts.marks.items() if seen.mark.run_id == facts.run_id]
    return [_job(facts, job_id, merged.get(job_id)) for job_id in dict.fromkeys([*merged, *sorted(taken)])]


def _job(facts: RunFacts, job_id: str, line: JobLine | None) -> JobReport:
    record = facts.records.get(job_id)
    own = record if record is not None and record.run_id == facts.run_id else None
    state = _state(facts, job_id, line, own)
    if state in ("running", "lost", "pending"):
        return _open_job(facts, job_id, state)
    if own is not None or (line is not None and line.status in ("succeeded", "failed")):
        return _own_job(facts, job_id, state, line, own)
    return _other_job(facts, job_id, state, line)


def _open_job(facts: RunFacts, job_id: str, state: JobState) -> JobReport:
    """Return the report of a job that has not ended."""
    seen, record = facts.marks.get(job_id), facts.records.get(job_id)
    if state == "pending" or seen is None:
        again = "" if record is None else f"to be rendered again: the existing output is of run {record.run_id}"
        return JobReport(id=job_id, status=state, reason=again or "not begun")
    mark = seen.mark
    reason = f"{mark.stage} since {mark.started_at}"
    if state == "lost":
        reason += "; its process has ended or stopped reporting: a rerun takes the job over"
    return JobReport(id=job_id, status=state, reason=reason, attempt=mark.attempt, host=mark.host)


def _own_job(
    facts: RunFacts, job_id: str, state: JobState, line: JobLine | None, own: ResultRecord | None
) -> JobReport:
    """Return the report of a job that this run ended. If another run has replaced the record, the summary is used."""
    known = {} if own is None else _measured(own)
    if state == "succeeded":
        known |= {"output": line.output if line else None} if own is None else _film(facts, job_id, own.output)
    if known.get("wall_s") is None:
        known["wall_s"] = line.seconds if line else None
    matching = line if line is not None and line.status == state else None
    error = (matching.error if matching else None) or (own.error if own else None)
    return JobReport(
        id=job_id,
        status=state,
        reason=matching.reason if matching else own.reason if own else "",
        attempt=matching.attempt if matching else own.attempt if own else None,
        error=error if state == "failed" else None,
        warnings=own.warnings if own else matching.warnings if matching else [],
        **known,
    )


def _other_job(facts: RunFacts, job_id: str, state: JobState, line: JobLine | None) -> JobReport:
    """Return the report of a job that another run ended, from its record."""
    record = facts.records.get(job_id)
    skipped = line is not None and line.status == "skipped"
    if record is None or (state == "failed" and record.error is None):  # a failure that kept an older output
        reason = line.reason if line is not None and skipped else "another run ended it"
        return JobReport(id=job_id, status=state, reason=reason, warnings=line.warnings if line else [])
    return JobReport(
        id=job_id,
        status=state,
        reason=line.reason if line is not None and skipped else f"{record.status} in run {record.run_id}",
        attempt=record.attempt,
        error=record.error if state == "failed" else None,
        warnings=record.warnings,
        **_film(facts, job_id, record.output),
    )


def _state(facts: RunFacts, job_id: str, line: JobLine | None, own: ResultRecord | None) -> JobState:
    """Return the job's state in this run; if the run has no fact about it, the state from `status`.

    A record of the run has priority over its line: a restarted shard lists its earlier jobs as `skipped`, and a killed
    process has not written all lines.
    """
    row, seen = facts.rows.get(job_id), facts.marks.get(job_id)
    mark = seen.mark if seen is not None and seen.mark.run_id == facts.run_id else None
    # A process may be killed after it wrote the record and before the lease ends: then the record counts.
    later = mark is not None and (own is None or mark.started_at > own.finished_at)
    if row is not None and row.status in ("running", "lost") and later:
        return "lost" if row.status == "lost" else "running"
    failed_again = line is not None and line.status == "failed" and row is not None and row.status == "failed"
    if own is not None:  # a failure that keeps an older output also keeps the older record
        return "failed" if failed_again else own.status
    if line is not None and line.status in ("succeeded", "failed"):
        return "failed" if line.status == "failed" else "succeeded"
    if line is not None and line.status == "skipped" and not _was_left_out(facts, job_id):
        return "skipped"
    if row is None:
        return "pending"
    return "skipped" if row.status == "succeeded" else row.status


def _was_left_out(facts: RunFacts, job_id: str) -> bool:
    """Whether a skipped job was not done before the run and is not done now: --retry-failed leaves out such jobs."""
    row, record = facts.rows.get(job_id), facts.records.get(job_id)
    if record is None or row is None:
        return True
    begin = min((summary.started_at for summary in facts.summaries.values()), default="")
    return row.status == "pending" and record.finished_at < begin


def _measured(record: ResultRecord) -> dict[str, Any]:
    forecast = record.memory.forecast
    return {
        "host": record.host,
        "shard": record.shard,
        "wall_s": record.wall_s,
        "gpu_s": _gpu_s(record),
        "forecast_s": record.efficiency.forecast_s if record.efficiency else None,
        "device_bytes": record.memory.process_gpu_peak_bytes,
        "forecast_bytes": max(forecast.values()) if forecast else None,
        "host_bytes": record.memory.host_rss_peak_bytes,
        "stages_s": _longest_first([record.timings_s]),
    }


def _gpu_s(record: ResultRecord) -> float | None:
    """Return the GPU seconds of a job; an older record has them under an older name."""
    if record.gpu_s is None and record.efficiency is not None:
        return record.efficiency.generation_s
    return record.gpu_s


def _film(facts: RunFacts, job_id: str, output: OutputRecord | None) -> dict[str, Any]:
    if output is None:
        return {}
    try:
        length = round(float(output.frames / Fraction(output.fps)), 6)
    except (ValueError, ZeroDivisionError):
        length = None
    return {
        "frames": output.frames,
        "fps": output.fps,
        "film_s": length,
        "width": output.width,
        "height": output.height,
        "output": f"{facts.out.rstrip('/')}/{output.key}",
        "poster": job_key(job_id, POSTER),
    }


def _with_costs(jobs: Sequence[JobReport], own: Mapping[str, ResultRecord], cost: float | None) -> list[JobReport]:
    """Divide the whole cost among the jobs that this run rendered, in proportion to their `gpu_s`.

    So the cost of failed attempts, loading and idle time is divided among them too.
    """
    worked = {job.id: job.gpu_s for job in jobs if job.status == "succeeded" and job.id in own and job.gpu_s}
    if cost is None or not worked:
        return list(jobs)
    total = sum(worked.values())
    return [
        job.model_copy(update={"cost": cost * (worked[job.id] / total)}) if job.id in worked else job for job in jobs
    ]


# -- sums --------------------------------------------------------------------------------------------------------------


def _longest_first(timings: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return stage → total seconds, the longest first."""
    sums: dict[str, float] = {}
    for stages in timings:
        for name, seconds in stages.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return {name: round(sums[name], 3) for name in sorted(sums, key=lambda name: (-sums[name], name))}


def _caches(records: Iterable[ResultRecord]) -> dict[str, ReuseRecord]:
    found: dict[str, list[ReuseRecord]] = {}
    for record in records:
        for name, use in record.reuse.items():
            found.setdefault(name, []).append(use)
    sums = {}
    for name, uses in sorted(found.items()):
        hits, misses = sum(use.hits for use in uses), sum(use.misses for use in uses)
        rate = round(hits / max(1, hits + misses), 4)
        most = max((use.bytes for use in uses if use.bytes is not None), default=None)
        sums[name] = ReuseRecord(hits=hits, misses=misses, hit_rate=rate, bytes=most)
    return sums


# -- what is not known -------------------------------------------------------------------------------------------------


def _notes(
    facts: RunFacts, processes: Sequence[_ShardProcess], jobs: Sequence[JobReport], own: Mapping[str, ResultRecord]
) -> list[str]:
    found = []
    if facts.kept is None:
        found.append("The run has written no list of its manifest's jobs: jobs that it did not begin are not known.")
    missing = _missing_shards(facts.summaries)
    if missing:
        found.append(f"Shards that have written no summary: {_some(missing)}. Their GPU seconds may not be complete.")
    older = sorted(shard for shard, summary in facts.summaries.items() if not summary.processes)
    if older:
        found.append(
            f"The summaries of an older version do not list their processes: {_some(older)}. Their GPU seconds and "
            "their cost are not known."
        )
    plain = sorted(job_id for job_id, record in own.items() if record.gpu_s is None and record.status == "succeeded")
    if plain:
        found.append(f"Records of an older version, without hosts and times by thread: {_some(plain)}.")
    replaced = [job.id for job in jobs if job.status == "succeeded" and job.id not in own]
    if replaced:
        found.append(
            f"Jobs that another run has rendered since: {_some(replaced)}. What this run measured of them is not known."
        )
    broken = [process for process in processes if not process.finished]
    if broken:
        names = (f"{one.host} {one.usage.pid}" if one.usage else f"{one.host}, shard {one.shard}" for one in broken)
        found.append(
            f"Processes that still run or were killed: {_some(list(names))}. Their seconds end at their last report, "
            "and work without a record counts as idle time."
        )
    for job_id, seen in facts.marks.items():
        mark = seen.mark
        if mark.run_id != facts.run_id or _process_of_mark(facts.run_id, processes, mark) is not None:
            continue
        if not any(one.usage is None and one.host == mark.host for one in processes):
            who = f"{mark.host} {mark.process.pid}" if mark.process else mark.host
            found.append(f"The process {who}, which has job {job_id}, has written no summary: its seconds are missing.")
    if len({process.host for process in processes}) > 1:
        found.append("Each host's times come from its own clock: differences between clocks shift the hosts' times.")
    return found


def _missing_shards(summaries: Iterable[str]) -> list[str]:
    """Return the shards I-of-N that have no summary."""
    there = {shard for name in summaries if (shard := Shard.named(name)) is not None}
    counts = sorted({shard.count for shard in there})
    wanted = [Shard(index, count) for count in counts for index in range(count)]
    return [shard.name for shard in wanted if shard not in there]


def _some(names: Sequence[str]) -> str:
    return first_few(names, NAMED)


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
