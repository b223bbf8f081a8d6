"""Packed masks: what comes out is what went in, and a long clip of them stays small."""

from __future__ import annotations

import io

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runner.preprocess.masks.packed import ClipMasks, pack, unpack

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(hnp.arrays(bool, sizes))
def test_unpack_inverts_pack(mask):
    packed = pack(mask)
    assert (unpack(packed, *mask.shape) == mask).all()
    assert packed.empty == (not mask.any())


@given(hnp.arrays(bool, st.tuples(st.integers(0, 6), st.just(9), st.just(13))))
def test_arrays_keep_everything(masks):
    clip = ClipMasks.of(iter(masks), 9, 13)
    file = io.BytesIO()
    np.savez(file, **clip.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        again = ClipMasks.from_arrays(dict(arrays))
    assert again.packed == clip.packed and (again.height, again.width) == (9, 13)
    assert [(a == b).all() for a, b in zip(again.frames(0, len(masks)), masks, strict=True)] == [True] * len(masks)


def test_spans_and_repeated_frames():
    masks = np.random.default_rng(1).random((5, 8, 6)) < 0.5
    clip = ClipMasks.of(iter(masks), 8, 6)
    assert (np.stack(list(clip.frames(1, 4))) == masks[1:4]).all()
    repeated = clip.taken(np.array([0, 0, 3, 4]))
    assert len(repeated) == 4
    assert (np.stack(list(repeated.frames(0, 4))) == masks[[0, 0, 3, 4]]).all()


def test_a_person_in_1080p_costs_a_few_kilobytes():
    grey = np.zeros((1080, 1920), np.uint8)
    cv2.ellipse(grey, (900, 600), (170, 430), 8, 0, 360, 255, -1)
    grey |= cv2.resize(np.random.default_rng(0).integers(0, 2, (27, 48), np.uint8) * 255, (1920, 1080)) & grey
    mask = grey > 0
    clip = ClipMasks.of([mask], 1080, 1920)
    assert clip.nbytes < 6000  # a bit a pixel are 259 200
    assert (next(clip.frames(0, 1)) == mask).all()
