"""Diagnosis: describes the kind of change that the metrics show, in sentences for people.

In:   `Measurements`. Out: sentences, the most specific first. Never: verdicts; a sentence breaks no limit.

The bounds decide when a value gets a sentence. They are well above the changes that another crf or another thread count
causes in the demo's renders. They are not limits of quality.
"""

from __future__ import annotations

from runner.regression.face_network import SAME_PERSON
from runner.regression.findings import Drift, Identity, Measurements, SegmentDrift
from runner.regression.identity import face_is_gated

__all__ = ["diagnose", "name_face", "shows_another_face"]

JOINT_STEP = 0.5  # delta E: half of the smallest difference that an eye sees side by side
GAIN = 0.01  # of a segment's still pixels, against the baseline's
COLOUR = 4.0  # delta E, of the mean colour of the person or the frame
BLURRED, SHARPENED = 0.7, 1.4  # of the baseline's Laplacian energy
STANDING, RESTLESS = 0.3, 3.0  # of the baseline's motion energy
MOST_SENTENCES = 8

_NAMES = {
    "dropped": "dropped",
    "repeated": "repeated from the frame before",
    "inserted": "not in the baseline",
    "moved": "at another position",
}


def diagnose(found: Measurements) -> list[str]:
    """Return the sentences; empty if no value reaches its bound."""
    sentences = [_describe_misalignment(one.kind, one.frame, one.frames) for one in found.misalignments]
    if found.shift is not None and found.psnr is not None:
        right, down = found.shift
        moved = f"moved by {right:g} pixels to the right and {down:g} down"
        sentences.append(f"frame {found.psnr.worst_frame} is the baseline's frame, {moved}")
    if found.identity is not None and shows_another_face(found.identity):
        sentences.append(name_face(found.identity))
    if found.drift is not None:
        sentences += _describe_drift(found.drift)
    if found.colour is not None and found.colour >= COLOUR:
        sentences.append(f"the mean colour of frame {found.colour_frame} differs by {found.colour:.1f} delta E")
    more = len(sentences) - MOST_SENTENCES
    return sentences if more <= 0 else [*sentences[:MOST_SENTENCES], f"and {more} more like these"]


def shows_another_face(identity: Identity) -> bool:
    """Return whether the faces belong to two people; False for faces that are too small for the network."""
    return face_is_gated(identity) and (identity.face_distance or 0.0) >= SAME_PERSON


def name_face(identity: Identity) -> str:
    """Return the sentence for a face of another person."""
    return (
        f"the face is another person's: its distance is {identity.face_distance:.2f}; faces of one person are below "
        f"{SAME_PERSON}"
    )


def _describe_misalignment(kind: str, frame: int, frames: int) -> str:
    which = f"frame {frame} is" if frames == 1 else f"frames {frame} to {frame + frames - 1} are"
    return f"{which} {_NAMES[kind]}"


def _describe_drift(drift: Drift) -> list[str]:
    sentences = [
        f"the colours step by {joint.excess:.1f} delta E at the joint before frame {joint.frame}: {_gain(joint.gain)}"
        for joint in drift.joints
        if joint.excess >= JOINT_STEP
    ]
    for segment in drift.segments:
        sentences += [f"segment {segment.segment} {what}" for what in _describe_segment(segment)]
    return sentences


def _describe_segment(segment: SegmentDrift) -> list[str]:
    texture, motion = segment.laplacian_ratio, segment.motion_ratio
    found = []
    if texture <= BLURRED:
        found.append(f"is blurred: its texture is {texture:.2f} of the baseline's")
    elif texture >= SHARPENED:
        found.append(f"is sharper or noisier: its texture is {texture:.2f} times the baseline's")
    if motion <= STANDING:
        found.append(f"is nearly still: its motion is {motion:.2f} of the baseline's")
    elif motion >= RESTLESS:
        found.append(f"is restless: its motion is {motion:.1f} times the baseline's")
    if max(abs(gain - 1) for gain in segment.gain) >= GAIN:
        found.append(f"has still pixels of other colours: {_gain(segment.gain)} against the baseline")
    return found


def _gain(gain: tuple[float, float, float]) -> str:
    return "gain " + "/".join(f"{channel:.3f}" for channel in gain)
