"""Matrix: ids that can be read, never clash, and do not depend on the order in which a manifest lists its names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.spec.matrix import ID_PATTERN, check_id, matrix_ids

NAMES = st.lists(
    st.one_of(
        st.sampled_from(["con.png", "nul.x.png", ".hidden.png", "end..mp4", "com1", "c.mp4?sig=1/2"]),
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
    assert all(check_id(name) and re.fullmatch(ID_PATTERN, name) for name in ids.values())
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


@pytest.mark.parametrize("name", ["con", "PRN", "aux", "nul.txt", "Nul.tar.gz", "com1", "LPT9.mp4", "com0"])
def test_the_name_of_a_device_is_no_id(name):
    with pytest.raises(ValueError, match=f"{name} is the name of a device on Windows.*; try job-{name}"):
        check_id(name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (".staged-ab12.tmp", "begins with a dot.*; try staged-ab12.tmp"),
        (".hidden", "begins with a dot"),
        ("abc.", "ends with a dot.*; try abc"),
        ("...", "begins with a dot[^;]*$"),
        (".", "names a folder"),
        ("..", "names a folder"),
        ("a b", "may hold only.*; try a-b"),
        ("clip?X-Amz-Signature=secret", "; try clip-X-Amz-Signature$"),
    ],
)
def test_an_id_that_makes_no_folder_is_refused_with_a_better_one(name, problem):
    with pytest.raises(ValueError, match=problem):
        check_id(name)


@pytest.mark.parametrize("name", ["a", "con-anna", "console", "null", "com", "com10", "a.con", "_", "-", "x" * 128])
def test_names_that_only_look_like_one_are_ids(name):
    assert check_id(name) == name


def test_a_matrix_makes_no_id_that_is_refused_and_puts_no_secret_into_one():
    ids = matrix_ids([".hidden.png", "con.x.png", "con.png"], ["samba..mp4", "s3://b/clip?X-Amz-Signature=sec/ret"])
    assert ids["con.png", "samba..mp4"].startswith("con-samba-")
    assert ids["con.x.png", "samba..mp4"].startswith("job-con.x-samba-")
    assert ids[".hidden.png", "samba..mp4"].startswith("hidden-samba-")
    assert all(not {"sec", "ret"} & set(re.split(r"\W", name)) for name in ids.values())
    assert matrix_ids(["con.png"], ["samba.mp4"]) == {("con.png", "samba.mp4"): "con-samba"}
