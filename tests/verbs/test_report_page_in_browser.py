"""The page of a run in a real headless Chromium: timeline, table, filters and keys, without network and complaints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from runner.records.run_report import RunReport
from runner.verbs.report_page import write_page
from tests.chromium import (
    NARROW,
    WIDE,
    Seen,
    contrast,
    focused_names,
    luminances,
    nameless_items,
    open_chromium,
    wait_until,
    why_not,
)
from tests.regression.report_samples import HOSTILE
from tests.verbs.run_report_samples import jpeg_preview, make_error, make_job, make_process, make_report, make_run

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(120)]

NIGHT = make_run(24, pending=5)
SHOWN = "[...document.querySelectorAll('.row')].map(row => row.cells[1].textContent)"  # ids, as they are drawn


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


def write(report: RunReport, folder: Path) -> Path:
    def link(job_id: str) -> str:
        return f"../../jobs/{job_id}/output.mp4"

    write_page(report, folder / "report.html", posters=jpeg_preview, link=link)
    return folder / "report.html"


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(NIGHT, tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="module")
def long_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 jobs, two processes that follow each other on one shard, none with a picture."""
    folder = tmp_path_factory.mktemp("long")
    write_page(make_run(10_000), folder / "report.html", posters=lambda _: None)
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a file; every test here also holds that the pages ask for nothing and complain of nothing."""
    pages = []

    def open_page(file: Path, viewport: dict[str, int] = WIDE) -> Any:
        seen = Seen()
        page = seen.watch(browser.new_page())
        pages.append((page, seen, file))
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme="light")
        page.goto(file.as_uri())
        wait_until(page, "!document.querySelector('.process') || document.querySelector('.span')")
        return page

    yield open_page
    for page, seen, file in pages:
        page.close()
        assert seen.messages == []
        assert seen.outside(file) == []


@pytest.fixture
def page(opened: Any, night: Path) -> Any:
    return opened(night)


def spans(page: Any, process: int, lane: str) -> list[dict[str, Any]]:
    """The spans of a lane that are drawn: pixels in the timeline, kind, job."""
    return page.evaluate(
        """([process, lane]) => [...document.querySelectorAll(
            `[data-process="${process}"] [data-lane=${lane}] .span`)].map(span => ({
                left: parseFloat(span.style.left), width: parseFloat(span.style.width), kind: span.className,
                job: Number(span.dataset.of ?? -1), merged: span.place.last - span.place.first + 1 }))""",
        [process, lane],
    )


# -- timeline ----------------------------------------------------------------------------------------------------------


def test_spans_are_placed_by_time_and_overlap(page):
    """Job k is generated while k+1 is prepared and k−1 delivered."""
    lanes = {lane: spans(page, 0, lane) for lane in ("prepare", "generate", "deliver")}
    process = NIGHT.processes[0]
    track = page.evaluate("document.querySelector('.track').clientWidth") - 12
    scale = track / max(other.end_s for other in NIGHT.processes)
    drawn = {(lane, span["job"]): span for lane, found in lanes.items() for span in found}
    numbers = {job.id: number for number, job in enumerate(NIGHT.jobs)}
    for span in process.spans:
        if span.stage != "load":
            found = drawn[span.stage, numbers[str(span.job_id)]]
            assert found["left"] == pytest.approx(span.begin_s * scale, abs=1)
            assert found["width"] == pytest.approx((span.end_s - span.begin_s) * scale, abs=2)
    assert [span["kind"] for span in lanes["generate"] if "load" in span["kind"]] == ["span load"]
    third = [span["job"] for span in lanes["generate"]][3]
    order = [span["job"] for span in lanes["generate"]]
    before, middle, after = (order[order.index(third) + step] for step in (-1, 0, 1))

    def times(lane: str, job: int) -> tuple[float, float]:
        found = drawn[lane, job]
        return found["left"], found["left"] + found["width"]

    for lane, job in (("deliver", before), ("prepare", after)):
        assert times(lane, job)[0] < times("generate", middle)[1]
        assert times(lane, job)[1] > times("generate", middle)[0]


def test_neighbouring_spans_differ_in_colour_and_job_keeps_colour(page):
    generated = [span for span in spans(page, 0, "generate") if "load" not in span["kind"]]
    colours = {span["job"]: span["kind"] for span in generated}
    kinds = [span["kind"] for span in generated]
    assert all(one != other for one, other in pairwise(kinds))
    for span in spans(page, 0, "deliver"):
        assert span["kind"] == colours[span["job"]]
    failed = [span["job"] for span in spans(page, 0, "prepare") if "failed" in span["kind"]]
    assert failed == [number for number, job in enumerate(NIGHT.jobs) if number % 2 == 0 and job.status == "failed"]


def test_killed_process_ends_with_mark(page):
    ends = page.evaluate("[...document.querySelectorAll('.process')].map(item => item.querySelector('.end').className)")
    assert ends == ["end", "end killed", "end"]
    killed = NIGHT.processes[1]
    left = page.evaluate("parseFloat(document.querySelector('.end.killed').style.left)")
    last = max(spans(page, 1, "generate"), key=lambda span: span["left"])
    assert left == pytest.approx(last["left"] + last["width"], abs=2)  # it died while it generated
    hours, rest = divmod(round(killed.end_s), 3600)
    assert page.locator(".badge.killed").inner_text().endswith(f"at {hours}:{rest // 60:02d}:{rest % 60:02d}")


@pytest.mark.parametrize("way", ["pointer", "keys"])
def test_span_tip_shows_job_stage_begin_end_and_seconds(page, way):
    job = next(span for span in spans(page, 0, "deliver"))["job"]
    if way == "pointer":
        page.locator(f".span[data-of='{job}']").nth(2).hover()
    else:
        page.locator(".tracks").focus()
        page.keyboard.press("ArrowRight")  # prepare
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")  # deliver
    tip = page.locator("#tip")
    assert tip.is_visible()
    span = next(
        span for span in NIGHT.processes[0].spans if span.stage == "deliver" and span.job_id == NIGHT.jobs[job].id
    )

    def clock(seconds: float) -> str:
        return f"0:{round(seconds) // 60:02d}:{round(seconds) % 60:02d}"

    begin = round(span.begin_s)
    assert tip.locator("b, span").all_inner_texts() == [
        NIGHT.jobs[job].id,
        "deliver",
        f"{clock(span.begin_s)} to {clock(span.end_s)} (22:{begin // 60:02d}:{begin % 60:02d} UTC)",
        "9.0 s",
        "nova-01, shard 1-of-2",
    ]
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= WIDE["width"]
    assert page.locator(".span.same").count() == 3  # the job's other spans are shown with it
    if way == "pointer":
        page.mouse.move(5, 5)
    else:
        page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_click_on_span_goes_to_job(page):
    page.locator("[data-process='2'] [data-lane=generate] .span").nth(2).click()
    number = page.evaluate("Number(document.activeElement.id.replace('job-', ''))")
    generated = [span.job_id for span in NIGHT.processes[2].spans if span.stage == "generate"]
    assert NIGHT.jobs[number].id == generated[1]  # the first span is loading
    box = page.locator(f"#job-{number}").bounding_box()
    assert 0 < box["y"] < WIDE["height"] - box["height"]


def test_click_on_span_finds_job_hidden_by_filter(page):
    page.locator("#jobs .chip.s-failed").click()
    page.locator("#find").fill("nothing like this")
    page.locator(".tracks").scroll_into_view_if_needed()
    page.locator("[data-process='0'] [data-lane=generate] .span").nth(2).click()
    assert page.evaluate("document.activeElement.id").startswith("job-")
    assert len(page.evaluate(SHOWN)) == 29


def test_enter_on_span_goes_to_job(page):
    page.locator(".tracks").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    job = page.evaluate("document.activeElement.dataset.of")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == f"job-{job}"


def test_arrow_keys_reach_every_span_of_lane(page):
    page.locator(".tracks").focus()
    page.keyboard.press("ArrowRight")
    walked = []
    for _ in range(40):
        walked.append(page.evaluate("document.activeElement.dataset.of"))
        page.keyboard.press("ArrowRight")
    wanted = [str(span["job"]) for span in spans(page, 0, "prepare")]
    assert list(dict.fromkeys(walked)) == wanted
    for _ in range(40):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.of") == wanted[0]
    for _ in range(20):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('.process').dataset.process") == "2"


def width(page: Any) -> float:
    return page.evaluate("document.querySelector('.inner').offsetWidth")


def test_timeline_zooms_by_slider_buttons_keys_and_wheel(page):
    fitted = width(page)
    assert page.evaluate("document.querySelector('.tracks').scrollWidth") <= fitted
    page.locator("#zoom").fill("50")
    assert width(page) > 4 * fitted
    page.get_by_role("button", name="Fit").click()
    assert width(page) == fitted
    page.get_by_role("button", name="Zoom in", exact=True).click()
    assert width(page) == pytest.approx(2 * fitted, rel=0.1)
    page.locator(".tracks").focus()
    page.keyboard.press("+")
    assert width(page) == pytest.approx(4 * fitted, rel=0.1)
    assert page.locator("#zoomed").inner_text() == "4.0×"
    page.keyboard.press("0")
    assert width(page) == fitted
    box = page.locator(".tracks").bounding_box()
    page.mouse.move(box["x"] + 700, box["y"] + 60)
    under = f"document.elementFromPoint({box['x'] + 700}, {box['y'] + 67}).dataset.of"
    before = page.evaluate(under)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    wait_until(page, f"document.querySelector('.inner').offsetWidth > {2 * fitted}")
    assert page.evaluate(under) == before is not None  # the time under the pointer stays
    top = page.evaluate("scrollY")
    page.mouse.wheel(0, 200)  # the wheel alone scrolls the page
    wait_until(page, f"scrollY > {top}")


def test_timeline_of_long_night_merges_spans_and_zoom_splits_them(opened, long_night):
    page = opened(long_night)
    for lane in ("prepare", "generate", "deliver"):
        found = spans(page, 0, lane)
        assert len(found) < 1500
        assert sum(span["merged"] for span in found) >= 4000
    merged = page.locator("[data-process='0'] [data-lane=deliver] .span.merged").first
    merged.hover()
    assert "merged: zoom in to see each one" in page.locator("#tip").inner_text()
    for _ in range(6):
        kinds = {span["kind"] for span in spans(page, 0, "deliver") if span["merged"] > 1}
        if not kinds:
            break
        visible = page.locator("[data-process='0'] [data-lane=deliver] .span.merged").first
        visible.evaluate("span => span.click()")
    assert {span["merged"] for span in spans(page, 0, "deliver")} == {1}
    assert len(spans(page, 0, "deliver")) > 3
    page.locator("#zoom").fill("100")
    assert page.evaluate("document.querySelectorAll('.span').length") < 3000
    page.evaluate("document.querySelector('.tracks').scrollLeft = 1e9")
    wait_until(page, "document.querySelector('.end.killed') && document.querySelector('.tick')")
    assert page.evaluate("document.querySelectorAll('.span').length") < 3000


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_chips_filter_jobs_and_both_sets_agree(page):
    assert len(page.evaluate(SHOWN)) == 29
    page.locator(".top .chip.s-failed").click()
    failed = [job.id for job in NIGHT.jobs if job.status == "failed"]
    assert page.evaluate(SHOWN) == failed
    assert page.locator("#jobs .chip.s-failed").get_attribute("aria-pressed") == "true"
    assert page.locator(".status").inner_text() == f"{len(failed)} jobs shown"
    assert page.locator("#jobs-title").bounding_box()["y"] < WIDE["height"] / 2  # it went to the jobs
    page.locator("#jobs .chip").first.click()
    assert len(page.evaluate(SHOWN)) == 29
    assert page.locator(".top .chip.s-failed").get_attribute("aria-pressed") == "false"


def test_find_field_matches_id_host_and_code(page):
    page.keyboard.press("/")
    page.keyboard.type("DANCE-01")
    assert page.evaluate(SHOWN) == [job.id for job in NIGHT.jobs if "dance-01" in job.id]
    page.locator("#find").fill("input.no_person")
    assert page.evaluate(SHOWN) == [job.id for job in NIGHT.jobs if job.error and job.error.code == "input.no_person"]
    page.locator("#find").fill("nova-02")
    assert page.evaluate(SHOWN) == [job.id for job in NIGHT.jobs if job.host == "nova-02"]
    page.locator("#find").fill("no such job")
    assert page.evaluate(SHOWN) == []
    assert page.locator(".none").is_visible()
    page.locator("#find").press("Escape")
    assert len(page.evaluate(SHOWN)) == 29


def test_columns_sort_both_ways_and_back_to_manifest_order(page):
    manifest = [job.id for job in NIGHT.jobs]
    measured = {job.id: job.gpu_s for job in NIGHT.jobs if job.gpu_s is not None}
    button = page.get_by_role("button", name="Sort by GPU seconds", exact=True)
    button.click()
    largest = page.evaluate(SHOWN)
    assert largest[: len(measured)] == sorted(measured, key=lambda name: -measured[name])
    assert largest[len(measured) :] == [job.id for job in NIGHT.jobs if job.gpu_s is None]  # without a value: last
    assert page.locator("th[data-key=gpu]").get_attribute("aria-sort") == "descending"
    button.click()
    assert page.evaluate(SHOWN)[: len(measured)] == sorted(measured, key=lambda name: measured[name])
    assert page.locator("#sort").input_value() == "gpu up"
    button.click()
    assert page.evaluate(SHOWN) == manifest
    page.locator("#sort").select_option("id up")
    assert page.evaluate(SHOWN) == sorted(manifest)
    page.locator("#sort").select_option("order up")
    page.get_by_role("button", name="Sort by warnings").click()
    assert page.locator(".row").first.locator(".warned").inner_text() == "!"


def test_forecast_link_sorts_jobs_by_farthest_ratio(page):
    page.locator("#forecast a[data-sort=ratio]").click()
    away = {
        job.id: max(job.gpu_s / job.forecast_s, job.forecast_s / job.gpu_s)
        for job in NIGHT.jobs
        if job.gpu_s and job.forecast_s
    }
    shown = page.evaluate(SHOWN)[: len(away)]
    assert [away[name] for name in shown] == pytest.approx(sorted(away.values(), reverse=True), rel=1e-3)


def test_row_shows_picture_numbers_link_or_place_holder(page):
    row = page.locator("#job-0")
    wait_until(page, "document.querySelector('#job-0 img').naturalHeight === 120")
    assert row.locator("img").get_attribute("alt") == f"Preview of {NIGHT.jobs[0].id}"
    assert row.locator("a").get_attribute("href") == f"../../jobs/{NIGHT.jobs[0].id}/output.mp4"
    job = NIGHT.jobs[0]
    numbers = row.locator(".number").all_inner_texts()
    assert numbers[:3] == [f"{job.wall_s:.1f} s", f"{job.gpu_s:.1f} s", f"{job.gpu_s / job.forecast_s:.2f}×"]
    assert numbers[3] == f"{job.device_bytes / 1e9:.2f} GB"
    assert numbers[5] == f"{job.cost:.4f}"
    assert page.locator("#job-3 .warned").get_attribute("title") == NIGHT.jobs[3].warnings[0]
    assert page.locator("#job-4 .place-holder").inner_text() == "input.not_found"
    assert page.locator("#job-28 .place-holder").inner_text() == "pending"


def test_job_details_fold_out_and_in(page):
    button = page.locator("#job-4 .more-button")
    button.click()
    details = page.locator("#job-4 + .more")
    assert NIGHT.jobs[4].error.todo in details.locator(".error").inner_text()
    assert button.get_attribute("aria-expanded") == "true"
    page.locator("#job-5 .more-button").click()
    assert page.locator("#job-5 + .more tbody tr").count() == 5  # a stage each
    assert "shard 2-of-2, attempt 1" in page.locator("#job-5 + .more").inner_text()
    page.locator("th[data-key=id] button").click()  # still open when sorted
    assert page.locator("#job-4 + .more").is_visible()
    button.click()
    assert not page.locator("#job-4 + .more").is_visible()


def test_failure_link_goes_to_job(page):
    link = page.locator("#failures a[data-job]").first
    name = link.inner_text()
    link.click()
    assert page.evaluate("document.activeElement.cells[1].textContent") == name


def test_table_of_10000_jobs_is_drawn_in_part_and_searched_in_full(opened, long_night):
    page = opened(long_night)
    assert page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart") < 8000
    assert 100 <= page.evaluate("document.querySelectorAll('.row').length") < 600
    page.locator("#find").fill("dance-8765")
    (found,) = page.evaluate(SHOWN)
    assert found.endswith("8765")
    page.locator("#find").fill("")
    for number in (2000, 4000, 6000, 8765):
        page.evaluate(f"jobs.show({number})")
        page.wait_for_timeout(150)
    row = page.locator("#job-8765")
    wait_until(page, "document.activeElement.id === 'job-8765'")
    wait_until(page, "!document.getElementById('job-4000')")  # rows far from the screen are removed
    box = row.bounding_box()
    assert 0 < box["y"] < WIDE["height"]
    assert page.evaluate("document.querySelectorAll('.row').length") < 1000
    page.locator("th[data-key=wall] button").click()
    first = page.locator(".row .number").first.inner_text()
    assert first.endswith(("s", "min"))
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    wait_until(page, "[...document.querySelectorAll('tbody')].at(-1).querySelector('.row')")
    assert page.locator("#notes").is_visible()


# -- looks -------------------------------------------------------------------------------------------------------------


def test_dark_and_light_mode_have_legible_contrast(page):
    page.locator("#job-5 .more-button").click()
    texts = ["h1", ".about dt", ".chip", ".badge.killed", ".shares .faint", ".legend", ".tick", ".lane-name"]
    texts += [".process-name span", ".cause", ".numbers thead th", ".numbers td", "#job-0 .badge", "#job-4 .badge"]
    texts += ["#job-3 .warned", "#job-4 .place-holder", "#job-28 .badge", ".sorter", ".more dt", "#job-17 .badge"]
    behind = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        _, behind[scheme] = luminances(page, "h1")
        assert {name: round(found, 2) for name in texts if (found := contrast(page, name)) < 4.5} == {}
    assert behind["light"] > 0.8
    assert behind["dark"] < 0.05


@pytest.mark.parametrize("viewport", [NARROW, WIDE, {"width": 700, "height": 900}, {"width": 1600, "height": 900}])
def test_page_with_long_texts_has_nothing_cut_off_at_side(opened, night, tmp_path, viewport):
    long_id = "a-very-long-id-" + "without-an-end-" * 8 + "0"
    error = make_error("internal", "x" * 300, "Report it: " + "y" * 200)
    jobs = [make_job(long_id, warnings=["z" * 300]), make_job(f"{long_id}1", "failed", error=error)]
    long = write(make_report(jobs, [make_process([long_id], host="h" * 120)], out="o" * 300), tmp_path)
    for file in (night, long):
        page = opened(file, viewport)
        page.locator("#zoom").fill("60")
        for button in page.locator(".more-button").all()[:2]:
            button.click()
        page.locator(".tracks").scroll_into_view_if_needed()
        page.locator(".span").first.hover()
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        outside = page.evaluate(
            """[...document.querySelectorAll("main *, header *")].filter(item => {
                const box = item.getBoundingClientRect();
                return box.width && box.right > innerWidth + 1 && !item.closest(".tracks");
            }).map(item => item.outerHTML.slice(0, 80))"""
        )
        assert outside == []


def test_narrow_rows_show_numbers_with_column_names(opened, night):
    page = opened(night, NARROW)
    page.locator("#jobs-title").scroll_into_view_if_needed()
    wait_until(page, "document.getElementById('job-0')")
    cell = page.locator("#job-0 .number").first
    assert cell.is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('#job-0 .number'), '::before').content") != "none"
    assert not page.locator("thead th[data-key=gpu]").is_visible()
    page.locator("#sort").select_option("gpu down")
    assert page.evaluate(SHOWN)[0] == max(NIGHT.jobs, key=lambda job: job.gpu_s or 0).id


def test_tab_key_reaches_every_control_with_visible_focus(page):
    page.locator(".top .chip").first.focus()
    assert focused_names(page, 12)[:10] == [
        "All",
        "succeeded",
        "failed",
        "pending",
        "skipped",
        "Zoom",
        "Zoom",
        "Zoom",
        "Fit",
        "Timeline,",
    ]
    assert nameless_items(page, inside="label") == []


def test_hostile_texts_are_shown_as_text(opened, tmp_path):
    error = make_error(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    jobs = [
        make_job(HOSTILE, "failed", error=error, warnings=[HOSTILE], reason=HOSTILE, host=HOSTILE, shard=HOSTILE),
        make_job("</script><img src=x onerror=alert(1)>", stages_s={HOSTILE: 1.0}, fps=HOSTILE, output=HOSTILE),
    ]
    process = make_process([job.id for job in jobs], host=HOSTILE, shard=HOSTILE)
    page = opened(write(make_report(jobs, [process], run_id=HOSTILE, started_at=HOSTILE), tmp_path))
    for button in page.locator(".more-button").all():
        button.click()
    page.locator("[data-lane=generate] .span").nth(1).hover()
    assert HOSTILE[:20] in page.locator("#tip").inner_text()
    assert page.evaluate("document.querySelectorAll('img[src=x], main script').length") == 0
    assert page.locator("#job-1 .name").inner_text() == "</script><img src=x onerror=alert(1)>"


def test_page_of_run_without_processes_and_jobs_opens(opened, tmp_path):
    page = opened(write(make_report([], []), tmp_path))
    assert page.locator(".none").is_visible()
    assert "No process of this run has left a summary yet." in page.locator("#timeline").inner_text()
