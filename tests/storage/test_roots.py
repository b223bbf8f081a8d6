"""Roots: an input lies below one of them, symlinks followed, or it is refused."""

from __future__ import annotations

import pytest

from runner.errors import ConfigInvalid, InputUnreadable
from runner.storage.roots import check_inside, parse_roots


@pytest.fixture
def media(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "inside").mkdir()  # begins with the root's name
    for file in ("in/a.png", "in/deep/b.png", "inside/c.png", "d.png"):
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "in/out.png").symlink_to(tmp_path / "d.png")
    (tmp_path / "in/folder").symlink_to(tmp_path / "inside")
    (tmp_path / "in/near.png").symlink_to(tmp_path / "in/a.png")
    (tmp_path / "way").symlink_to(tmp_path / "in")
    return tmp_path


@pytest.mark.parametrize("name", ["in/a.png", "in/deep/b.png", "in/deep/../a.png", "in/near.png", "in/new"])
def test_what_lies_inside_is_given_back_with_its_links_followed(media, name):
    for root in (media / "in", media / "way"):
        (real,) = parse_roots([str(root)])
        assert check_inside(f"{media}/{name}", (real,)) == str((media / name).resolve())
    assert check_inside(f"file://{media}/in/a.png", parse_roots([f"file://{media}/in"])) == f"{media}/in/a.png"


@pytest.mark.parametrize(
    "name", ["d.png", "inside/c.png", "in/../d.png", "in/out.png", "in/folder/c.png", "in/deep/../../d.png", "none"]
)
def test_what_lies_elsewhere_is_refused(media, name):
    with pytest.raises(InputUnreadable, match="lies outside --input-root"):
        check_inside(f"{media}/{name}", parse_roots([str(media / "in")]))


def test_a_link_that_is_changed_later_leads_nowhere_else(media):
    place = check_inside(f"{media}/in/near.png", parse_roots([str(media / "in")]))
    (media / "in/near.png").unlink()
    (media / "in/near.png").symlink_to(media / "d.png")
    assert place == f"{media}/in/a.png"
    with pytest.raises(InputUnreadable):
        check_inside(f"{media}/in/near.png", parse_roots([str(media / "in")]))


def test_objects_need_a_root_of_their_own(media):
    roots = parse_roots([str(media / "in"), "S3://studio/media/"])
    assert check_inside("s3://studio/media/a/b.mp4", roots) == "s3://studio/media/a/b.mp4"
    for uri in (
        "s3://studio/media2/a.mp4",
        "s3://studio/media",
        "s3://studio/media/../a.mp4",
        "s3://studio/media//a.mp4",
        "s3://other/media/a.mp4",
    ):
        with pytest.raises(InputUnreadable, match="lies outside"):
            check_inside(uri, roots)
    with pytest.raises(InputUnreadable):
        check_inside("s3://studio/media/a.mp4", parse_roots([str(media)]))
    with pytest.raises(InputUnreadable):
        check_inside(f"{media}/in/a.png", parse_roots(["s3://studio"]))
    assert check_inside("s3://studio/a.mp4", parse_roots(["s3://studio"])) == "s3://studio/a.mp4"


def test_without_roots_everything_is_allowed(media):
    assert check_inside("d/../e.png", ()) == "d/../e.png"


@pytest.mark.parametrize("name", ["none", "d.png", "s3://", "s3:///x", "s3://b/../c", "https://h/x"])
def test_a_root_that_is_no_folder_stops_the_command(media, name):
    with pytest.raises(ConfigInvalid):
        parse_roots([name if "://" in name else f"{media}/{name}"])
