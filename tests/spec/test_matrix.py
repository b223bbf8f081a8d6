"""Matrix: ids that can be read, never clash, and do not depend on the order in which a manifest lists its names."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from runner.spec.matrix import ID_PATTERN, matrix_ids

NAMES = st.lists(
    st.one_of(
        st.sampled_from(["a-b.png", "a.png", "b/a.png", "A.png", "b.png", "c.mp4", "b-c.mp4", "贝拉.png", "x y.png"]),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.text("ab-", min_size=1, max_size=200),
    ),
    min_size=1,
    max_size=5,
    unique=True,
)


@settings(deadline=None)
@given(NAMES, NAMES, st.randoms())
def test_matrix_ids_are_valid_unique_and_do_not_depend_on_order(references, videos, random):
    ids = matrix_ids(references, videos)
    assert len(ids) == len(references) * len(videos)
    assert len({name.lower() for name in ids.values()}) == len(ids)
    assert all(re.fullmatch(ID_PATTERN, name) and name not in (".", "..") for name in ids.values())
    random.shuffle(references)
    random.shuffle(videos)
    assert matrix_ids(references, videos) == ids


def test_matrix_ids_are_readable_where_they_can_be():
    assert matrix_ids(["refs/anna.png"], ["s3://b/samba.v2.mp4"]) == {
        ("refs/anna.png", "s3://b/samba.v2.mp4"): "anna-samba.v2"
    }
    same = matrix_ids(["x/anna.png", "y/Anna.png", "bo.png"], ["samba.mp4"])
    assert re.fullmatch("anna-samba-[0-9a-f]{8}", same["x/anna.png", "samba.mp4"])
    assert same["bo.png", "samba.mp4"] == "bo-samba"
    crossing = matrix_ids(["a-b.png", "a.png"], ["c.mp4", "b-c.mp4"])
    assert crossing["a.png", "c.mp4"] == "a-c"
    assert crossing["a-b.png", "c.mp4"] != crossing["a.png", "b-c.mp4"]
    assert re.fullmatch("a-b-c-[0-9a-f]{8}", crossing["a.png", "b-c.mp4"])
    lost = matrix_ids(["贝拉.png", "小 明.png"], ["舞.mp4", "my dance.mp4"])
    assert re.fullmatch("job-[0-9a-f]{8}", lost["贝拉.png", "舞.mp4"])
    assert re.fullmatch("my-dance-[0-9a-f]{8}", lost["小 明.png", "my dance.mp4"])
