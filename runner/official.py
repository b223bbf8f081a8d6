"""Official names: what the official preprocessing script calls the files it writes.

In:   a mode. Out: names. Never: what is in the files; manifest, fingerprint and preprocess agree here on names.
"""

from __future__ import annotations

__all__ = ["BACKGROUND", "FACE", "MASK", "POSE", "REFERENCE", "official_names"]

REFERENCE, POSE, FACE = "src_ref.png", "src_pose.mp4", "src_face.mp4"
BACKGROUND, MASK = "src_bg.mp4", "src_mask.mp4"


def official_names(mode: str) -> dict[str, str]:
    """What `mode` needs → file name."""
    names = {"reference": REFERENCE, "pose": POSE, "face": FACE}
    return names | ({"background": BACKGROUND, "mask": MASK} if mode == "replace" else {})
