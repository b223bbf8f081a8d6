"""Inspection advice: gives advice, as sentences, for problems that were found in a driving video.

In:   the facts of a video and of its people. Out: `AdviceRecord`s. Never: pictures, networks, printing.

A rule is a row of RULES (for the video) or of PERSON_RULES (for each person): a stable code, a condition and a
sentence. A condition returns the numbers of the sentence, or None. Limits are given below with their origin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from runner.records.inspection import AdviceRecord, PersonRecord, VideoRecord
from runner.spec.options import JobOptions

__all__ = ["PERSON_RULES", "RULES", "InspectedVideo", "advise", "scene_parts"]

# Assumed. The face is enlarged to 512 pixels for the motion encoder. A mouth is about a third of the face: 8 pixels at
# the first limit, 20 at the second.
NO_EXPRESSION_PX = 24.0
LITTLE_EXPRESSION_PX = 64.0
# Measured on a real clip: 281 as it is, 36 blurred by a Gaussian of 1.5 pixels, 19 by one of 2 pixels. Drawn dances
# have 274 and more.
SOFT_PERSON = 30.0  # grey levels²
# Measured on five clips and two pictures: .27 to .48 as they are, .70 to .81 blurred by a Gaussian of 3 pixels.
BLURRED = 0.7
OFTEN = 0.5  # of the frames looked at; assumed
MOST_OF_IT = 0.9  # of the video's seconds; assumed
DEFAULT_FPS = float(JobOptions.model_fields["fps"].default)
HIGH_FPS = 32.0  # assumed: twice the default; beyond it each further frame costs as much and adds little motion
ALL_PICTURES = 0.97  # of the different pictures: sampling at a fitting rate shows so many; the ends may be missing
STAMP_S = 0.002  # a part ends this much before the cut, because time stamps of frames are rounded to milliseconds
NAMED = 4  # parts or spans that a sentence names

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class InspectedVideo:
    """What was found in a video."""

    video: VideoRecord
    people: Sequence[PersonRecord]
    looked_for: bool  # whether people were looked for


@dataclass(frozen=True)
class AdviceRule:
    """A rule for a whole video."""

    code: str
    applies: Callable[[InspectedVideo], Numbers | None]
    text: str | Callable[[Numbers], str]  # a template, or a function that returns the sentence


@dataclass(frozen=True)
class PersonRule:
    """A rule for one person."""

    code: str
    applies: Callable[[InspectedVideo, PersonRecord], Numbers | None]
    text: str | Callable[[Numbers], str]


def advise(seen: InspectedVideo) -> list[AdviceRecord]:
    """Return the advice of all rules: about the people, then about the video. Empty: no problem was found."""
    found = [_advice(rule, rule.applies(seen), None) for rule in RULES if rule.code.startswith("people.")]
    for person in seen.people:
        found += [_advice(rule, rule.applies(seen, person), person.number) for rule in PERSON_RULES]
    found += [_advice(rule, rule.applies(seen), None) for rule in RULES if not rule.code.startswith("people.")]
    return [advice for advice in found if advice is not None]


def _advice(rule: AdviceRule | PersonRule, numbers: Numbers | None, person: int | None) -> AdviceRecord | None:
    if numbers is None:
        return None
    text = rule.text.format(**numbers) if isinstance(rule.text, str) else rule.text(numbers)
    return AdviceRecord(code=rule.code, text=text, person=person, numbers=dict(numbers))


def scene_parts(video: VideoRecord, fps: float) -> list[dict[str, float]]:
    """Return `start_s` and `max_frames` of a job for each scene, at `fps` output frames a second.

    No frame of a part lies in another scene. A scene of fewer than two frames has no part.
    """
    parts = []
    for begin_s, end_s in pairwise([0.0, *(cut.at_s for cut in video.cuts), video.duration_s]):
        start_s = round(begin_s, 3)
        last = end_s == video.duration_s
        frames = round((end_s - start_s) * fps) if last else int((end_s - STAMP_S - start_s) * fps) + 1
        if frames >= 2:
            parts.append({"start_s": start_s, "max_frames": frames})
    return parts


# -- conditions --------------------------------------------------------------------------------------------------------


def _several(seen: InspectedVideo) -> Numbers | None:
    numbers = [person.number for person in seen.people]
    return {"people": len(numbers), "choices": numbers} if len(numbers) > 1 else None


def _cuts(seen: InspectedVideo) -> Numbers | None:
    if not seen.video.cuts:
        return None
    fps = _useful_fps(seen.video)
    return {"at_s": [cut.at_s for cut in seen.video.cuts], "fps": fps, "parts": scene_parts(seen.video, fps)}


def _repeats(seen: InspectedVideo) -> Numbers | None:
    repeats = seen.video.repeats
    return None if repeats is None else {**repeats.model_dump(), "stored_fps": seen.video.fps_measured}


def _low_rate(seen: InspectedVideo) -> Numbers | None:
    fps = seen.video.fps_measured
    return {"fps": fps, "default_fps": DEFAULT_FPS} if fps < DEFAULT_FPS and seen.video.repeats is None else None


def _high_rate(seen: InspectedVideo) -> Numbers | None:
    if (rate := seen.video.fps_measured) <= HIGH_FPS or seen.video.repeats is not None:
        return None
    return {"fps": rate, "halved_fps": rate / 2}


def _partly(seen: InspectedVideo, person: PersonRecord) -> Numbers | None:
    video = seen.video
    if person.seconds >= MOST_OF_IT * video.duration_s:
        return None
    numbers = {"seconds": person.seconds, "of_s": video.duration_s, "begin_s": person.begin_s, "end_s": person.end_s}
    if person.end_s - person.begin_s < MOST_OF_IT * video.duration_s:
        fps = _useful_fps(video)
        frames = max(2, int((person.end_s - person.begin_s) * fps) + 1)
        numbers |= {"fps": fps, "start_s": round(person.begin_s, 3), "max_frames": frames}
    return numbers


def _tiny_face(seen: InspectedVideo, person: PersonRecord) -> Numbers | None:
    face = person.face_px
    return None if face is None or round(face) >= NO_EXPRESSION_PX else {"face_px": face, "limit_px": NO_EXPRESSION_PX}


def _small_face(seen: InspectedVideo, person: PersonRecord) -> Numbers | None:
    face = person.face_px
    if face is None or not NO_EXPRESSION_PX <= round(face) < LITTLE_EXPRESSION_PX:
        return None
    return {"face_px": face, "limit_px": LITTLE_EXPRESSION_PX}


def _below(name: str, limit: float) -> Callable[[InspectedVideo, PersonRecord], Numbers | None]:
    """Return the condition that a person's measure `name` is known and less than `limit`."""

    def applies(seen: InspectedVideo, person: PersonRecord) -> Numbers | None:
        value = getattr(person, name)
        return None if value is None or value >= limit else {name: value, "limit": limit}

    return applies


def _unseen_fingers(seen: InspectedVideo, person: PersonRecord) -> Numbers | None:
    hands, fingers = person.hands_inside, person.fingers_seen
    if hands is None or fingers is None or hands < OFTEN or fingers >= OFTEN:
        return None
    return {"fingers_seen": fingers, "limit": OFTEN}


def _useful_fps(video: VideoRecord) -> float:
    """Return the fps for a job: the default; less if the video has fewer frames, or fewer different ones."""
    return min(video.fps_measured, DEFAULT_FPS) if video.repeats is None else float(Fraction(video.repeats.fps))


# -- sentences ---------------------------------------------------------------------------------------------------------


def _say_several(numbers: Numbers) -> str:
    others = " or ".join(f"`subject: {number}`" for number in numbers["choices"][1:])
    return f"{numbers['people']} people: number 1 drives the character; for another one set {others} under `preprocess`"


def _say_cuts(numbers: Numbers) -> str:
    at = [f"{at_s:.2f} s" for at_s in numbers["at_s"]]
    jobs = [f"`start_s: {part['start_s']:g}, max_frames: {part['max_frames']}`" for part in numbers["parts"]]
    what = f"cut at {at[0]}" if len(at) == 1 else f"{len(at)} cuts, at {_some(at)}"
    rate = f"at {numbers['fps']:g} fps"
    return f"{what}: render the parts as jobs with start_s and max_frames, {rate} {_some(jobs)}"


def _say_repeats(numbers: Numbers) -> str:
    per = numbers["frames_per_picture"]
    whole = round(per)
    if abs(per - whole) < 0.02:
        what = "every second frame repeats" if whole == 2 else f"each picture stays for {whole} frames"
    else:
        what = (
            f"{numbers['pictures_per_s']:.4g} of {numbers['stored_fps']:.4g} frames a second are new, the others repeat"
        )
    where = f" and start_s: {numbers['start_s']:.3g}" if numbers["start_s"] else ""
    fps = float(Fraction(numbers["fps"]))
    shown = "" if numbers["covered"] >= ALL_PICTURES else f", which shows {numbers['covered']:.0%} of the pictures"
    return f"{what}: set fps: {fps:.5g}{where}{shown}"


def _say_partly(numbers: Numbers) -> str:
    text = "on screen for {seconds:.1f} of {of_s:.1f} s, between {begin_s:.1f} and {end_s:.1f} s".format(**numbers)
    if "start_s" not in numbers:
        return f"{text}: outside it the last or next pose is held"
    return text + ": render that span, at {fps:g} fps `start_s: {start_s:g}, max_frames: {max_frames}`".format(
        **numbers
    )


def _say_still(numbers: Numbers) -> str:
    spans = [f"{begin_s:.1f} to {end_s:.1f} s" for begin_s, end_s in numbers["spans_s"]]
    return f"the picture does not move from {_some(spans)}: the character will not move there either"


def _some(words: Sequence[str]) -> str:
    shown = ", ".join(words[:NAMED])
    return shown if len(words) <= NAMED else f"{shown}, and {len(words) - NAMED} more"


# -- the rules ---------------------------------------------------------------------------------------------------------

RULES: tuple[AdviceRule, ...] = (
    AdviceRule(
        "people.unknown",
        lambda seen: None if seen.looked_for else {},
        "people were not looked for: give --models, a store with the detector and the pose network",
    ),
    AdviceRule(
        "people.none",
        lambda seen: {} if seen.looked_for and not seen.people else None,
        "no person was seen: this video cannot drive a character",
    ),
    AdviceRule("people.several", _several, _say_several),
    AdviceRule("video.cuts", _cuts, _say_cuts),
    AdviceRule("video.repeats", _repeats, _say_repeats),
    AdviceRule(
        "video.rate_low",
        _low_rate,
        "{fps:.4g} frames a second, below the default of {default_fps:g} fps, which would repeat some frames: set "
        "fps: {fps:.4g}; `output: {{interpolate: 2}}` makes the result smoother",
    ),
    AdviceRule(
        "video.rate_high",
        _high_rate,
        "{fps:.4g} frames a second: `fps: source` renders all of them; fps: {halved_fps:.4g} takes half the time",
    ),
    AdviceRule(
        "video.rate_variable",
        lambda seen: (
            {"shortest_ms": 1e3 * seen.video.frame_s_shortest, "longest_ms": 1e3 * seen.video.frame_s_longest}
            if seen.video.variable_rate
            else None
        ),
        "the frame rate varies, from {shortest_ms:.0f} to {longest_ms:.0f} ms per frame: set fps to a number; frames "
        "are sampled by time, so that sound and motion stay in sync",
    ),
    AdviceRule(
        "video.still",
        lambda seen: (
            {"spans_s": [(span.begin_s, span.end_s) for span in seen.video.still]} if seen.video.still else None
        ),
        _say_still,
    ),
    AdviceRule(
        "video.blurred",
        lambda seen: {"blur": seen.video.blur, "limit": BLURRED} if seen.video.blur >= BLURRED else None,
        "the video is blurred ({blur:.2f} of 1): joints, hands and face will be less exact; use a sharper copy",
    ),
)
PERSON_RULES: tuple[PersonRule, ...] = (
    PersonRule("person.partly", _partly, _say_partly),
    PersonRule(
        "face.none",
        lambda seen, person: {} if person.face_px is None else None,
        "no face was seen: expect no expression",
    ),
    PersonRule("face.tiny", _tiny_face, "face {face_px:.0f} px: expect no expression"),
    PersonRule(
        "face.small", _small_face, "face {face_px:.0f} px: expect little expression; {limit_px:.0f} px or more show it"
    ),
    PersonRule(
        "hands.outside",
        _below("hands_inside", OFTEN),
        "both hands are in the picture in {hands_inside:.0%} of the frames looked at: expect guessed or missing hands",
    ),
    PersonRule(
        "fingers.unseen",
        _unseen_fingers,
        "fingers of both hands are found in {fingers_seen:.0%} of the frames looked at: the hands are small or "
        "blurred; expect guessed or missing fingers",
    ),
    PersonRule(
        "feet.outside",
        _below("feet_inside", OFTEN),
        "both feet are in the picture in {feet_inside:.0%} of the frames looked at: use a reference with the same crop",
    ),
    PersonRule(
        "person.blurred",
        _below("sharpness", SOFT_PERSON),
        "blurred (sharpness {sharpness:.0f}, {limit:.0f} or more is usual): joints and face will be less exact",
    ),
)
