"""Shards: the schedulers' environments as their manuals document them, and the partition as a property."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.batch.shards import AnyShard, Shard, choose_shard, run_id_from_env
from runner.errors import ConfigInvalid


def slurm(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    names = {"ID": task, "COUNT": count, "MIN": first, "MAX": first + step * (count - 1), "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("text", "count", "env", "expected", "reason"),
    [
        (None, None, {}, Shard(0, 1), "all jobs"),
        (None, 1, {}, Shard(0, 1), "all jobs"),
        ("2/5", None, {}, Shard(2, 5), "--shard 2/5"),
        ("2/5", 5, {}, Shard(2, 5), "--shard 2/5"),
        ("0/1", None, {"JOB_COMPLETION_INDEX": "7"}, Shard(0, 1), "--shard 0/1"),  # the flag goes over the environment
        (None, None, {"AWS_BATCH_JOB_ARRAY_INDEX": "3", "AWS_BATCH_JOB_ARRAY_SIZE": "10"}, Shard(3, 10), "AWS Batch"),
        (None, 10, {"AWS_BATCH_JOB_ARRAY_INDEX": "3"}, Shard(3, 10), "--shard-count 10"),
        (None, 4, {"JOB_COMPLETION_INDEX": "0"}, Shard(0, 4), "Kubernetes"),
        (None, None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"}, Shard(1, 2), "GCP Batch"),
        (None, None, slurm(0, 4), Shard(0, 4), "Slurm"),
        (None, None, slurm(4, 4, first=1), Shard(3, 4), "SLURM_ARRAY_TASK_ID=4"),  # --array=1-4
        (None, None, slurm(7, 5, first=1, step=2), Shard(3, 5), "Slurm"),  # --array=1-9:2
        (None, None, {"AWS_BATCH_JOB_ARRAY_INDEX": "", "SLURM_ARRAY_TASK_ID": ""}, Shard(0, 1), "all jobs"),
        # two voices that agree
        (None, 3, {"JOB_COMPLETION_INDEX": "2", "BATCH_TASK_INDEX": "2", "BATCH_TASK_COUNT": "3"}, Shard(2, 3), ""),
    ],
)
def test_who_says_which_shard(text, count, env, expected, reason):
    shard, why = choose_shard(text, count, env)
    assert shard == expected
    assert reason in why


@pytest.mark.parametrize(
    ("text", "count", "env", "message"),
    [
        ("4/4", None, {}, "0/4 to 3/4"),
        ("0/0", None, {}, "0 shards"),
        ("1-4", None, {}, "not I/N"),
        ("-1/4", None, {}, "not I/N"),
        ("1/4/2", None, {}, "not I/N"),
        ("anyone", None, {}, "not I/N"),
        ("any", 4, {}, "contradict"),
        ("١/٤", None, {}, "not I/N"),
        ("1/4", 5, {}, "contradict"),
        (None, 0, {}, "--shard-count 0"),
        (None, 4, {}, "--shard I/4"),
        (None, None, {"JOB_COMPLETION_INDEX": "2"}, "--shard-count N"),
        (None, 2, {"JOB_COMPLETION_INDEX": "2"}, "does not exist"),
        (None, 4, {"JOB_COMPLETION_INDEX": "two"}, "JOB_COMPLETION_INDEX='two'"),
        (None, 4, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"}, "--shard 1/4"),
        (None, None, {"AWS_BATCH_JOB_ARRAY_INDEX": "9", "AWS_BATCH_JOB_ARRAY_SIZE": "9"}, "does not exist"),
        (None, None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"} | slurm(0, 2), "two array jobs"),
        (None, None, slurm(9, 3, first=1), "without gaps"),  # --array=1,3,9 would make task 9 share 8 of 3
        (None, None, slurm(2, 5, first=1, step=2), "without gaps"),
        (None, None, slurm(0, 5, first=1), "without gaps"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_shard_is_refused(text, count, env, message):
    with pytest.raises(ConfigInvalid) as caught:
        choose_shard(text, count, env)
    assert message in str(caught.value)
    assert caught.value.todo
    assert caught.value.exit_code == 2


@given(st.lists(st.integers()), st.integers(1, 40))
def test_shards_partition_the_jobs(jobs, count):
    numbered = list(enumerate(jobs))
    shares = [Shard(index, count).take(numbered) for index in range(count)]
    assert sorted(job for share in shares for job in share) == numbered
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share) for share in shares)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_shard_is_found_by_its_name(index, more):
    shard = Shard(index, index + more)
    assert Shard.named(shard.name) == shard


@pytest.mark.parametrize("name", ["", "gpu-a-7", "1-of-2-of-3", "2-of-2", "0-of-0", "-1-of-2", "a-of-b"])
def test_other_names_are_no_share_s(name):
    assert Shard.named(name) is None


@given(st.integers(1, 30), st.integers(0, 50), st.integers(1, 9))
def test_every_slurm_array_covers_every_shard_once(count, first, step):
    tasks = range(first, first + count * step, step)
    shards = [choose_shard(None, None, slurm(task, count, first, step))[0] for task in tasks]
    assert shards == [Shard(index, count) for index in range(count)]


def test_names_for_files_and_flags():
    assert Shard(3, 10).name == "00003-of-00010"
    assert choose_shard(str(Shard(3, 10)), None, {})[0] == Shard(3, 10)


def test_any_is_this_process_and_goes_over_the_environment():
    shard, why = choose_shard("any", None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"})
    assert shard == AnyShard(f"{socket.gethostname()}-{os.getpid()}")
    assert (str(shard), why) == ("any", "--shard any")


@given(st.lists(st.integers()), st.text(min_size=1))
def test_any_takes_all_jobs_from_a_place_of_its_own_on(jobs, runner):
    numbered = list(enumerate(jobs))
    shard = AnyShard(runner)
    assert shard.take(numbered) == numbered
    order = shard.arrange(numbered)
    first = order[0][0] if order else 0
    assert order == numbered[first:] + numbered[:first]
    assert shard.arrange(numbered) == order


def test_runners_begin_at_different_places():
    """Of 64 processes of one host over 1000 jobs; the same ones in every process, whatever its hash seed."""
    firsts = [AnyShard(f"node-{pid}").arrange(range(1000))[0] for pid in range(4000, 4064)]
    assert len(set(firsts)) > 56
    assert firsts[:3] == [247, 332, 760]


@pytest.mark.parametrize(
    ("runner", "name"),
    [
        ("node-7-4711", "node-7-4711"),
        ("gpu.example.org-1", "gpu.example.org-1"),
        ("a/../b c-23", "a-..-b-c-23"),
        ("贝拉-5", "host-5"),
        ("n" * 200 + "-5", "n" * 64 + "-5"),
    ],
)
def test_the_name_of_any_is_a_file_s(runner, name):
    assert AnyShard(runner).name == name


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"AWS_BATCH_JOB_ID": "5a4e-11:17"}, "5a4e-11"),
        ({"AWS_BATCH_JOB_ID": "5a4e-11"}, "5a4e-11"),
        ({"SLURM_ARRAY_JOB_ID": "991", "SLURM_JOB_ID": "995"}, "991"),
        ({"BATCH_JOB_UID": "j-3f2b"}, "j-3f2b"),
        ({"JOB_NAME": "nightly/renders"}, "nightly-renders"),
        ({"JOB_NAME": "../.."}, None),
        ({"JOB_NAME": "", "AWS_BATCH_JOB_ID": ""}, None),
    ],
)
def test_run_id_is_what_all_shards_share(env, expected):
    assert run_id_from_env(env) == expected
