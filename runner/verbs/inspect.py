"""The verb `inspect`: measures a driving video before a job uses it, and gives advice.

In:   `InspectSettings`. Out: an `Inspection`: people by number, facts of the video, advice; optionally a sheet as PNG.
Never: generation; printing.

Without a model store the video is measured, but people are not looked for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from runner.records.events import default_logging
from runner.records.inspection import (
    CutRecord,
    Inspection,
    LookRecord,
    PersonRecord,
    RepeatsRecord,
    StillRecord,
    VideoRecord,
)
from runner.storage import fetch_input
from runner.storage.roots import check_inside, parse_roots
from runner.storage.sync import sync_models
from runner.verbs.inspection_advice import InspectedVideo, advise
from runner.verbs.settings import InspectSettings

if TYPE_CHECKING:
    from runner.preprocess.body.people_found import PeopleFound
    from runner.video import VideoReader
    from runner.video.clip_facts import ClipFacts

__all__ = ["inspect"]

LOG_EVERY_S = 5.0  # between two log lines with the progress of the decode, seconds
NETWORKS = "process_checkpoint/"  # the only folder of the store that is copied


@default_logging()
def inspect(settings: InspectSettings) -> Inspection:
    """Read the whole video: once for its facts, and with a model store once more for its people.

    Raises ConfigInvalid, input.*, storage.*; weights.* if the given store lacks a network.
    """
    from runner.video import VideoReader
    from runner.video.clip_facts import measure_clip

    place = check_inside(settings.video, parse_roots(settings.input_root))
    settings.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.cache) as scratch:
        with VideoReader(fetch_input(place, Path(scratch))) as reader:
            found = _find_people(settings, reader) if settings.models else None
            facts = measure_clip(reader, _progress(settings.video, reader.info.frames))
            inspection = _inspection(settings, facts, found)
            if settings.sheet is not None:
                from runner.verbs.inspection_sheet import draw_inspection_sheet

                draw_inspection_sheet(reader, inspection, found, settings.sheet)
    return inspection


def _find_people(settings: InspectSettings, reader: VideoReader) -> PeopleFound:
    from runner.generation.runtime.device import pick_device
    from runner.preprocess.networks.backends import open_backend
    from runner.preprocess.networks.providers import NetworkOptions
    from runner.preprocess.people_search import find_people
    from runner.preprocess.pose_cache import POSES_FOLDER
    from runner.storage.disk_cache import DiskCache
    from runner.weights.store import ModelStore

    models = sync_models(str(settings.models), settings.cache / "models", lambda key: key.startswith(NETWORKS))
    store = ModelStore(models)
    device, _ = pick_device(settings.device)
    networks = NetworkOptions(settings.pose_precision, settings.tensorrt, settings.cache)
    backend = open_backend("vitpose", store.detector, store.pose, device.type, networks)
    return find_people(reader, backend, cache=DiskCache(settings.cache / POSES_FOLDER))


def _progress(video: str, frames: int) -> Callable[[int], None]:
    """Return a function that logs the progress of the decode."""
    logged_at = time.monotonic()

    def note(done: int) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= LOG_EVERY_S:
            logged_at = time.monotonic()
            structlog.get_logger().info("inspecting", video=Path(video).name, frames=f"{done}/{frames}")

    return note


def _inspection(settings: InspectSettings, facts: ClipFacts, found: PeopleFound | None) -> Inspection:
    video = _video_record(facts)
    people = [] if found is None else _person_records(found, facts.info.duration_s)
    return Inspection(
        source=settings.video,
        video=video,
        people_looked_for=found is not None,
        look_s=None if found is None else found.look_s,
        people=people,
        advice=advise(InspectedVideo(video, people, found is not None)),
        sheet=None if settings.sheet is None else str(settings.sheet),
    )


def _video_record(facts: ClipFacts) -> VideoRecord:
    info, repeats = facts.info, facts.repeats
    return VideoRecord(
        frames=info.frames,
        duration_s=info.duration_s,
        width=info.width,
        height=info.height,
        rotation_degrees=info.rotation,
        has_audio=info.has_audio,
        fps=str(info.fps),
        fps_measured=facts.measured_fps,
        variable_rate=facts.variable,
        frame_s_shortest=facts.shortest_s,
        frame_s_longest=facts.longest_s,
        cuts=[CutRecord(frame=cut.frame, at_s=cut.seconds) for cut in facts.cuts],
        repeated_frames=facts.repeated_frames,
        repeats=None
        if repeats is None
        else RepeatsRecord(
            frames_per_picture=repeats.frames_a_picture,
            pictures_per_s=repeats.pictures_per_s,
            fps=str(repeats.fps),
            start_s=repeats.start_s,
            covered=repeats.covered,
        ),
        still=[StillRecord(begin_s=span.begin_s, end_s=span.end_s) for span in facts.still],
        blur=facts.blur,
    )


def _person_records(found: PeopleFound, duration_s: float) -> list[PersonRecord]:
    return [
        PersonRecord(
            number=person.number,
            seconds=min(person.seconds, duration_s),
            begin_s=person.begin_s,
            end_s=person.end_s,
            face_px=person.face_pixels,
            sharpness=person.sharpness,
            hands_inside=person.hands_inside,
            fingers_seen=person.fingers_seen,
            feet_inside=person.feet_inside,
            looks=[
                LookRecord(frame=frame, box=(round(box.x1, 2), round(box.y1, 2), round(box.x2, 2), round(box.y2, 2)))
                for frame, box in zip(person.looks, person.boxes, strict=True)
            ],
        )
        for person in found.people
    ]
