"""Advice: each rule applies where it should and nowhere else; its numbers can be used as they stand."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from runner.records.inspection import CutRecord, PersonRecord, RepeatsRecord, StillRecord, VideoRecord
from runner.spec.manifest import parse_manifest
from runner.verbs.inspection_advice import PERSON_RULES, RULES, InspectedVideo, advise, scene_parts
from runner.video import sample_by_time
from tests.records.test_inspection import make_person, make_video


def advice(video: VideoRecord | None = None, *people: PersonRecord, looked_for: bool = True) -> dict[str, str]:
    """Code → text."""
    seen = InspectedVideo(video or make_video(), people or [make_person()], looked_for)
    return {found.code: found.text for found in advise(seen)}


def repeats(**more) -> RepeatsRecord:
    values = {"frames_per_picture": 2.0, "pictures_per_s": 15.0, "fps": "15", "start_s": 0.0, "covered": 1.0}
    return RepeatsRecord(**(values | more))


CASES = {
    "people.unknown": (lambda: {f.code: f.text for f in advise(InspectedVideo(make_video(), [], False))}, "--models"),
    "people.none": (lambda: {f.code: f.text for f in advise(InspectedVideo(make_video(), [], True))}, "no person"),
    "people.several": (
        lambda: advice(None, make_person(1), make_person(2), make_person(3)),
        "`subject: 2` or `subject: 3`",
    ),
    "video.cuts": (lambda: advice(make_video(cuts=[CutRecord(frame=80, at_s=3.2)])), "cut at 3.20 s: render the parts"),
    "video.repeats": (
        lambda: advice(make_video(fps_measured=30.0, repeats=repeats())),
        "every second frame repeats: set fps: 15",
    ),
    "video.rate_low": (lambda: advice(make_video(fps="12", fps_measured=12.0)), "set fps: 12; "),
    "video.rate_high": (lambda: advice(make_video(fps="60", fps_measured=60.0)), "fps: 30 takes half the time"),
    "video.rate_variable": (
        lambda: advice(make_video(variable_rate=True, frame_s_shortest=0.02, frame_s_longest=0.066)),
        "from 20 to 66 ms",
    ),
    "video.still": (lambda: advice(make_video(still=[StillRecord(begin_s=2.0, end_s=4.5)])), "from 2.0 to 4.5 s"),
    "video.blurred": (lambda: advice(make_video(blur=0.75)), "blurred (0.75 of 1)"),
    "person.partly": (
        lambda: advice(None, make_person(seconds=3.0, begin_s=2.0, end_s=4.9)),
        "on screen for 3.0 of 10.0 s, between 2.0 and 4.9 s: render that span, at 16 fps `start_s: 2, max_frames: 47`",
    ),
    "face.none": (lambda: advice(None, make_person(face_px=None)), "expect no expression"),
    "face.tiny": (lambda: advice(None, make_person(face_px=18.2)), "face 18 px: expect no expression"),
    "face.small": (lambda: advice(None, make_person(face_px=34.0)), "face 34 px: expect little expression"),
    "hands.outside": (lambda: advice(None, make_person(hands_inside=0.25)), "in 25% of the frames looked at"),
    "fingers.unseen": (lambda: advice(None, make_person(fingers_seen=0.25)), "found in 25% of the frames looked at"),
    "feet.outside": (lambda: advice(None, make_person(feet_inside=0.0)), "both feet are in the picture in 0%"),
    "person.blurred": (lambda: advice(None, make_person(sharpness=12.0)), "sharpness 12"),
}


@pytest.mark.parametrize("code", [rule.code for rule in (*RULES, *PERSON_RULES)])
def test_advice_rule_applies_alone_and_names_finding(code):
    made, words = CASES[code]
    said = made()
    assert set(said) == {code}
    assert words in said[code]


def test_advice_codes_are_unique_and_good_video_has_no_advice():
    codes = [rule.code for rule in (*RULES, *PERSON_RULES)]
    assert sorted(codes) == sorted(set(codes)) == sorted(CASES)
    assert advice() == {}


def test_advice_limits_are_exact():
    # A face counts as it is printed, in whole pixels.
    assert set(advice(None, make_person(face_px=23.4))) == {"face.tiny"}
    assert (
        set(advice(None, make_person(face_px=23.6))) == set(advice(None, make_person(face_px=63.4))) == {"face.small"}
    )
    assert advice(None, make_person(face_px=63.6)) == {}
    assert (
        advice(None, make_person(seconds=9.0, hands_inside=0.5, fingers_seen=0.5, feet_inside=0.5, sharpness=30.0))
        == {}
    )
    assert advice(None, make_person(hands_inside=None, fingers_seen=None, feet_inside=None, sharpness=None)) == {}
    both = advice(None, make_person(hands_inside=0.25, fingers_seen=0.0))
    assert set(both) == {"hands.outside"}  # one sentence says both


def test_advice_on_person_who_comes_and_goes_suggests_no_start_s():
    text = advice(None, make_person(seconds=4.0, begin_s=0.0, end_s=9.9))["person.partly"]
    assert "outside it the last or next pose is held" in text and "start_s" not in text


def test_advice_on_repeats_names_lost_pictures():
    lossy = repeats(frames_per_picture=1.25, pictures_per_s=24.0, fps="24000/1001", start_s=1 / 30, covered=0.9)
    text = advice(make_video(fps_measured=30.0, repeats=lossy))["video.repeats"]
    assert text == (
        "24 of 30 frames a second are new, the others repeat: set fps: 23.976 and start_s: 0.0333, which shows 90% of "
        "the pictures"
    )
    slow = repeats(frames_per_picture=3.0, pictures_per_s=8.0, fps="8")
    assert set(advice(make_video(fps_measured=24.0, repeats=slow))) == {"video.repeats"}  # not a low rate as well


def test_advice_lists_people_in_order_and_then_video():
    video = make_video(blur=0.9)
    found = advise(InspectedVideo(video, [make_person(1, face_px=20.0), make_person(2, face_px=None)], True))
    assert [(a.code, a.person) for a in found] == [
        ("people.several", None),
        ("face.tiny", 1),
        ("face.none", 2),
        ("video.blurred", None),
    ]
    assert found[1].numbers == {"face_px": 20.0, "limit_px": 24.0}


@pytest.mark.parametrize("fps", [16, 15, 24])
@pytest.mark.parametrize("stored", [Fraction(25), Fraction(30000, 1001)])
def test_advice_on_part_stays_within_scene_and_keeps_most_frames(stored, fps):
    starts_s = np.arange(250) * float(1 / stored)
    end_s = 250 / float(stored)
    bounds = [0, 31, 80, 81, 190, 250]  # one scene is a single frame
    video = make_video(duration_s=end_s, cuts=[CutRecord(frame=cut, at_s=float(starts_s[cut])) for cut in bounds[1:-1]])
    parts = scene_parts(video, fps)
    assert len(parts) == 4
    scenes = [(a, b) for a, b in pairwise(bounds) if b - a > 1]
    for (first, after), part in zip(scenes, parts, strict=True):
        frames = sample_by_time(starts_s, end_s, Fraction(fps).limit_denominator(1001), part["start_s"])
        shown = frames[: int(part["max_frames"])]
        assert first <= shown.min() and shown.max() < after
        seconds = (after - first) / float(stored)
        assert len(shown) >= int(seconds * fps) - 1


def test_option_in_advice_is_accepted_by_manifest():
    """Each `key: value` of the advice is taken by the manifest."""
    texts = [text for made, _ in CASES.values() for text in made().values()]
    found = [quoted for text in texts for quoted in re.findall(r"`([a-z_]+: [^`]+)`", text)]
    found += [match for text in texts for match in re.findall(r"set (fps: [\d.]+)", text)]
    assert len(found) >= 6
    for options in found:
        nested = f"preprocess: {{{options}}}" if options.startswith("subject") else options
        parse_manifest(f"version: 1\njobs: [{{id: a, reference: r, video: v, options: {{{nested}}}}}]\n", base=".")
