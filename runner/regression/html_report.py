"""HTML report: writes one HTML file that shows the changes of a night, without network and without other files.

In:   a `NightComparison`, the evidence of its jobs. Out: one HTML file. Never: how a verdict is made, how anything is
measured, remote storage.

Scripts and styles are inside the page; only they are allowed, by their hashes (Content-Security-Policy). Ids, notes and
errors are untrusted text and are escaped. Videos are base64 data blocks at the end of the page. The script makes a
player of each when it comes into view. The page is written job by job, with one chunk of a video in memory.
"""

from __future__ import annotations

import base64
import io
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from runner.regression.evidence import AMPLIFIED, PICTURES, JobEvidence, VideoLink
from runner.regression.findings import FrameValues, JobFinding, NightComparison, Verdict
from runner.regression.html_page import (
    content_policy,
    duration,
    may_be_linked,
    megabytes,
    template_environment,
    template_text,
    written_whole,
)

__all__ = ["TOTAL_EMBED_BYTES", "VERDICTS", "write_html"]

# The meaning of each verdict, in the order of the report.
VERDICTS: dict[Verdict, str] = {
    "broken": "a limit is broken",
    "failed": "the night has no output of the job",
    "new": "the job has no baseline yet",
    "missing": "the job is only in the baseline",
    "uncalibrated": "it differs; no limit is known for this model and device",
    "changed": "it differs within the limits",
    "draft": "a first night, accepted as a draft",
    "identical": "the same frames",
}
EXIT_CODES = {
    0: "nothing to approve or repair",
    1: "a job failed",
    2: "the baseline cannot be read or has none of these jobs",
    4: "a job differs, is new or is missing",
}
TO_LOOK_AT = ("broken", "failed", "new", "missing")
ON_ONE_LINE = ("identical", "draft")
VIDEOS = ("baseline", "new")

# A browser keeps the page in memory; beyond this size the remaining videos are linked. Assumed: 8 GB laptops open it.
TOTAL_EMBED_BYTES = 512 * 2**20
CHUNK = 3 * 2**18  # bytes read at once; a multiple of three, so that base64 chunks need no padding

PLOT_WIDTH, PLOT_HEIGHT = 1000, 100  # units of the SVG, stretched by the page
PLOT_POINTS = 500  # maximum points of a curve: a wide screen does not show more
PSNR_TOP = 60.0  # dB: differences above it are invisible, and equal frames (100 dB) would flatten the rest of the curve


def write_html(comparison: NightComparison, evidence: Iterable[JobEvidence], dest: Path, *, embed_bytes: int) -> None:
    """Write the report to `dest`, completely or not at all.

    evidence: of the jobs that have some, in the order of `comparison.jobs`; it is read once, job by job.
    embed_bytes: a video file of at most this size is embedded, until the page has `TOTAL_EMBED_BYTES`; a larger one is
    linked if it has a URL. Raises ValueError for evidence in another order, StorageFull and StorageDenied.
    """
    # The head needs the links' origins and the pictures' shapes, which are known only after the last job.
    # The videos' bytes come last, so that the page can be used while they are still loading.
    with written_whole(Path(dest), "body", "media") as (part, body, media):
        with body.open("wb") as out, media.open("wb") as videos:
            page = _Page(out, videos, embed_bytes)
            for number, (job, shown) in enumerate(_paired(comparison.jobs, evidence), start=1):
                page.add(number, job, shown)
            page.end_lines()
        with part.open("wb") as out, body.open("rb") as jobs, media.open("rb") as videos:
            out.write(_head(comparison, page).encode())
            shutil.copyfileobj(jobs, out, CHUNK)
            out.write(_render("report_tail.html", script=_text("report.js"), verdicts=VERDICTS).encode())
            shutil.copyfileobj(videos, out, CHUNK)
            out.write(b"</body>\n</html>\n")


def _paired(
    jobs: Iterable[JobFinding], evidence: Iterable[JobEvidence]
) -> Iterator[tuple[JobFinding, JobEvidence | None]]:
    waiting = iter(evidence)
    following = next(waiting, None)
    for job in jobs:
        if following is not None and following.finding.id == job.id:
            yield job, following
            following = next(waiting, None)
        else:
            yield job, None
    if following is not None:
        raise ValueError(f"evidence of job {following.finding.id!r} is not in the order of the comparison's jobs")


@dataclass
class _Page:
    """The jobs of the page, written one after the other, and the facts about them that the head needs."""

    out: IO[bytes]
    media: IO[bytes]  # data blocks of the embedded videos
    embed_bytes: int
    embedded: int = 0
    in_lines: bool = False
    sources: set[str] = field(default_factory=set)  # of media-src
    shapes: set[tuple[int, int]] = field(default_factory=set)

    def add(self, number: int, job: JobFinding, shown: JobEvidence | None) -> None:
        on_one_line = job.verdict in ON_ONE_LINE and not (shown and (shown.pictures or shown.videos))
        if on_one_line != self.in_lines:
            self._write('<ul class="lines">\n' if on_one_line else "</ul>\n")
            self.in_lines = on_one_line
        if on_one_line:
            self._write(_render("report_line.html", number=number, job=job))
            return
        left_out = dict(shown.left_out) if shown else {}
        videos = self._videos(number, shown, left_out)
        self._write(
            _render(
                "report_job.html",
                number=number,
                job=job,
                pictures=self._pictures(shown),
                picture_frame=shown.picture_frame if shown else None,
                amplified=AMPLIFIED,
                left_out=left_out,
                videos=videos,
                data=_player_data(job, shown, videos),
                curves=_curves(job),
            )
        )
        for video in videos:
            if video.file is not None:
                self._embed(video.media, video.file)

    def end_lines(self) -> None:
        if self.in_lines:
            self._write("</ul>\n")
            self.in_lines = False

    def _pictures(self, shown: JobEvidence | None) -> list[_Picture]:
        found = []
        for name in PICTURES if shown else ():
            if shown and (data := shown.pictures.get(name)):
                size, kind = _picture_header(data)
                self.shapes.add(size)
                url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
                found.append(_Picture(name, url, _shape(size)))
        return found

    def _write(self, text: str) -> None:
        self.out.write(text.encode())

    def _videos(self, number: int, shown: JobEvidence | None, left_out: dict[str, str]) -> list[_Video]:
        """Return the videos of one job in order; put the reason for a missing video into `left_out`."""
        videos = []
        for name in VIDEOS:
            link = shown.videos.get(name) if shown else None
            if link is None:
                continue
            size = _bytes_of(link)
            if size is not None and size <= self.embed_bytes and self.embedded + size <= TOTAL_EMBED_BYTES:
                self.embedded += size
                videos.append(_Video(name, f"media-{number}-{name}", link, file=link.file))
            elif may_be_linked(link.url):
                self.sources.add(_source(link.url))
                videos.append(_Video(name, "", link, url=link.url))
            else:
                left_out[f"{name} video"] = (
                    "it cannot be read" if size is None else f"it is too large to embed ({megabytes(size)})"
                )
                continue
            self.shapes.add(link.size)
        return videos

    def _embed(self, media: str, file: Path) -> None:
        self.media.write(f'<script type="text/plain" id="{media}">'.encode())
        with suppress(FileNotFoundError), file.open("rb") as source:  # the player reports a block without bytes
            while chunk := source.read(CHUNK):
                self.media.write(base64.b64encode(chunk))
        self.media.write(b"</script>\n")


@dataclass(frozen=True)
class _Picture:
    name: str
    url: str  # data:
    shape: str


@dataclass(frozen=True)
class _Video:
    name: str
    media: str  # id of its data block
    link: VideoLink
    file: Path | None = None
    url: str = ""

    @property
    def shape(self) -> str:
        return _shape(self.link.size)


def _bytes_of(link: VideoLink) -> int | None:
    if link.file is None:
        return None
    with suppress(OSError):
        return link.file.stat().st_size
    return None


def _source(url: str) -> str:
    """Return the entry of media-src that allows this address."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return "file:"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.scheme else "'self'"


def _picture_header(data: bytes) -> tuple[tuple[int, int], str]:
    """Return ((width, height), media subtype)."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        return image.size, str(image.format).lower()


def _shape(size: tuple[int, int]) -> str:
    return f"r{size[0]}x{size[1]}"


def _player_data(job: JobFinding, shown: JobEvidence | None, videos: list[_Video]) -> dict[str, Any]:
    """Return a job's data for the page's script."""
    timing = {video.name: {"fps": float(video.link.fps), "frames": video.link.frames} for video in videos}
    measured = job.measurements
    return {
        "videos": timing,
        "frames": max((video.link.frames for video in videos), default=0),
        "start": (shown.picture_frame if shown else None) or 0,
        "psnr": _numbers(measured.psnr, 2) if measured else [],
        "ssim": _numbers(measured.ssim, 4) if measured else [],
    }


def _numbers(metric: FrameValues | None, digits: int) -> list[float | None]:
    values = metric.values if metric is not None else []
    return [round(value, digits) if math.isfinite(value) else None for value in values]


@dataclass(frozen=True)
class _Curve:
    """One metric, frame by frame, as an SVG of `PLOT_WIDTH` by `PLOT_HEIGHT` units."""

    key: str
    name: str
    unit: str
    digits: int
    metric: FrameValues
    frames: int
    line: str
    joints: list[tuple[int, float]]  # first frame after the joint, x
    worst: tuple[float, float]
    limit: float | None  # y
    limit_value: float | None
    top: str
    bottom: str


def _curves(job: JobFinding) -> list[_Curve]:
    if job.measurements is None:
        return []
    found = []
    for key, name, unit, digits, metric, top in (
        ("psnr", "PSNR", "dB", 1, job.measurements.psnr, PSNR_TOP),
        ("ssim", "SSIM", "", 4, job.measurements.ssim, 1.0),
    ):
        if metric is not None and len(metric.values) > 1:
            limit = next((breach.limit for breach in job.breaches if breach.metric == f"{key}_min"), None)
            found.append(_curve(key, name, unit, digits, metric, top, limit, job.joints))
    return found


def _curve(
    key: str, name: str, unit: str, digits: int, metric: FrameValues, top: float, limit: float | None, joints: list[int]
) -> _Curve:
    values = [min(value, top) if math.isfinite(value) else top for value in metric.values]
    frames = len(values)
    bottom = min(*values, top if limit is None else limit)
    bottom -= max((top - bottom) * 0.08, 10**-digits)  # the worst frame's mark stays inside

    def across(frame: float) -> float:
        return round(frame / (frames - 1) * PLOT_WIDTH, 1)

    def down(value: float) -> float:
        return round((top - value) / (top - bottom) * PLOT_HEIGHT, 1)

    # The worst value of each bucket of frames: a mean would hide a single bad frame.
    step = max(1, math.ceil(frames / PLOT_POINTS))
    chosen = [min(range(at, min(at + step, frames)), key=values.__getitem__) for at in range(0, frames, step)]
    worst = min(metric.worst_frame, frames - 1)
    return _Curve(
        key=key,
        name=name,
        unit=unit,
        digits=digits,
        metric=metric,
        frames=frames,
        line="M" + " L".join(f"{across(frame):g} {down(values[frame]):g}" for frame in chosen),
        joints=[(joint, across(joint - 0.5)) for joint in joints if 0 < joint < frames],
        worst=(across(worst), down(values[worst])),
        limit=None if limit is None or limit > top else down(limit),
        limit_value=limit,
        top=f"{top:g}" + ("+" if max(metric.values) > top else ""),
        bottom=f"{bottom:.{digits}f}",
    )


def _head(comparison: NightComparison, page: _Page) -> str:
    style = (
        _text("page.css")
        + _text("report.css")
        + "".join(f".{_shape(size)}{{--ratio:{size[0] / size[1]:.5f}}}\n" for size in sorted(page.shapes))
    )
    media = " ".join(["data:", "blob:", *sorted(page.sources)])
    total = comparison.counts.get("total", len(comparison.jobs))
    timed = [job for job in comparison.jobs if job.seconds is not None and job.seconds_median is not None]
    return _render(
        "report_head.html",
        comparison=comparison,
        policy=content_policy(_text("report.js"), style, f"media-src {media}"),
        style=style,
        headline=_headline(comparison.counts, total),
        exit_code_means=EXIT_CODES.get(comparison.exit_code, ""),
        total=total,
        counts=[(verdict, comparison.counts.get(verdict, 0), meaning) for verdict, meaning in VERDICTS.items()],
        slower=sum(any(found.verdict in ("slower", "larger") for found in job.performance) for job in comparison.jobs),
        faster=sum(any(found.verdict == "better" for found in job.performance) for job in comparison.jobs),
        seconds=sum(job.seconds or 0.0 for job in timed),
        seconds_median=sum(job.seconds_median or 0.0 for job in timed),
    )


def _headline(counts: Mapping[str, int], total: int) -> str:
    jobs = f"of {total} {'job' if total == 1 else 'jobs'}"
    if to_look_at := sum(counts.get(verdict, 0) for verdict in TO_LOOK_AT):
        return f"{to_look_at} {jobs} {'needs' if to_look_at == 1 else 'need'} a look"
    if differing := counts.get("uncalibrated", 0):
        verb, whom = ("differs", "it") if differing == 1 else ("differ", "them")
        return f"{differing} {jobs} {verb}; no limits are known for {whom}"
    return f"No job of {total} needs a look"


def _text(name: str) -> str:
    """Return a script or style of the templates, as it appears in the page."""
    return template_text(_environment(), name)


def _render(template: str, **values: Any) -> str:
    return str(_environment().get_template(template).render(values))


@cache
def _environment() -> Any:
    environment = template_environment("runner.regression", "templates")
    environment.filters |= {"amount": _amount, "signed": _signed}
    return environment


def _amount(value: float, unit: str) -> str:
    return duration(value) if unit == "s" else megabytes(value)


def _signed(values: Iterable[float], digits: int = 1) -> str:
    return " ".join(f"{value:+.{digits}f}" for value in values)
