"""A night's renders as they lie in an output folder: what is missing, damaged or swapped is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import InputNotFound, InputUnreadable
from runner.records.output_layout import FRAME_DIGESTS, OUTPUT, PEOPLE, job_key
from runner.regression.night_renders import NightRender
from runner.storage import open_storage
from tests.regression.night_stores import write_render


@pytest.fixture(params=[False, True], ids=["mp4", "png"])
def render(request, tmp_path) -> NightRender:
    out = open_storage(tmp_path / "out")
    return NightRender(out, write_render(out, tmp_path / "scratch", png=request.param))


def test_night_render_that_is_whole_is_fetched_with_digests(render, tmp_path):
    render.check_there()
    assert len(render.digests()) == 3 and render.people() is None
    found = render.fetch(tmp_path / "to")
    paths = [found] if isinstance(found, Path) else found
    assert sum(path.stat().st_size for path in paths) == render.output.bytes
    assert b"".join(path.read_bytes() for path in paths) == b"first 0first 1first 2"


def test_night_render_of_frames_with_sound_checks_sound_and_fetches_frames(tmp_path):
    out = open_storage(tmp_path / "out")
    render = NightRender(out, write_render(out, tmp_path / "scratch", png=True, sound=b"tone"))
    render.check_there()
    assert render.output.files == 4
    assert [path.name for path in render.fetch(tmp_path / "to")] == [f"{index:06d}.png" for index in range(3)]
    out.delete(f"{render.output.key}audio.wav")
    with pytest.raises(InputNotFound, match="missing"):
        render.check_there()


def test_night_render_people_reads_file_beside_output(render):
    render.storage.write_bytes(job_key("a", PEOPLE), b"{}")
    assert render.people() == b"{}"


def test_night_render_with_missing_output_is_not_found(render, tmp_path):
    for info in list(render.storage.list("jobs/a/")):
        if info.key.startswith(render.output.key):
            render.storage.delete(info.key)
    with pytest.raises(InputNotFound, match="missing"):
        render.check_there()
    with pytest.raises((InputNotFound, InputUnreadable)):
        render.fetch(tmp_path / "to")


def test_night_render_with_output_of_other_size_is_unreadable(render):
    key = render.output.key if render.output.key.endswith(OUTPUT) else f"{render.output.key}000001.png"
    render.storage.write_bytes(key, b"longer than it was")
    with pytest.raises(InputUnreadable, match="the record says"):
        render.check_there()


def test_night_render_with_other_mp4_of_same_size_fails_at_fetch(tmp_path):
    out = open_storage(tmp_path / "out")
    render = NightRender(out, write_render(out, tmp_path / "scratch"))
    out.write_bytes(render.output.key, b"x" * render.output.bytes)
    render.check_there()
    with pytest.raises(InputUnreadable, match="differs from the file"):
        render.fetch(tmp_path / "to")


def test_night_render_with_missing_frame_is_refused(tmp_path):
    out = open_storage(tmp_path / "out")
    render = NightRender(out, write_render(out, tmp_path / "scratch", png=True))
    out.delete(f"{render.output.key}000001.png")
    with pytest.raises(InputNotFound, match="missing"):
        render.check_there()
    with pytest.raises(InputUnreadable, match="has 2 files; the record says 3"):
        render.fetch(tmp_path / "to")


def test_night_render_digests_of_other_frame_count_are_refused(render):
    key = job_key("a", FRAME_DIGESTS)
    render.storage.write_bytes(key, b"0" * 64 + b"\n")
    with pytest.raises(InputUnreadable, match="1 digests for 3 frames"):
        render.digests()
    render.storage.delete(key)
    assert render.digests() is None
