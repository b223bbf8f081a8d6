"""The HTML report in a real headless Chromium: it plays, flips, and is usable by keys, without network.

Frames carry their index in their pixels (tests/video_files.py), so that what is on screen is read off a canvas.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.regression.evidence import VideoLink
from runner.regression.html_report import write_html
from tests.chromium import (
    NARROW,
    WIDE,
    Seen,
    contrast,
    focused_names,
    lay_out_all,
    luminances,
    nameless_items,
    open_chromium,
    wait_until,
    why_not,
)
from tests.regression.report_samples import FPS, FRAMES, HOSTILE, indexed_evidence, make_comparison, make_finding

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Failures first: failed, broken (without videos), broken (with), new (with one video), changed, identical ones."""
    folder = tmp_path_factory.mktemp("report")
    failed = make_finding("failed", f"dance-07 {HOSTILE}", error=HOSTILE)
    broken, new, changed = make_finding("broken", "mira-night"), make_finding("new"), make_finding("changed")
    jobs = [failed, make_finding("broken", "no-videos"), broken, new, changed]
    jobs += [make_finding("identical", f"same-{number}") for number in range(30)]
    of_new = indexed_evidence(folder, new)
    evidence = [
        indexed_evidence(folder, broken),
        replace(of_new, videos={"new": of_new.videos["new"]}),
        indexed_evidence(folder, changed),
    ]
    write_html(make_comparison(jobs), evidence, folder / "report.html", embed_bytes=10**7)
    alone = folder / "alone" / "report.html"  # as from an e-mail: nothing lies beside it
    alone.parent.mkdir()
    return (folder / "report.html").rename(alone)


@pytest.fixture
def seen(report: Path) -> Iterator[Seen]:
    """Every test here also holds that the page asks for nothing and complains of nothing."""
    seen = Seen()
    yield seen
    assert seen.messages == []
    assert seen.outside(report) == []


@pytest.fixture
def page(browser: Any, report: Path, seen: Seen) -> Iterator[Any]:
    page = seen.watch(browser.new_page())
    page.emulate_media(color_scheme="light")
    page.goto(report.as_uri())
    yield page
    page.close()


# The index that the frame on screen carries, of every video of job 3, read as tests/video_files.py wrote it: twelve
# blocks, six in each of two rows of a quarter of the height. Green is the same in both videos. Null while it seeks.
SHOWN_FRAMES = """() => [...document.querySelectorAll("#job-3 video")].map((video) => {
    if (video.readyState < 2 || video.seeking) return null;
    const canvas = document.createElement("canvas"), wide = video.videoWidth / 6, high = video.videoHeight / 4;
    canvas.width = video.videoWidth; canvas.height = video.videoHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(video, 0, 0);
    let index = 0;
    for (let bit = 0; bit < 12; bit++) {
        const x = Math.floor((bit % 6 + 0.5) * wide), y = Math.floor((Math.floor(bit / 6) + 0.5) * high);
        index += context.getImageData(x, y, 1, 1).data[1] > 127 ? 2 ** bit : 0;
    }
    return index;
})"""


def wait_for_frame(page: Any, index: int) -> None:
    """Until both videos show frame `index` and neither seeks any more."""
    deadline = time.monotonic() + 15
    while (shown := page.evaluate(SHOWN_FRAMES)) != [index, index]:
        assert time.monotonic() < deadline, f"frames {shown}, not {index}"
        page.wait_for_timeout(20)


def go_to_job(page: Any, number: int) -> None:
    for _ in range(number):
        page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == f"job-{number}"


def times(page: Any) -> list[float]:
    return page.evaluate("[...document.querySelectorAll('#job-3 video')].map(video => video.currentTime)")


def screen(page: Any, locator: str) -> np.ndarray:
    """float [H, W, 3]: what is on screen of an element."""
    import cv2

    data = np.frombuffer(page.locator(locator).screenshot(), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(float)


def redness(picture: np.ndarray) -> float:
    """Near 0 for the grey baseline, far below for the new video, whose red is half of it."""
    return float((picture[..., 0] - picture[..., 1]).mean())


def test_the_failing_job_is_read_first_and_its_name_is_text(page):
    assert page.title().startswith("4 of 35 jobs need a look")
    first = page.locator("main h2").first
    assert first.text_content().strip().startswith("dance-07 </script><script>alert(")
    assert page.locator(".job, .line").first.get_attribute("data-verdict") == "failed"
    top = page.locator("#job-1").bounding_box()
    assert top["y"] < WIDE["height"]  # seen without scrolling


def test_the_worst_frame_is_shown_first(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    assert page.locator("#job-3 .where").text_content().startswith("frame 33 of 60")
    assert page.locator("#job-3 .picture").count() == 4
    sizes = page.evaluate("[...document.querySelectorAll('#job-3 .picture img')].map(image => image.naturalHeight)")
    assert sizes == [64] * 4


def test_both_videos_play_in_step(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    page.locator("#job-3 .scrub").fill("0")
    wait_for_frame(page, 0)
    page.locator("#job-3 .play").click()
    apart = []
    for _ in range(12):
        page.wait_for_timeout(100)
        baseline, new = times(page)
        apart.append(abs(baseline - new) * float(FPS))
    assert page.locator("#job-3 .play").get_attribute("aria-label") == "Pause"
    assert min(times(page)) > 0.5
    assert float(np.median(apart)) < 1, apart
    assert max(apart) < 2.5, apart  # on a busy machine, for a moment
    page.locator("#job-3 .play").click()
    paused = int(page.locator("#job-3 .scrub").input_value())
    wait_for_frame(page, paused)  # the very same frame of both
    stopped = times(page)
    page.wait_for_timeout(200)
    assert times(page) == stopped


def test_it_plays_on_from_the_start_after_the_last_frame(page):
    go_to_job(page, 3)
    page.locator("#job-3 .scrub").fill(str(FRAMES - 6))
    wait_for_frame(page, FRAMES - 6)
    page.keyboard.press("Escape")
    page.locator("#job-3 .play").click()
    wait_until(page, "Number(document.querySelector('#job-3 .scrub').value) < 20")
    wait_until(page, "[...document.querySelectorAll('#job-3 video')].every(video => !video.paused)")


def test_keys_step_one_frame_at_a_time(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    for key, index in (("ArrowRight", 34), ("ArrowRight", 35), ("ArrowLeft", 34), ("ArrowLeft", 33), ("ArrowLeft", 32)):
        page.keyboard.press(key)
        wait_for_frame(page, index)
    page.keyboard.press(" ")
    wait_until(page, "!document.querySelector('#job-3 video').paused")
    page.keyboard.press(" ")
    wait_until(page, "document.querySelector('#job-3 video').paused")


@pytest.mark.parametrize("frame", [0, 1, FRAMES - 1])
def test_the_first_and_the_last_frame_can_be_reached(page, frame):
    go_to_job(page, 3)
    page.locator("#job-3 .scrub").fill(str(frame))
    wait_for_frame(page, frame)
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft" if frame == 0 else "ArrowRight")
    wait_for_frame(page, min(max(frame, 0) + (1 if frame == 1 else 0), FRAMES - 1))


def test_flip_changes_what_is_visible_and_nothing_else_moves(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    page.keyboard.press("f")
    stage = page.locator("#job-3 .stage")
    assert stage.get_attribute("data-shown") == "baseline"
    baseline, place = screen(page, "#job-3 .stage"), stage.bounding_box()
    page.keyboard.press("f")
    new = screen(page, "#job-3 .stage")
    assert stage.bounding_box() == place
    assert redness(baseline) > -3
    assert redness(new) < -15
    page.keyboard.press("f")
    assert np.abs(screen(page, "#job-3 .stage") - baseline).mean() < 1
    page.keyboard.press("Escape")
    assert stage.get_attribute("data-mode") == "side"


def test_the_slider_moves_the_border_between_both(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    page.keyboard.press("s")
    pane = page.locator("#job-3 .pane[data-of=new]").bounding_box()
    stage = page.locator("#job-3 .stage").bounding_box()
    halves = {}
    for share in (25, 75):
        page.locator("#job-3 .wipe").fill(str(share))
        picture = screen(page, "#job-3 .stage")
        left = int(pane["x"] - stage["x"])
        middle = picture[:, left + int(pane["width"] * 0.35) : left + int(pane["width"] * 0.65)]
        halves[share] = redness(middle)
    assert halves[25] < -15  # the new one is right of the border
    assert halves[75] > -3
    box = page.locator("#job-3 .wipe").bounding_box()
    assert box == page.locator("#job-3 .pane[data-of=new]").bounding_box()  # the handle is where the border is
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20, steps=4)
    page.mouse.up()
    assert float(page.locator("#job-3 .wipe").input_value()) == pytest.approx(25, abs=2)


def test_the_moving_difference_is_black_where_both_agree(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    page.keyboard.press("d")
    red, green, _ = screen(page, "#job-3 .pane[data-of=new]").mean(axis=(0, 1))
    assert red > 100  # red is halved: amplified, it is clipped
    assert green < 40


def test_zoom_shows_the_same_place_of_both(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    box = page.locator("#job-3 .pane[data-of=baseline]").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.keyboard.press("z")
    styles = "[...document.querySelectorAll('#job-3 video')].map(video => getComputedStyle(video))"
    assert page.evaluate(f"{styles}.map(style => style.transform)") == ["matrix(3, 0, 0, 3, 0, 0)"] * 2
    origins = page.evaluate(f"{styles}.map(style => parseFloat(style.transformOrigin))")
    widths = page.evaluate(f"{styles}.map(style => parseFloat(style.width))")
    assert [origin / width for origin, width in zip(origins, widths, strict=True)] == pytest.approx(
        [0.25] * 2, abs=0.01
    )
    page.keyboard.press("Escape")
    assert page.evaluate(f"{styles}.map(style => style.transform)") == ["none"] * 2


def test_a_click_on_a_curve_shows_its_frame(page):
    go_to_job(page, 3)
    wait_for_frame(page, 33)
    plot = page.locator("#job-3 .curve[data-metric=psnr] svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 12 / (FRAMES - 1), box["y"] + box["height"] / 2)
    wait_for_frame(page, 12)
    assert page.locator("#job-3 .curve[data-metric=ssim] .value").text_content().startswith("frame 12: 0.97")
    page.locator("#job-3 .breaches .go").nth(1).click()
    wait_for_frame(page, 29)


def test_filters_and_search_leave_the_wanted_jobs(page):
    def shown() -> list[str]:
        found = "[...document.querySelectorAll('.job, .line')].filter(item => item.checkVisibility())"
        return page.evaluate(f"{found}.map(item => item.dataset.name)")

    assert len(shown()) == 35
    page.locator(".chip.v-broken").click()
    assert shown() == ["no-videos", "mira-night"]
    assert page.locator(".chip.v-broken").get_attribute("aria-pressed") == "true"
    assert page.locator(".status").inner_text() == "2 jobs are shown"
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.dataset.name") == "mira-night"
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.dataset.name") == "no-videos"
    page.keyboard.press("/")
    page.keyboard.type("MIRA")
    assert shown() == ["mira-night"]
    page.keyboard.type("fs")  # letters of a name are no commands
    assert shown() == []
    assert page.locator(".none").is_visible()
    page.keyboard.press("Escape")
    page.locator(".chip").first.click()
    assert len(shown()) == 35


def test_the_approve_command_can_be_copied(page, browser):
    browser.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    wait_until(page, "document.querySelector('[data-action=copy]').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == make_comparison([]).approve


def test_help_opens_and_closes_by_key(page):
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("j")  # the page behind it stands still
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_a_picture_is_enlarged_and_closed_again(page):
    go_to_job(page, 3)
    page.locator("#job-3 .picture button").last.click()
    assert page.locator("#large img").get_attribute("alt") == "difference, frame 33"
    assert page.locator("#large img").bounding_box()["height"] > 500
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()


def test_dark_mode_changes_colours_and_both_are_legible(page):
    texts = ["h1", ".about dt", ".badge", ".v-new .badge", ".v-changed .badge", ".say", "#job-3 .job-foot", "th"]
    texts += [".line .verdict", ".p-slower td", ".p-better td", ".chip", ".line .say", "#job-3 .legend"]
    behind = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        _, behind[scheme] = luminances(page, "h1")
        assert {name: round(found, 2) for name in texts if (found := contrast(page, name)) < 4.5} == {}
    assert behind["light"] > 0.8
    assert behind["dark"] < 0.05


def test_keys_reach_every_control_and_focus_is_seen(page):
    page.locator("#job-3 .play").focus()
    assert focused_names(page, 9) == [
        "Play",
        "One",
        "One",
        "Frame",
        "Side",
        "Flip",
        "Slider",
        "Difference",
        "Speed",
    ]
    assert nameless_items(page, inside="dialog") == []


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_is_cut_off_at_the_side(page, viewport):
    page.set_viewport_size(viewport)
    for mode in ("Escape", "f", "s", "d"):
        page.keyboard.press(mode)
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    lay_out_all(page)
    outside = page.evaluate(
        """[...document.querySelectorAll(".job *:not(script)")].filter(item => {
            const box = item.getBoundingClientRect();
            return box.width && box.right > innerWidth && !item.closest(".pictures, .tables section");
        }).map(item => item.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_loading_moves_nothing(page):
    before = page.locator("#job-3").bounding_box()["height"]
    go_to_job(page, 3)
    placed = page.locator("#job-3").bounding_box()["height"]
    wait_for_frame(page, 33)
    assert page.locator("#job-3").bounding_box()["height"] == placed
    assert before > 300
    moved = page.evaluate(
        """new Promise((resolve) => {
            let sum = 0;
            new PerformanceObserver((list) => { for (const entry of list.getEntries()) sum += entry.value; })
                .observe({ type: "layout-shift", buffered: true });
            setTimeout(() => resolve(sum), 300);
        })"""
    )
    assert moved < 0.02


def test_one_video_alone_plays_without_views(page):
    go_to_job(page, 4)
    assert page.locator("#job-4 .modes").count() == 0
    page.keyboard.press("f")
    assert page.locator("#job-4 .stage").get_attribute("data-mode") == "side"
    page.keyboard.press(" ")
    wait_until(page, "document.querySelector('#job-4 video').currentTime > 1.5")


def test_few_videos_are_held_at_a_time(browser, tmp_path):
    """A browser has few decoders; jobs out of sight give theirs back."""
    findings = [make_finding("broken", f"job-{number}") for number in range(9)]
    evidence = [indexed_evidence(tmp_path, finding, frames=10) for finding in findings]
    write_html(make_comparison(findings), evidence, tmp_path / "report.html", embed_bytes=10**7)
    seen = Seen()
    page = seen.watch(browser.new_page())
    page.goto((tmp_path / "report.html").as_uri())
    for _ in findings:
        page.keyboard.press("j")
        page.wait_for_timeout(150)
    held = page.evaluate("[...document.querySelectorAll('video')].filter(video => video.hasAttribute('src')).length")
    assert 2 <= held <= 12
    for _ in findings:
        page.keyboard.press("k")
    wait_until(page, "document.querySelector('#job-1 video').readyState > 1")  # loaded again
    page.close()
    assert seen.messages == []


def test_a_linked_video_plays_and_a_lost_one_says_so(browser, tmp_path):
    finding = make_finding("broken")
    made = indexed_evidence(tmp_path, finding)
    links = {
        "baseline": VideoLink(FPS, FRAMES, (96, 64), url=made.videos["baseline"].file.name),
        "new": VideoLink(FPS, FRAMES, (96, 64), url="gone.mp4"),
    }
    write_html(make_comparison([finding]), [replace(made, videos=links)], tmp_path / "report.html", embed_bytes=1)
    seen = Seen()
    page = seen.watch(browser.new_page())
    page.goto((tmp_path / "report.html").as_uri())
    page.keyboard.press("j")
    wait_until(page, "document.querySelector('[data-of=baseline] video').readyState > 1")
    wait_until(page, "document.querySelector('.player-note').textContent.includes('gone.mp4')")
    assert not [message for message in seen.messages if "Security" in message]
    page.close()
