"""Frame digests: against sha256 by hand, and each frame by itself."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from runner.video import combined_digest, digest_frames, format_digests, parse_digests
from runner.video.frame_digests import digest_of

FRAMES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)


def test_digests_are_sha256_of_shape_and_bytes() -> None:
    by_hand = [hashlib.sha256(struct.pack("<3I", 4, 5, 3) + frame.tobytes()).digest() for frame in FRAMES]
    assert digest_frames(FRAMES) == [digest.hex() for digest in by_hand]
    assert combined_digest(digest_frames(FRAMES)) == hashlib.sha256(b"".join(by_hand)).hexdigest()
    view = np.flip(np.flip(FRAMES, 2).copy(), 2)  # not contiguous
    assert digest_frames(view) == digest_frames(FRAMES)


def test_a_changed_pixel_changes_its_own_frame_and_the_whole() -> None:
    other = FRAMES.copy()
    other[3, 1, 2, 0] ^= 1
    pairs = list(zip(digest_frames(FRAMES), digest_frames(other), strict=True))
    assert [index for index, (a, b) in enumerate(pairs) if a != b] == [3]
    assert combined_digest(a for a, _ in pairs) != combined_digest(b for _, b in pairs)
    assert combined_digest(digest_frames(FRAMES[::-1])) != combined_digest(digest_frames(FRAMES))
    assert digest_of(FRAMES[0].reshape(5, 4, 3)) != digest_of(FRAMES[0])


def test_other_than_frames_is_refused() -> None:
    for wrong in (FRAMES.astype(np.float32)[0], FRAMES, FRAMES[0, ..., :2]):
        with pytest.raises(ValueError, match="uint8"):
            digest_of(wrong)


def test_a_list_is_one_digest_a_line() -> None:
    digests = digest_frames(FRAMES)
    assert format_digests(digests).decode() == "\n".join(digests) + "\n"
    for some in (digests, digests[:1], []):
        assert parse_digests(format_digests(some)) == some
    first = digests[0].encode()
    for wrong in (
        first,
        first + b"\n\n",
        first[1:] + b"\n",
        first.upper() + b"\n",
        b"x" * 64 + b"\n",
        b"\xff\n",
        first + b"\r\n",
    ):
        with pytest.raises(ValueError, match=r"digests|ascii"):
            parse_digests(wrong)
