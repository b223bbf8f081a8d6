"""The page of a run as a file: what it holds, that it is one file, and that foreign text stays text."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ConfigInvalid, StorageDenied, StorageUnavailable
from runner.records.run_report import GpuSeconds, RunReport
from runner.verbs import report_page
from runner.verbs.report_page import STATES, write_page
from tests.parsed_html import ParsedPage, policy
from tests.regression.report_samples import HOSTILE
from tests.verbs.run_report_samples import jpeg_preview, make_error, make_job, make_process, make_report, make_run

HOSTILE_IDS = (HOSTILE, "</script><img src=x onerror=alert(1)>", "{{ 7*7 }}", "job-with-\u202e-direction")


@cache
def preview() -> bytes:
    return jpeg_preview("a", (720, 1280))


def write(report: RunReport, folder: Path, posters=lambda _: None, link=lambda _: None) -> ParsedPage:
    write_page(report, folder / "report.html", posters=posters, link=link)
    return ParsedPage((folder / "report.html").read_text(encoding="utf-8"))


def data_of(page: ParsedPage) -> dict[str, Any]:
    (found,) = [text for attributes, text in page.blocks if attributes.get("id") == "data"]
    return json.loads(found, parse_constant=pytest.fail)


def pictures_of(page: ParsedPage) -> dict[str, list[str | None]]:
    return {
        str(attributes["id"]): json.loads(text)
        for attributes, text in page.blocks
        if str(attributes.get("id", "")).startswith("pictures-")
    }


def word(data: dict[str, Any], place: int) -> str:
    return data["words"][place]


def section(page: ParsedPage, begin: str, end: str) -> str:
    return page.text[page.text.index(begin) : page.text.index(end)]


# -- head --------------------------------------------------------------------------------------------------------------


def test_report_page_head_shows_run_end_and_cost(tmp_path):
    page = write(make_run(24, pending=5), tmp_path)
    for text in (
        "20 of 29 jobs done · 4 failed · 5 pending",
        "2026-11-29T22-00-00-7f3a",
        "s3://renders/manifests/night.yaml",
        "standard+fp8",
        "3 on NVIDIA H200",
        "2026-11-29 22:00:00 UTC, 13 min 41 s so far: a process still runs or was killed",
        "91.4 s; 15.9 GPU seconds per second of film",
        "1.01 at 2.49 per GPU hour; 0.0110 per second of film",
    ):
        assert text in page.text, text
    chips = page.of("button", class_="chip")
    assert Counter(item["data-filter"] for item in chips) == dict.fromkeys(
        ("", "succeeded", "failed", "pending", "skipped"), 2
    )  # at the top and above the jobs


def test_report_page_without_price_shows_no_cost(tmp_path):
    page = write(make_run(6, gpu_hour=None), tmp_path)
    assert "Cost" not in page.text
    assert not any("cost" in job for job in data_of(page)["jobs"])


def test_report_page_of_ended_run_shows_start_and_end(tmp_path):
    page = write(make_run(4, killed=False), tmp_path)
    assert "2026-11-29 22:00:00 UTC to 2026-11-30 05:58:12 UTC," in page.text
    assert "still runs" not in page.text


def test_report_page_has_coloured_chip_for_every_status(tmp_path):
    page = write(make_report([make_job(f"job-{state}", state) for state in STATES], []), tmp_path)
    chips = [item["data-filter"] for item in page.of("button", class_="chip")]
    assert chips == ["", *STATES] * 2
    style = next(text for attributes, text in page.blocks if attributes == {})
    assert [state for state in STATES if f".s-{state}{{" not in style] == []


def test_gpu_seconds_bar_parts_match_numbers(tmp_path):
    spent = GpuSeconds(total=200, work=150, loading=30, idle=20)
    page = write(make_report([make_job("a")], [], gpu_seconds=spent), tmp_path)
    bars = {str(item["class"]): item for item in page.of("rect") if str(item["class"]).startswith("u-")}
    assert [(float(item["x"]), float(item["width"])) for item in bars.values()] == [(0, 75), (75, 15), (90, 10)]
    assert list(bars) == ["u-work", "u-loading", "u-idle"]
    for text in ("work 2 min 30 s 75.0 %", "loading 30.0 s 15.0 %", "idle 20.0 s 10.0 %"):
        assert text in page.text, text


def test_unknown_gpu_seconds_are_not_shown_as_zero(tmp_path):
    nothing = GpuSeconds(total=0, work=0, loading=0, idle=0)
    page = write(make_report([make_job("a")], [], gpu_seconds=nothing), tmp_path)
    assert "GPU seconds not known: no process has left a summary" in page.text
    assert "GPU seconds per second" not in page.text
    assert "Film 4.8 s" in page.text


def test_report_page_of_empty_run_is_written(tmp_path):
    nothing = GpuSeconds(total=0, work=0, loading=0, idle=0)
    page = write(make_report([], [], gpu_seconds=nothing, caches={}, gpu_hour=2.0), tmp_path)
    assert "0 of 0 jobs done" in page.text
    assert "No process of this run has left a summary yet." in page.text
    assert page.of("rect") == []


# -- timeline ----------------------------------------------------------------------------------------------------------


def test_process_has_three_lanes_and_spans_with_jobs(tmp_path):
    report = make_run(12)
    page, data = write(report, tmp_path), None
    assert len(page.of("section", class_="process")) == len(report.processes) == 3
    assert [item["data-lane"] for item in page.of("div", class_="lane")] == ["prepare", "generate", "deliver"] * 3
    data = data_of(page)
    for process, drawn in zip(report.processes, data["processes"], strict=True):
        assert drawn["host"] == process.host
        assert len(drawn["spans"]) == len(process.spans)
        for span, (stage, job, begin, end) in zip(process.spans, drawn["spans"], strict=True):
            assert data["stages"][stage] == span.stage
            assert (data["jobs"][job]["id"] if job >= 0 else None) == span.job_id
            assert (begin, end) == pytest.approx((span.begin_s, span.end_s), abs=0.001)


def test_killed_process_is_marked_in_report_page(tmp_path):
    page = write(make_run(12), tmp_path)
    assert len(page.of("span", class_="killed")) == 1
    assert "nova-02 shard 2-of-2 NVIDIA H200 pid 4004 did not end: it still runs or was killed; last heard of at" in (
        page.text
    )
    assert [process["finished"] for process in data_of(page)["processes"]] == [True, False, True]


def test_stopped_process_shows_signal(tmp_path):
    process = make_process(["a"]).model_copy(update={"stopped_by": "SIGTERM", "exit_code": 130})
    assert "stopped: SIGTERM" in write(make_report([make_job("a")], [process]), tmp_path).text


def test_process_without_summary_has_no_pid(tmp_path):
    """The process is known only by the records of its jobs; its host's clock may be behind the first host's."""
    process = make_process(["a"], begin_s=-20.0, finished=False)
    page = write(
        make_report([make_job("a")], [type(process).model_construct(**dict(process) | {"pid": None})]), tmp_path
    )
    assert "pid" not in page.text
    spans = data_of(page)["processes"][0]["spans"]
    assert min(span[2] for span in spans) == 0
    assert all(span[2] <= span[3] for span in spans)


def test_span_of_unlisted_job_keeps_job_name(tmp_path):
    data = data_of(write(make_report([make_job("a")], [make_process(["gone"])]), tmp_path))
    spans = [span for span in data["processes"][0]["spans"] if data["stages"][span[0]] != "load"]
    assert {span[1] for span in spans} == {-1}
    assert {word(data, span[4]) for span in spans} == {"gone"}


# -- failures and warnings ---------------------------------------------------------------------------------------------


def test_failures_with_same_cause_are_one_group(tmp_path):
    todo = "Check the path in the manifest"
    missing = [
        make_job(
            f"clip-{i}", "failed", error=make_error("input.not_found", f"s3://in/clip-{i}.mp4: does not exist", todo)
        )
        for i in range(25)
    ]
    memory = make_job(
        "large", "failed", error=make_error("resource.out_of_memory", "out of memory", "Use fp8", "generate")
    )
    page = write(make_report([memory, *missing, make_job("fine")], []), tmp_path)
    assert len(page.of("article", class_="group")) == 2
    text = section(page, "Failures", "Forecast and measured")
    assert text.startswith("Failures input.not_found 25 jobs in prepare s3://in/‹job›.mp4: does not exist clip-0")
    assert text.count("does not exist") == 1
    assert text.count(todo) == 1
    assert "5 more clip-20" in text
    assert "resource.out_of_memory 1 job in generate out of memory large What to do: Use fp8" in text
    links = [item["data-job"] for item in page.of("a") if "data-job" in item]
    assert links[:25] == [str(number) for number in range(1, 26)]


def test_short_job_id_is_not_replaced_in_messages(tmp_path):
    jobs = [
        make_job(name, "failed", error=make_error("internal", f"{name} fell", "Report it"))
        for name in ("a", "b", "lone")
    ]
    text = section(write(make_report(jobs, []), tmp_path), "Failures", "Forecast and measured")
    assert "a fell a b fell b lone fell lone What to do: Report it" in text
    assert "‹job›" not in text


def test_lost_jobs_are_listed_under_failures(tmp_path):
    page = write(make_report([make_job("x", "lost"), make_job("y", "lost")], []), tmp_path)
    text = section(page, "Failures", "Forecast and measured")
    assert text.startswith("Failures lost 2 jobs begun by nova-02 x y")


def test_succeeded_job_with_later_error_is_not_failure(tmp_path):
    """The job was done before and a later attempt with other settings failed; its record has both."""
    job = make_job("x", "succeeded", error=make_error("internal", "boom", "Report it"))
    assert "Failures" not in write(make_report([job], []), tmp_path).text


def test_warnings_are_grouped_by_text(tmp_path):
    jobs = [make_job(f"job-{i}", warnings=["same note", f"job-{i}: its own"]) for i in range(3)]
    text = section(write(make_report(jobs, []), tmp_path), "Warnings", "Forecast and measured")
    assert text.strip() == "Warnings same note job-0 job-1 job-2 ‹job›: its own job-0 job-1 job-2"


# -- forecast, caches, stages ------------------------------------------------------------------------------------------


def test_forecast_section_lists_farthest_ratio_first(tmp_path):
    jobs = [
        make_job("as-said", gpu_s=100, forecast_s=100),
        make_job("slower", gpu_s=150, forecast_s=100),
        make_job("much-faster", gpu_s=40, forecast_s=100),
        make_job("unknown", gpu_s=40, forecast_s=None),
        make_job("unmeasured", "failed", gpu_s=0, forecast_s=100),
    ]
    page = write(make_report(jobs, []), tmp_path)
    text = section(page, "GPU seconds 3 jobs", "Device memory")
    assert "3 jobs: median 1.00× of the forecast, from 0.40× to 1.50×." in text
    assert [text.index(name) for name in ("much-faster", "slower", "as-said")] == sorted(
        text.index(name) for name in ("as-said", "slower", "much-faster")
    )
    assert "unknown" not in text
    bars = [(item["class"], float(item["x"]), float(item["width"])) for item in page.of("rect", height="8")][:3]
    assert bars == [("under", 0, 50), ("over", 50, 29.2), ("under", 50, 0)]  # half and less; log2 of 1.5; equal


def test_report_page_without_forecast_says_none_exists(tmp_path):
    page = write(make_run(4, forecast=False, killed=False), tmp_path)
    assert "There is no forecast: no job was rendered on a device whose speed is known." in page.text


def test_caches_section_shows_hits_of_lookups(tmp_path):
    page = write(make_run(24), tmp_path)
    for text in ("text 16 of 24 66.7 %", "conditions 6 of 24 25.0 %", "lora 0 of 0 –"):
        assert text in page.text, text
    widths = [float(item["width"]) for item in page.of("rect", class_="full")]
    assert widths[:3] == [66.67, 25.0, 0]
    assert widths[3] == 100  # the longest stage
    assert widths[3:] == sorted(widths[3:], reverse=True)


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_job_data_has_all_known_values(tmp_path):
    job = make_job("mira", cost=0.0425, warnings=["a note"])
    page = write(make_report([job], [], gpu_hour=2.5), tmp_path, link=lambda job_id: f"../../jobs/{job_id}/output.mp4")
    data = data_of(page)
    (found,) = data["jobs"]
    assert found | {"stages": None} == {
        "id": "mira",
        "status": found["status"],
        "reason": found["reason"],
        "attempt": 1,
        "host": found["host"],
        "shard": found["shard"],
        "wall": 96.4,
        "gpu": 61.25,
        "forecast": 58.0,
        "memory": 71 * 2**30,
        "memory_forecast": 70 * 2**30,
        "host_memory": 23 * 2**30,
        "stages": None,
        "frames": 77,
        "fps": "16",
        "film": 4.81,
        "size": [720, 1280],
        "output": "s3://renders/night/jobs/mira/output.mp4",
        "link": "../../jobs/mira/output.mp4",
        "without": found["without"],
        "cost": 0.0425,
        "warnings": ["a note"],
    }
    assert [word(data, found[key]) for key in ("status", "host", "shard")] == ["succeeded", "nova-01", "1-of-2"]
    assert {word(data, name): seconds for name, seconds in found["stages"]} == job.stages_s
    assert word(data, found["without"]) == "its file is missing"


@pytest.mark.parametrize("address", ["javascript:alert(1)", "//elsewhere.example/x", "s3://b/k", "data:text/html,x"])
def test_unsafe_output_address_is_not_link(tmp_path, address):
    data = data_of(write(make_report([make_job("a")], []), tmp_path, link=lambda _: address))
    assert "link" not in data["jobs"][0]
    assert data["jobs"][0]["output"].endswith("output.mp4")


def test_job_without_output_is_not_asked_for_link(tmp_path):
    asked = []
    report = make_report([make_job("a"), make_job("b", "pending")], [])
    write(report, tmp_path, link=asked.append)
    assert asked == ["a"]


# -- previews ----------------------------------------------------------------------------------------------------------


def test_previews_are_small_jpegs_in_blocks(tmp_path):
    from PIL import Image

    jobs = [make_job(f"job-{number}") for number in range(103)]
    jobs[5] = make_job("failed", "failed", error=make_error("internal", "x", "y"))
    page = write(make_report(jobs, []), tmp_path, posters=lambda _: preview())
    blocks = pictures_of(page)
    assert {name: len(rows) for name, rows in blocks.items()} == {"pictures-0": 100, "pictures-1": 3}
    assert blocks["pictures-0"][5] is None
    with Image.open(io.BytesIO(base64.b64decode(str(blocks["pictures-1"][2]), validate=True))) as image:
        assert (image.format, image.size) == ("JPEG", (67, 120))
    kinds = [attributes.get("id") for attributes, _ in page.blocks]
    assert kinds[-3:] == [None, "pictures-0", "pictures-1"]  # after the script: the page is used before they are there


def test_wide_preview_is_scaled_to_fit(tmp_path):
    from PIL import Image

    wide = jpeg_preview("w", (2000, 300))
    (rows,) = pictures_of(write(make_report([make_job("a")], []), tmp_path, posters=lambda _: wide)).values()
    with Image.open(io.BytesIO(base64.b64decode(str(rows[0])))) as image:
        assert image.size == (240, 36)


def test_previews_above_limit_are_left_out_with_reason(tmp_path, monkeypatch):
    small, _ = report_page._shrink(preview())
    assert small is not None
    monkeypatch.setattr(report_page, "PICTURE_BYTES", 3 * len(small) + 10)
    asked: list[str] = []
    lock = threading.Lock()

    def posters(key: str) -> bytes:
        with lock:
            asked.append(key)
        return preview()

    page = write(make_report([make_job(f"job-{number}") for number in range(205)], []), tmp_path, posters=posters)
    data = data_of(page)
    assert ["picture" in job for job in data["jobs"]] == [True] * 3 + [False] * 202
    assert "the page holds" in word(data, data["jobs"][3]["without"])
    assert data["jobs"][204]["without"] == data["jobs"][3]["without"]
    assert sorted(pictures_of(page)) == ["pictures-0"]
    assert len(asked) == 100  # those of the block that filled the page; none after it


def test_unreadable_preview_shows_reason(tmp_path):
    def posters(key: str) -> bytes | None:
        if "gone" in key:
            return None
        if "refused" in key:
            raise StorageUnavailable("did not answer", where=key)
        return b"\xff\xd8 no picture" if "broken" in key else preview()[:3000]

    jobs = [make_job(name) for name in ("gone", "refused", "broken", "cut-off")]
    data = data_of(write(make_report(jobs, []), tmp_path, posters=posters))
    assert [word(data, job["without"]) for job in data["jobs"]] == [
        "its file is missing",
        "jobs/refused/poster.jpg: did not answer",
        "its file is not a readable JPEG",
        "its file is not a readable JPEG",
    ]


# -- one file, foreign text --------------------------------------------------------------------------------------------


def hostile_report() -> RunReport:
    error = make_error(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    more: dict[str, Any] = {"reason": HOSTILE, "host": HOSTILE, "shard": HOSTILE, "warnings": [HOSTILE, HOSTILE[::-1]]}
    jobs = [make_job(name, "failed", error=error, stages_s={HOSTILE: 1.0}, **more) for name in HOSTILE_IDS]
    jobs.append(make_job("fine", fps=HOSTILE, output=HOSTILE, poster=HOSTILE, stages_s={HOSTILE: 2.0}))
    process = make_process(list(HOSTILE_IDS), host=HOSTILE, shard=HOSTILE, device=HOSTILE)
    process = process.model_copy(update={"stopped_by": HOSTILE})
    head = dict.fromkeys(("run_id", "out", "manifest", "recipe", "started_at", "made_at"), HOSTILE)
    caches = {HOSTILE: next(iter(make_run(3).caches.values()))}
    return make_report(jobs, [process], gpu_hour=2.0, caches=caches, notes=[HOSTILE], **head)


def test_hostile_text_in_report_page_stays_text(tmp_path):
    def refuse(_: str) -> bytes:
        raise StorageUnavailable(HOSTILE)

    page = write(hostile_report(), tmp_path, posters=refuse, link=lambda _: HOSTILE)
    plain = write(make_run(24), tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"details", "summary"}
    assert page.of("img") == []
    runs = [text for attributes, text in page.blocks if attributes.get("type") != "application/json"]
    assert runs == [text for attributes, text in plain.blocks if attributes.get("type") != "application/json"]
    data = data_of(page)
    assert [job["id"] for job in data["jobs"]] == [*HOSTILE_IDS, "fine"]
    assert "link" not in data["jobs"][4]
    assert "{{ 7*7 }}" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    for name, value in ((name, value) for _, attributes in page.elements for name, value in attributes.items()):
        assert not name.startswith("on"), (name, value)


def test_output_path_with_non_utf8_bytes_is_escaped(tmp_path):
    report = make_report([make_job("a", output="/out/\udcff.mp4")], [], out="/out/\udcff")
    assert r"/out/\udcff" in write(report, tmp_path).text


def test_report_page_has_no_external_resources(tmp_path):
    page = write(make_run(24), tmp_path, posters=lambda _: preview())
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "poster"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), f"<{tag} {name}={address}>"
        assert "style" not in attributes
    for attributes, text in page.blocks:
        if attributes.get("type") != "application/json":
            assert "url(" not in text
            assert "@import" not in text
            assert "innerHTML" not in text


def test_report_page_policy_allows_only_own_script_and_style(tmp_path):
    import hashlib

    page = write(make_run(3), tmp_path)
    rules = policy(page)
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    assert "media-src" not in rules
    style, script = [text for attributes, text in page.blocks if attributes == {}]
    for kind, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[kind] == [f"'sha256-{digest}'"]


def test_nan_and_infinity_are_left_out_of_job_data(tmp_path):
    job = make_job("a", wall_s=float("nan"), gpu_s=float("inf"), stages_s={"denoise": float("inf")})
    page = write(make_report([job], [], stages_s={"denoise": float("inf")}), tmp_path)
    (found,) = data_of(page)["jobs"]
    assert "wall" not in found
    assert "gpu" not in found


def test_report_page_of_10000_jobs_without_previews_is_below_8_mb(tmp_path):
    write(make_run(10_000), tmp_path)
    size = (tmp_path / "report.html").stat().st_size
    assert size < 8_000_000


def test_write_page_with_denied_write_keeps_old_file(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr("shutil.copyfileobj", refuse)
    with pytest.raises(StorageDenied):
        write_page(make_run(2), tmp_path / "report.html", posters=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_write_page_without_jinja2_names_extra_and_fetches_no_preview(tmp_path, monkeypatch):
    report_page._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    asked: list[str] = []
    with pytest.raises(ConfigInvalid, match=r"pip install 'video-lab-runner\[compare\]'"):
        write_page(make_run(2), tmp_path / "report.html", posters=asked.append)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_report_page_classes_are_all_in_style_sheet_or_script(tmp_path):
    names = set()
    for made in (make_run(24, pending=2), hostile_report()):
        page = write(made, tmp_path)
        names |= {name for _, attributes in page.elements for name in (attributes.get("class") or "").split()}
    known = "".join(text for attributes, text in page.blocks if attributes == {})
    assert {name for name in names if f".{name}" not in known} == set()
