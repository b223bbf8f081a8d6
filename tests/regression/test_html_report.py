"""The HTML report as a file: what it holds, that it is one file, and that foreign text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest

from runner.errors import StorageDenied
from runner.regression import html_report
from runner.regression.evidence import JobEvidence, VideoLink
from runner.regression.findings import FrameValues, Measurements, NightComparison, Verdict
from runner.regression.html_report import VERDICTS, write_html
from tests.parsed_html import ParsedPage, policy
from tests.regression.report_samples import HOSTILE, indexed_evidence, make_comparison, make_finding

ROOT = Path(__file__).resolve().parents[2]


def write(comparison: NightComparison, folder: Path, evidence=(), embed_bytes: int = 10**7) -> ParsedPage:
    write_html(comparison, evidence, folder / "report.html", embed_bytes=embed_bytes)
    return ParsedPage((folder / "report.html").read_text(encoding="utf-8"))


def test_verdicts_are_explained_in_order_of_findings():
    assert tuple(VERDICTS) == get_args(Verdict)


def test_write_html_shows_counts_environment_command_and_jobs_in_order(tmp_path):
    jobs = [make_finding(verdict) for verdict in VERDICTS] + [make_finding("identical", f"same-{i}") for i in range(3)]
    comparison = make_comparison(jobs)
    page = write(comparison, tmp_path)
    assert "4 of 11 jobs need a look" in page.text
    assert "torch: 2.12.0 → 2.13.0" in page.text
    assert comparison.approve in page.text
    assert "exit code 4: a job differs" in page.text
    order = [page.text.index(f"{verdict}-job") for verdict in VERDICTS]
    assert order == sorted(order)
    assert Counter(item["data-verdict"] for item in page.of("article")) == dict.fromkeys(list(VERDICTS)[:6], 1)
    assert Counter(item["data-verdict"] for item in page.of("li", class_="line")) == {"draft": 1, "identical": 4}
    chips = {item["data-filter"]: item for item in page.of("button", class_="chip")}
    assert set(chips) == {"", *VERDICTS}


def test_changed_job_shows_reasons_numbers_curves_and_history(tmp_path):
    page = write(make_comparison([make_finding("broken")]), tmp_path)
    for text in (
        "The worst frame, 33, has a PSNR of 24.6 dB; the limit is 30 dB.",
        "options.seed: 41 → 42",
        "24.6 dB",
        "0.8612",
        "31 of 60",
        "1.94 ΔE more than in the baseline",
        "+1.00 pixels right",
        "1 frame at frame 12",
        "not measurable: no face of 32 pixels",
        "8.10 GB",
        "1.38×",
        "Approved by mira on 2026-11-27: new choreography.",
        "12.3 s (1.04×)",
        "1.020 1.019 1.021",
    ):
        assert text in page.text, text
    assert len(page.of("path", class_="joint")) == 2  # one of each curve
    assert len(page.of("path", class_="limit")) == 1
    (psnr, _) = page.of("path", class_="worst")
    line = page.of("path", class_="trace")[0]["d"]
    assert str(psnr["d"]).removesuffix("h0").removeprefix("M") in str(line)  # the mark is on the curve


def test_html_report_without_changes_says_no_job_needs_look(tmp_path):
    page = write(make_comparison([make_finding("identical")], approve="", environment=[], exit_code=0), tmp_path)
    assert "No job of 1 needs a look" in page.text
    assert "Accept new and changed" not in page.text
    assert page.of("article") == []


def test_html_report_without_limits_says_none_are_known(tmp_path):
    jobs = [make_finding("uncalibrated", "a"), make_finding("identical", "b")]
    page = write(make_comparison(jobs, exit_code=0), tmp_path)
    assert "1 of 2 jobs differs; no limits are known for it" in page.text


def test_html_report_has_no_external_resources(tmp_path):
    finding = make_finding("broken")
    page = write(make_comparison([finding]), tmp_path, [indexed_evidence(tmp_path, finding)])
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "poster", "data-url"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), f"<{tag} {name}={address[:60]}>"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
    for _, text in page.blocks:
        assert "url(" not in text
        assert "@import" not in text


def test_html_report_policy_allows_only_own_script_and_style(tmp_path):
    finding = make_finding("broken")
    page = write(make_comparison([finding]), tmp_path, [indexed_evidence(tmp_path, finding)])
    rules = policy(page)
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert rules["media-src"] == ["data:", "blob:"]
    assert rules["img-src"] == ["data:"]
    for kind, own in (
        ("script-src", [text for attributes, text in page.blocks if attributes == {}][1:]),
        ("style-src", [text for attributes, text in page.blocks if attributes == {}][:1]),
    ):
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
        assert rules[kind] == [f"'sha256-{found}'" for found in hashes]
    data = {"application/json", "text/plain"}
    assert {attributes["type"] for attributes, _ in page.blocks if attributes} == data  # nothing that runs


def test_hostile_text_in_html_report_stays_text(tmp_path):
    jobs = [make_finding(verdict) for verdict in VERDICTS]
    plain = write(make_comparison(jobs), tmp_path)
    fields = dict.fromkeys(("text", "error", "approved", "device", "recipe", "run_id", "baseline_run_id"), HOSTILE)
    lists = {"notes": [HOSTILE], "differences": [HOSTILE] * 2}
    hostile = [job.model_copy(update=fields | lists | {"id": f"{job.id} {HOSTILE}"}) for job in jobs]
    comparison = make_comparison(hostile, out=HOSTILE, baseline=HOSTILE, approve=HOSTILE, environment=[HOSTILE] * 2)
    page = write(comparison, tmp_path)
    added = Counter(tag for tag, _ in page.elements) - Counter(tag for tag, _ in plain.elements)
    assert set(added) <= {"pre", "span", "li", "ul", "section", "h3", "div", "bdi"}  # the page's own, for more texts
    scripts = [text for attributes, text in page.blocks if attributes.get("type") != "application/json"]
    assert scripts == [text for attributes, text in plain.blocks if attributes.get("type") != "application/json"]
    assert """<img src=x onerror=alert(1)> ' " ` | &""" in page.text


def test_hostile_reason_of_missing_picture_stays_text(tmp_path):
    finding = make_finding("broken")
    evidence = JobEvidence(finding, left_out={HOSTILE: HOSTILE})
    page = write(make_comparison([finding]), tmp_path, [evidence])
    assert [item for item in page.of("img") if item.get("src") == "x"] == []
    assert f"No {HOSTILE[:20]}" in page.text


def test_small_videos_are_embedded_in_html_report(tmp_path):
    finding = make_finding("broken")
    evidence = indexed_evidence(tmp_path, finding)
    page = write(make_comparison([finding]), tmp_path, [evidence])
    blocks = {attributes["id"]: text for attributes, text in page.blocks if "id" in attributes}
    players = {item["data-media"] for item in page.of("video")}
    assert players == blocks.keys() == {"media-1-baseline", "media-1-new"}
    for name, link in evidence.videos.items():
        assert base64.b64decode(blocks[f"media-1-{name}"], validate=True) == link.file.read_bytes()
    (data,) = [json.loads(text) for attributes, text in page.blocks if attributes.get("class") == "data"]
    assert data["videos"] == {name: {"fps": 25.0, "frames": 60} for name in ("baseline", "new")}
    assert data["start"] == 33
    assert data["psnr"][33] == 24.6


@pytest.mark.parametrize("size", [1, 2, 3, 3 * 2**18 - 1, 3 * 2**18 + 1, 2_000_001])
def test_embedded_video_of_any_size_is_one_valid_base64_text(tmp_path, size):
    data = bytes(index * 7 % 251 for index in range(size))
    (tmp_path / "clip.mp4").write_bytes(data)
    finding = make_finding("new")
    link = VideoLink(Fraction(25), 9, (48, 64), file=tmp_path / "clip.mp4")
    page = write(make_comparison([finding]), tmp_path, [JobEvidence(finding, videos={"new": link})])
    (text,) = [text for attributes, text in page.blocks if attributes.get("id") == "media-1-new"]
    assert base64.b64decode(text, validate=True) == data


def test_html_report_puts_script_before_embedded_videos(tmp_path):
    findings = [make_finding("broken", f"job-{number}") for number in range(2)]
    page = write(make_comparison(findings), tmp_path, [indexed_evidence(tmp_path, finding) for finding in findings])
    kinds = [attributes.get("type", "script") for attributes, text in page.blocks][1:]  # the first is the style
    assert kinds == ["application/json"] * 2 + ["script"] + ["text/plain"] * 4


def test_large_videos_are_linked_and_policy_allows_only_their_origins(tmp_path):
    finding = make_finding("broken")
    made = indexed_evidence(tmp_path, finding)
    urls = {"baseline": "https://user:pw@renders.example:8443/b.mp4?sig=a;b", "new": "jobs/x/output.mp4"}
    videos = {
        name: VideoLink(link.fps, link.frames, link.size, link.file, urls[name]) for name, link in made.videos.items()
    }
    evidence = JobEvidence(finding, videos=videos)
    page = write(make_comparison([finding]), tmp_path, [evidence], embed_bytes=100)
    assert [item["data-url"] for item in page.of("video")] == [urls["baseline"], urls["new"]]
    assert [item["href"] for item in page.of("a") if item.get("target")] == [urls["baseline"], urls["new"]]
    assert policy(page)["media-src"] == ["data:", "blob:", "'self'", "https://renders.example:8443"]
    assert not [attributes for attributes, _ in page.blocks if "id" in attributes]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "javascript:alert(1)",
        "s3://bucket/key.mp4",
        "//elsewhere.example/x.mp4",
        "https://a.example; script-src *//x.mp4",
        "https://a.example'/x.mp4",
        "data:text/html,x",
        "java\nscript:alert(1)",
        "https://[broken/x.mp4",
    ],
)
def test_video_with_unusable_url_is_not_linked(tmp_path, url):
    finding = make_finding("new")
    evidence = JobEvidence(finding, videos={"new": VideoLink(Fraction(25), 9, (48, 64), url=url)})
    page = write(make_comparison([finding]), tmp_path, [evidence])
    assert page.of("video") == []
    assert "No new video: it cannot be read" in page.text
    assert policy(page)["media-src"] == ["data:", "blob:"]


def test_large_video_without_url_is_reported_as_left_out(tmp_path):
    finding = make_finding("broken")
    page = write(make_comparison([finding]), tmp_path, [indexed_evidence(tmp_path, finding)], embed_bytes=10)
    assert page.of("video") == []
    assert "No baseline video: it is too large to embed" in page.text


def test_html_report_at_page_limit_embeds_no_more_videos(tmp_path, monkeypatch):
    findings = [make_finding("broken", f"job-{number}") for number in range(3)]
    evidence = [indexed_evidence(tmp_path, finding, frames=4) for finding in findings]
    sizes = sum(link.file.stat().st_size for made in evidence[:2] for link in made.videos.values())
    monkeypatch.setattr(html_report, "TOTAL_EMBED_BYTES", sizes)
    page = write(make_comparison(findings), tmp_path, evidence)
    assert [item["data-media"] for item in page.of("video")] == [
        f"media-{number}-{name}" for number in (1, 2) for name in ("baseline", "new")
    ]
    assert "No new video: it is too large to embed" in page.text


def test_write_html_of_many_jobs_keeps_memory_small(tmp_path):
    """A report of 80 jobs of 1 MB each needs a fraction of their bytes in memory."""
    findings = [make_finding("changed", f"job-{number:03d}") for number in range(80)]
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(bytes(2**20))
    made = []

    def evidence() -> Iterator[JobEvidence]:
        for finding in findings:
            made.append(finding.id)
            yield JobEvidence(finding, videos={"new": VideoLink(Fraction(25), 9, (48, 64), file=clip)})

    write(make_comparison(findings[:2]), tmp_path, (item for item in list(evidence())[:2]))  # templates are compiled
    made.clear()
    tracemalloc.start()
    try:
        write_html(make_comparison(findings), evidence(), tmp_path / "report.html", embed_bytes=2**21)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(made) == 80
    assert (tmp_path / "report.html").stat().st_size > 80 * 2**20
    assert peak < 20 * 2**20


def test_write_html_with_evidence_out_of_order_raises_and_leaves_no_file(tmp_path):
    first, second = make_finding("broken", "a"), make_finding("broken", "b")
    evidence = [JobEvidence(second), JobEvidence(first)]
    with pytest.raises(ValueError, match="'a' is not in the order"):
        write_html(make_comparison([first, second]), evidence, tmp_path / "report.html", embed_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_write_html_with_denied_write_keeps_old_file(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr("shutil.copyfileobj", refuse)
    with pytest.raises(StorageDenied):
        write_html(make_comparison([make_finding("new")]), [], tmp_path / "report.html", embed_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def long_values(frames: int, worst: int) -> FrameValues:
    values = [40.0 + (index % 7) for index in range(frames)]
    values[worst] = 12.5
    return FrameValues(mean=42.9, p5=40.0, worst=12.5, worst_frame=worst, values=values)


@pytest.mark.parametrize(("frames", "worst"), [(2, 1), (499, 0), (5_000, 4_999), (10_007, 5_000)])
def test_curve_of_many_frames_keeps_worst_frame(tmp_path, frames, worst):
    measured = Measurements(
        frames_baseline=frames, frames_new=frames, frames_compared=frames, psnr=long_values(frames, worst)
    )
    page = write(make_comparison([make_finding("changed", measurements=measured, joints=[])]), tmp_path)
    (line,), (mark,) = page.of("path", class_="trace"), page.of("path", class_="worst")
    points = [tuple(map(float, point.split())) for point in str(line["d"])[1:].split(" L")]
    assert len(points) <= 500
    lowest = max(points, key=lambda point: point[1])
    assert lowest == tuple(map(float, str(mark["d"]).removesuffix("h0")[1:].split()))
    assert lowest[0] == pytest.approx(1000 * worst / (frames - 1), abs=0.06)
    assert all(0 <= x <= 1000 and 0 <= y <= 100 for x, y in points)


def test_curve_with_equal_frames_is_cut_at_60_db(tmp_path):
    """PSNR of equal frames is 100 dB; the curve ends at 60 and says so."""
    values = [100.0] * 50 + [34.0] * 10
    metric = FrameValues(mean=89.0, p5=34.0, worst=34.0, worst_frame=50, values=values)
    measured = Measurements(frames_baseline=60, frames_new=60, frames_compared=60, psnr=metric)
    page = write(make_comparison([make_finding("changed", measurements=measured)]), tmp_path)
    assert "60+" in page.text
    (line,) = page.of("path", class_="trace")
    assert str(line["d"]).startswith("M0 0 ")


def test_nan_in_measurements_becomes_null_in_html_report(tmp_path):
    metric = FrameValues.model_construct(mean=1.0, p5=1.0, worst=1.0, worst_frame=0, values=[1.0, float("inf"), 2.0])
    measured = Measurements(frames_baseline=3, frames_new=3, frames_compared=3).model_copy(update={"psnr": metric})
    finding = make_finding("changed").model_copy(update={"measurements": measured})
    page = write(make_comparison([finding]), tmp_path)
    (data,) = [text for attributes, text in page.blocks if attributes.get("class") == "data"]
    assert json.loads(data, parse_constant=pytest.fail)["psnr"] == [1.0, None, 2.0]


def test_template_classes_are_all_in_style_sheet_or_script():
    folder = Path(html_report.__file__).parent / "templates"
    named = set()
    for template in folder.glob("*.html"):
        text = re.sub(r"{[{%].*?[%}]}", " ", template.read_text(encoding="utf-8"))
        named |= {word for found in re.findall(r'class="([^"]*)"', text) for word in found.split()}
    known = "".join((folder / name).read_text(encoding="utf-8") for name in ("page.css", "report.css", "report.js"))
    whole = {name for name in named if not name.endswith("-") and name != "n"}  # of v-, p- and n the end is known later
    assert {name for name in whole if not re.search(rf"\.{name}\b", known)} == set()


@pytest.mark.parametrize(
    ("folder", "some"),
    [
        ("runner/regression/templates", {"page.css", "page_top.html", "report.css", "report.js", "report_head.html"}),
        ("runner/verbs/report_templates", {"run_report.html", "run_report.css", "jobs.js"}),
    ],
)
def test_package_contains_template_files(tmp_path, folder, some):
    """The files that setuptools copies into the package when it builds a wheel."""
    names = {path.name for path in (ROOT / folder).iterdir()}
    assert some <= names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    script = (
        "import json, sys; from setuptools import Distribution; from setuptools.command.build_py import build_py\n"
        "command = build_py(Distribution({'script_name': 'setup.py',"
        " 'packages': ['runner', 'runner.regression', 'runner.verbs'],"
        " 'package_data': json.loads(sys.argv[1])}))\n"
        "command.build_lib = sys.argv[2]; command.ensure_finalized(); command.run()"
    )
    data = json.dumps(project["tool"]["setuptools"]["package-data"])
    done = subprocess.run(
        [sys.executable, "-c", script, data, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / folder).iterdir()} == names
