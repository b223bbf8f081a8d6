"""Compare: compares a night's renders with the approved ones, and writes the reports.

In:   an output storage, a baseline. Out: `Compared`; with `report` four files, and the videos that are too large for
the page. Never: printing. It changes the baseline only with `record` or `bootstrap`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import structlog

from runner.batch.scratch import scratch_folder
from runner.errors import ConfigInvalid, InputError
from runner.records.events import default_logging
from runner.records.record import ResultRecord
from runner.regression.approving import ApprovalRequest, Refused
from runner.regression.baseline import Baseline, BaselineJob
from runner.regression.baseline_layout import JobName, name_job
from runner.regression.defaults import CALIBRATED, is_calibrated
from runner.regression.evidence import JobEvidence, VideoLink
from runner.regression.findings import JobFinding, NightComparison
from runner.regression.html_report import write_html
from runner.regression.identity import MetricNetworks
from runner.regression.job_comparison import BASELINE_UNREADABLE, JobComparison
from runner.regression.judge import ORDER, environment_changes, exit_code_of_verdicts
from runner.regression.junit_report import junit
from runner.regression.kept_limits import limits_by_job, limits_of_manifest
from runner.regression.markdown_report import markdown
from runner.regression.night_renders import NightRender
from runner.regression.nights import Night, collect_nights, last_nights, record_night, suggest_limits
from runner.regression.performance import judge_performance
from runner.spec.regression_limits import RegressionLimits
from runner.storage import Storage, open_storage, probe_writable
from runner.storage.sync import sync_models
from runner.timing import now
from runner.verbs.approve import default_approver, missing_jobs
from runner.verbs.selection import fits
from runner.verbs.settings import CompareSettings
from runner.verbs.status import read_jobs
from runner.verbs.validate import read_manifest

__all__ = ["Compared", "compare"]

READS_AT_ONCE = 16
MB = 1_000_000
HTML, JUNIT, JSON, MARKDOWN, VIDEOS = "report.html", "junit.xml", "comparison.json", "summary.md", "videos"
SUGGEST_FROM = 30  # nights of the history, at most
FIRST_NIGHT = "a first night, accepted by compare --bootstrap"


@dataclass(frozen=True)
class Compared:
    """The result of a comparison."""

    comparison: NightComparison
    report: str | None = None  # folder or URI of the report
    suggestions: tuple[str, ...] = ()  # lines of YAML: limits derived from the nights of the history


@default_logging()
def compare(settings: CompareSettings) -> Compared:
    """The verb `compare`.

    The exit code is in `comparison`, the first of these that applies: 2 if a render of the baseline cannot be read, 4
    if a job differs, is new or missing, 1 if a job failed, else 0.

    Raises ConfigInvalid if OUT or the baseline has none of the jobs, ManifestInvalid, InputUnreadable for damaged
    approvals, storage.*.
    """
    out, store = open_storage(settings.out), open_storage(settings.baseline)
    report = None if settings.report is None else open_storage(settings.report)
    if report is not None:
        probe_writable(report)
    with scratch_folder(settings.cache) as scratch:
        return _Night(settings, out, store, report, scratch).compare()


class _Night:
    """One comparison."""

    def __init__(
        self, settings: CompareSettings, out: Storage, store: Storage, report: Storage | None, scratch: Path
    ) -> None:
        self._settings, self._out, self._report, self._scratch = settings, out, report, scratch
        self._begun, self._made_at = time.monotonic(), now()
        self._baseline = Baseline(store, scratch=scratch)
        self._store, self._histories = store, dict[tuple[str, str], list[Night]]()
        self._limits = self._read_limits()
        self._networks = self._open_networks()
        self._evidence: dict[str, JobEvidence] = {}
        self._environment: Counter[str] = Counter()  # difference → number of jobs that have it

    def compare(self) -> Compared:
        settings = self._settings
        jobs = read_jobs(self._out)
        chosen = [(row, jobs.records.get(row.id)) for row in jobs.rows if fits(row.id, settings.only)]
        done = {row.id: record for row, record in chosen if row.status == "succeeded"}
        night = {job_id: NightRender(self._out, rec) for job_id, rec in done.items() if rec is not None and rec.output}
        names = {job_id: name_job(job.record) for job_id, job in night.items()}
        found = self._baseline.find(names.values())
        gone_from_night = missing_jobs(self._baseline, list(names.values()), found, {row.id for row in jobs.rows})
        missing = [job for job in gone_from_night if fits(job.name.job_id, settings.only)]
        self._check_any(chosen, night, found, missing)
        standing = {job_id: found[name] for job_id, name in names.items() if name in found}
        gone = self._look(night, standing)
        findings = []
        for row, record in chosen:
            if row.id in gone:
                text = f"the night's output cannot be read: {gone[row.id].message}"
                findings.append(_failed(row.id, text, f"{gone[row.id].code}: {gone[row.id].message}", record))
            elif row.id not in night:
                findings.append(_failed(row.id, f"the night has no output: {row.status}", row.reason, record))
            else:
                findings.append(self._finding(night[row.id], standing.get(row.id)))
        findings += [_missing(job) for job in missing]
        findings.sort(key=lambda finding: (ORDER.index(finding.verdict), finding.id))
        comparison = self._summary(findings)
        if settings.record:
            self._record_night(comparison, night)
        if self._report is not None:
            self._write_report(self._report, comparison)
        suggestions = self._suggest(names.values()) if settings.suggest else ()
        return Compared(comparison, None if self._report is None else self._report.root, suggestions)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read_limits(self) -> Mapping[str, RegressionLimits]:
        if self._settings.manifest is not None:
            return limits_of_manifest(read_manifest(self._settings.manifest))
        return limits_by_job(self._out)

    def _open_networks(self) -> MetricNetworks | None:
        if self._settings.models is None:
            return None
        models = sync_models(self._settings.models, self._settings.cache / "models", MetricNetworks.wanted)
        return MetricNetworks.open(models)

    def _check_any(
        self,
        chosen: Sequence[object],
        night: Mapping[str, NightRender],
        found: Mapping[JobName, BaselineJob],
        missing: Sequence[BaselineJob],
    ) -> None:
        only = " or ".join(self._settings.only)
        if not chosen and not missing:
            what = f"has no job that fits {only}" if only else "has no job"
            raise ConfigInvalid(what, where=self._out.root, todo="`video-lab status` lists the jobs")
        if night and not found and not missing and not self._settings.bootstrap:
            words = ["video-lab", "approve", self._settings.out, "--baseline", self._settings.baseline]
            raise ConfigInvalid(
                "has none of these jobs",
                where=self._baseline.storage.root,
                todo="Look at the outputs, then accept them: "
                f"`{shlex.join([*words, '--why', 'the first night'])}`. Or accept them unseen: compare --bootstrap",
            )

    def _look(self, night: Mapping[str, NightRender], standing: Mapping[str, BaselineJob]) -> dict[str, InputError]:
        """Return job id → error for missing outputs. Small files are read in parallel: a request takes about 20 ms."""

        def look(job_id: str) -> InputError | None:
            try:
                night[job_id].check_there()
            except InputError as error:
                return error
            if job_id in standing:
                with suppress(InputError):  # reported when the job is compared
                    standing[job_id].record  # noqa: B018
            return None

        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = dict(zip(night, pool.map(look, night), strict=True))
        return {job_id: error for job_id, error in found.items() if error is not None}

    # -- one job -------------------------------------------------------------------------------------------------------

    def _finding(self, job: NightRender, standing: BaselineJob | None) -> JobFinding:
        record, job_id = job.record, job.record.job_id
        comparison = JobComparison(self._networks, None if self._report is None else self._keep_video)
        finding = JobFinding(
            id=job_id,
            verdict="new",
            text="the baseline does not have this job",
            frames=job.output.frames,
            seconds=round(sum(record.timings_s.values()), 3),
            device=name_job(record).device,
            recipe=record.recipe,
            run_id=record.run_id,
        )
        folder = self._scratch / "jobs" / job_id
        try:
            if standing is None:
                finding, evidence = comparison.show_new(finding, job, folder)
                if finding.verdict == "new" and self._settings.bootstrap:
                    finding = self._accept_draft(finding, record)
            else:
                finding, evidence = self._compare_with(comparison, finding, job, standing, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if evidence is not None:
            self._evidence[job_id] = evidence
        structlog.get_logger().info("compared", job=job_id, verdict=finding.verdict, why=finding.text)
        return finding

    def _compare_with(
        self, comparison: JobComparison, finding: JobFinding, job: NightRender, standing: BaselineJob, folder: Path
    ) -> tuple[JobFinding, JobEvidence | None]:
        record, approval = job.record, standing.approval
        given = self._limits.get(finding.id, RegressionLimits())
        calibrated = CALIBRATED if is_calibrated(record) else None
        finding = finding.model_copy(
            update={
                "baseline_device": standing.name.device,
                "baseline_run_id": approval.run_id,
                "approved": approval.sentence(),
                "notes": ["the baseline is a draft that was accepted unseen"] if approval.draft else [],
            }
        )
        with suppress(InputError):  # the comparison reports an unreadable baseline
            before = standing.record
            self._environment.update(environment_changes(record, before))
            finding = finding.model_copy(update=self._performance(record, before, given, calibrated))
        return comparison.compare(finding, job, standing, folder, given=given, calibrated=calibrated)

    def _accept_draft(self, finding: JobFinding, record: ResultRecord) -> JobFinding:
        request = ApprovalRequest(default_approver(), FIRST_NIGHT, draft=True, as_of=self._made_at)
        accepted = self._baseline.approve(self._out, record, request)
        if isinstance(accepted, Refused):
            return finding.model_copy(update={"text": f"it was not accepted as a draft: {accepted.why}"})
        return finding.model_copy(update={"verdict": "draft", "text": "a first night, accepted as a draft"})

    def _keep_video(self, job_id: str, side: str, link: VideoLink) -> VideoLink:
        """Keep a small video for the page; store a larger one beside the page."""
        assert link.file is not None and self._report is not None
        if link.file.stat().st_size <= self._settings.embed_mb * MB:
            kept = self._scratch / "evidence" / job_id / f"{side}.mp4"
            kept.parent.mkdir(parents=True, exist_ok=True)
            return replace(link, file=link.file.replace(kept))
        key = f"{VIDEOS}/{job_id}/{side}.mp4"
        self._report.publish(link.file, key)
        return replace(link, file=None, url=quote(key))

    def _performance(
        self, record: ResultRecord, before: ResultRecord, given: RegressionLimits, calibrated: RegressionLimits | None
    ) -> dict[str, Any]:
        """Return the fields of the finding about seconds and memory."""
        name = name_job(record)
        place = name.device, name.recipe
        if place not in self._histories:
            self._histories[place] = last_nights(self._store, *place, without=record.run_id)
        limits = given.over(calibrated or RegressionLimits())
        found = judge_performance(record, self._histories[place], limits, baseline=before)
        whole = next((one for one in found if one.unit == "s" and one.verdict != "not judged"), None)
        return {"performance": found, "seconds_median": None if whole is None else whole.median}

    # -- the whole night -----------------------------------------------------------------------------------------------

    def _summary(self, findings: Sequence[JobFinding]) -> NightComparison:
        verdicts = [finding.verdict for finding in findings]
        counts = Counter(verdicts)
        unreadable = any(breach.metric == BASELINE_UNREADABLE for job in findings for breach in job.breaches)
        return NightComparison(
            out=self._settings.out,
            baseline=self._settings.baseline,
            made_at=self._made_at,
            seconds=round(time.monotonic() - self._begun, 3),
            exit_code=2 if unreadable else exit_code_of_verdicts(verdicts),
            counts={"total": len(findings)} | {verdict: counts[verdict] for verdict in ORDER if counts[verdict]},
            environment=[f"{what} ({_count(jobs, 'job')})" for what, jobs in sorted(self._environment.items())],
            approve=self._approve_command(findings),
            jobs=list(findings),
        )

    def _record_night(self, comparison: NightComparison, night: Mapping[str, NightRender]) -> None:
        findings = {finding.id: finding for finding in comparison.jobs}
        runs = Counter(job.record.run_id for job in night.values())
        if runs:
            run_id = max(runs, key=lambda run: (runs[run], run))
            jobs = ((job.record, findings.get(job_id)) for job_id, job in night.items())
            for found in collect_nights(jobs, run_id):
                record_night(self._store, found)

    def _suggest(self, names: Iterable[JobName]) -> tuple[str, ...]:
        """Return limits in YAML, each with its reason, from the nights of the devices and recipes of `names`."""
        places = dict.fromkeys((name.device, name.recipe) for name in names)
        nights = [night for place in places for night in last_nights(self._store, *place, SUGGEST_FROM)]
        found = suggest_limits(nights)
        lines = [f"regression: # suggested by {_count(len(nights), 'night')} of the history"]
        for limit, value in found.limits.model_dump(mode="json", exclude_none=True).items():
            lines.append(f"  {limit}: {json.dumps(value)} # {found.why[limit]}")
        too_few = "the history has too few nights to suggest limits; add nights with --record"
        return tuple(lines) if len(lines) > 1 else (too_few,)

    def _approve_command(self, findings: Sequence[JobFinding]) -> str:
        """Return the command that accepts all differences; empty if there are none."""
        accepted = [finding.id for finding in findings if finding.verdict in ("broken", "new", "uncalibrated")]
        gone = [finding.id for finding in findings if finding.verdict == "missing"]
        if not accepted and not gone:
            return ""
        words = ["video-lab", "approve", self._settings.out, "--baseline", self._settings.baseline]
        for job_id in [*accepted, *gone]:
            words += ["--job", job_id]
        words += ["--missing"] if gone else []
        return shlex.join(
            [*words, "--as-of", self._made_at, "--why", f"accepted after compare of {self._made_at[:10]}"]
        )

    def _write_report(self, report: Storage, comparison: NightComparison) -> None:
        """Write four files, the page last: if the page exists, so do the others."""
        report.write_bytes(JSON, comparison.to_json())
        report.write_bytes(MARKDOWN, markdown(comparison).encode())
        report.write_bytes(JUNIT, junit(comparison))
        page = self._scratch / HTML
        shown = (self._evidence[finding.id] for finding in comparison.jobs if finding.id in self._evidence)
        write_html(comparison, shown, page, embed_bytes=int(self._settings.embed_mb * MB))
        report.publish(page, HTML)


def _failed(job_id: str, text: str, error: str, record: ResultRecord | None) -> JobFinding:
    """`record`: of the attempt that failed, or an older one."""
    fields = {} if record is None else {"recipe": record.recipe, "run_id": record.run_id}
    return JobFinding(id=job_id, verdict="failed", text=text, error=error, **fields)


def _missing(job: BaselineJob) -> JobFinding:
    return JobFinding(
        id=job.name.job_id,
        verdict="missing",
        text="only the baseline has this job: the night did not render it",
        baseline_device=job.name.device,
        recipe=job.name.recipe,
        baseline_run_id=job.approval.run_id,
        approved=job.approval.sentence(),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
