"""Ray address: which cluster `--on` means."""

from __future__ import annotations

import pytest

from runner.errors import ConfigInvalid
from runner.launch.ray_address import find_address, parse_on, split_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ray", None),
        ("ray:auto", "auto"),
        ("ray:10.0.0.5:6379", "10.0.0.5:6379"),
        ("ray:head.example:6379", "head.example:6379"),
        ("ray:[::1]:6379", "[::1]:6379"),
    ],
)
def test_parse_on_of_valid_text_gives_address(text, expected):
    assert parse_on(text) == expected


@pytest.mark.parametrize(
    "text", ["", "ray:", "slurm", "ray:head", "ray:head:0", "ray:head:70000", "ray:ray://head:10001", "rays:a:1"]
)
def test_parse_on_of_invalid_text_is_refused(text):
    with pytest.raises(ConfigInvalid, match="must be ray, ray:auto or ray:HOST:PORT"):
        parse_on(text)


def test_split_address_gives_host_and_port():
    assert split_address("[::1]:6379") == ("::1", 6379)
    assert split_address("head:6379") == ("head", 6379)


def test_find_address_of_auto_uses_ray_address_variable_first():
    assert find_address("auto", {"RAY_ADDRESS": "head:6379"}) == "head:6379"
    assert find_address("auto", {}) == find_address("auto", {"RAY_ADDRESS": "auto"}) == "auto"
    assert find_address("other:1", {"RAY_ADDRESS": "head:6379"}) == "other:1"
    with pytest.raises(ConfigInvalid, match="RAY_ADDRESS=ray://head:10001 is not HOST:PORT"):
        find_address("auto", {"RAY_ADDRESS": "ray://head:10001"})
