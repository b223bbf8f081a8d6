"""Baseline layout: folders of devices and recipes stay below the root, and two GPUs have two."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.regression.baseline_layout import (
    JobName,
    approvals_key,
    device_folder,
    is_night_of,
    name_job,
    night_key,
    nights_prefix,
    recipe_folder,
)
from runner.spec.recipes import RECIPES
from runner.storage import check_key
from tests.regression.night_stores import make_record

NAMES = st.one_of(
    st.text(max_size=120),
    st.sampled_from(["../..", "/", ".", "..", "", "cpu", "CPU", "con", "NUL", "com1", "a/b", "nights", "jobs"]),
    st.lists(st.sampled_from(["NVIDIA", "H200", "h200", "A100-SXM4", " ", "-", "+", "Ti", "é"]), max_size=6).map(
        "".join
    ),
)


def of_gpu(name: str) -> str:
    return device_folder(make_record(engine={"device": "cuda:0"}, computed_by={"device": name}))


def words(name: str) -> list[str]:
    """By which two names are of one GPU: ASCII letters and digits, in any case, between spaces and dashes."""
    return re.split("[ -]", name.lower())


@given(NAMES)
def test_a_device_s_folder_stays_below_the_root(name):
    folder = of_gpu(name)
    assert "/" not in folder
    assert folder not in ("", ".", "..")
    key = approvals_key(JobName(folder, recipe_folder(name), "a"))
    assert check_key(key) == key
    assert key.count("/") == 4
    assert folder == folder.lower()
    assert len(folder) <= 80
    if name:
        assert folder != "cpu"


@given(NAMES, NAMES)
def test_two_gpus_have_two_folders(one, other):
    if words(one) != words(other):
        assert of_gpu(one) != of_gpu(other) or not (one and other)
    if one != other:
        assert recipe_folder(one) != recipe_folder(other) or words(one) == words(other)


def test_usual_devices_have_plain_folders():
    assert of_gpu("NVIDIA H200") == of_gpu("nvidia h200") == "nvidia-h200"
    assert of_gpu("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert of_gpu("NVIDIA GeForce RTX 4070 SUPER") == "nvidia-geforce-rtx-4070-super"
    assert of_gpu("Radeon RX 7900 (XTX)").startswith("radeon-rx-7900-xtx-")


@pytest.mark.parametrize(
    ("values", "folder"),
    [
        ({"engine": {"device": "cpu"}, "environment": {"gpus": ["NVIDIA H200"]}}, "cpu"),  # --device cpu beside a GPU
        ({"engine": {}, "computed_by": {"device": "Intel(R) Xeon(R) 8488C, AVX512, 8 threads"}}, "cpu"),
        (
            {"engine": {"device": "cuda"}, "computed_by": {"device": "NVIDIA L4"}, "environment": {"gpus": ["x"]}},
            "nvidia-l4",
        ),
        ({"engine": {"device": "cuda:1"}, "environment": {"gpus": ["NVIDIA H200", "NVIDIA H200"]}}, "nvidia-h200"),
        ({"engine": {"device": "cuda"}, "environment": {"gpus": []}}, "cuda"),
        ({"engine": {"device": "mps"}}, "mps"),
    ],
)
def test_the_device_of_a_record(values, folder):
    assert device_folder(make_record(**values)) == folder


def test_recipes_have_their_own_names():
    names = [*RECIPES, "fp4-distill+fp8+steps4"]
    assert [recipe_folder(name) for name in names] == names
    for odd in ("", "a/b", "../x", "+a", "a+", "x" * 200, "con"):
        assert recipe_folder(odd) != odd


def test_a_job_s_name_is_its_device_recipe_and_id():
    assert name_job(make_record("anna-samba")) == JobName("cpu", "fp4-distill", "anna-samba")
    with pytest.raises(ValueError, match="may hold only"):
        name_job(make_record("../a"))


def test_nights_sort_by_their_time():
    nights = [
        night_key("cpu", "bf16", moment, run)
        for moment, run in (
            ("2026-01-31T23:59:59.999+00:00", "b"),
            ("2026-02-01T01:00:00+00:00", "a"),
            ("2026-02-01T02:00:00", "../odd"),
            ("2026-02-01T01:00:00-05:00", "20260201T010000Z"),
        )
    ]
    assert nights == sorted(nights)
    assert nights[0] == "cpu/bf16/nights/20260131T235959Z.b.json"
    assert all(check_key(key) and key.startswith(nights_prefix("cpu", "bf16")) for key in nights)
    assert [is_night_of(key, "../odd") for key in nights] == [False, False, True, False]
    assert [is_night_of(key, "20260201T010000Z") for key in nights] == [False, False, False, True]
    with pytest.raises(ValueError, match="isoformat"):
        night_key("cpu", "bf16", "yesterday", "a")
