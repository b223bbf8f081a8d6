"""Checks of a submission: images with a tag or a digest pass, all else says what is missing."""

from __future__ import annotations

import pytest

from runner.errors import ConfigInvalid
from runner.launch.submission_checks import check_image

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "image",
    [
        "video-lab:1.2",
        "video-lab:latest",
        f"video-lab@{DIGEST}",
        f"video-lab:1.2@{DIGEST}",
        "localhost/video-lab:test",
        "host:5000/team/video-lab:1.2",
        f"host:5000/video-lab@{DIGEST}",
        "123456789012.dkr.ecr.eu-west-1.amazonaws.com/video_lab:v1.2.3-cu130",
        "europe-docker.pkg.dev/project/repository/video-lab:" + "t" * 128,
    ],
)
def test_a_tag_or_a_digest_is_enough(image):
    check_image(image)


@pytest.mark.parametrize("image", ["video-lab", "host:5000/video-lab", "host:5000/team/video-lab", "ghcr.io/a/b"])
def test_the_port_of_a_registry_is_no_tag(image):
    with pytest.raises(ConfigInvalid, match=r"has no tag.*latest") as raised:
        check_image(image)
    assert raised.value.where == "--image"
    assert image in raised.value.what


@pytest.mark.parametrize(
    "image",
    [
        "",
        " ",
        "video lab:1",
        "video-lab:",
        "video-lab@",
        "video-lab@sha256:abc",
        "video-lab:1:2",
        "Video-Lab:1",  # a repository has no capital letters
        "video-lab:" + "t" * 129,
        "video-lab:-x",
        "https://host/video-lab:1",
        "video-lab:1\n",
    ],
)
def test_what_is_no_reference_is_refused(image):
    with pytest.raises(ConfigInvalid, match="is not an image reference"):
        check_image(image)
