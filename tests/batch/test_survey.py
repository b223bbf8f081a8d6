from __future__ import annotations

import threading

import pytest

from runner.batch.ledger import Decision
from runner.batch.survey import AHEAD, AT_ONCE, LIST_FROM, decide_jobs, survey_jobs
from runner.errors import StorageDenied
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import ObjectInfo, open_storage

DONE = Decision("skip", "done")


def jobs(count: int) -> list[Job]:
    return [Job(f"j{n}", "r", "v", None, "p", JobOptions(), None) for n in range(count)]


def test_decisions_come_in_the_order_of_the_jobs_and_only_skips_are_final(tmp_path):
    def decide(job, listing):
        number = int(job.id[1:])
        if number % 5 == 1:
            raise StorageDenied("no")
        return [
            DONE,
            None,
            Decision("run", "new"),
            Decision("exhausted", "3 attempts"),
            Decision("skip", "done", suspect=True),
        ][number % 5]

    found = list(survey_jobs(jobs(1000), open_storage(tmp_path), decide))
    assert [n for n, decision in enumerate(found) if decision is not None] == list(range(0, 1000, 5))


def test_an_error_stands_in_the_place_of_its_job(tmp_path):
    def decide(job, listing):
        if job.id == "j1":
            raise StorageDenied("no")
        if job.id == "j2":
            raise ValueError("a bug")
        return Decision("run", "new")

    first, second, third = decide_jobs(jobs(3), open_storage(tmp_path), decide)
    assert first == Decision("run", "new")
    assert (second.code, third.code) == ("storage.denied", "internal")
    assert third.where == "j2"


def test_many_are_asked_at_once_and_few_wait_to_be_read(tmp_path):
    asked, lock, together = [], threading.Lock(), threading.Barrier(AT_ONCE)

    def decide(job, listing):
        with lock:
            asked.append(job.id)
            number = len(asked)
        if number <= AT_ONCE:
            together.wait(10)  # breaks unless that many are under way
        return DONE

    survey = survey_jobs(jobs(5000), open_storage(tmp_path), decide)
    assert next(survey) == DONE
    survey.close()
    assert len(asked) <= AHEAD + 1 + AT_ONCE


class Bucket:
    """Of a store in a bucket, what a survey uses."""

    root = "s3://bucket/out"
    lists_identities = True

    def __init__(self, keys, error=None):
        self.keys, self.error, self.listed = keys, error, 0

    def list(self, prefix):
        self.listed += 1
        if self.error:
            raise self.error
        return (ObjectInfo(f"{self.root}/{key}", 1, "etag:1:1", 0.0, key) for key in self.keys)


def test_a_bucket_is_listed_once_for_outputs_and_marks_of_these_jobs():
    bucket = Bucket(["jobs/j1/output.mp4", "jobs/j1/frames/0a/000000.png", "jobs/other/result.json", "jobs/stray"])
    seen = []
    list(survey_jobs(jobs(LIST_FROM), bucket, lambda job, listing: seen.append(listing) or DONE))
    assert bucket.listed == 1
    assert all(set(listing) == {"jobs/j1/output.mp4"} for listing in seen)


@pytest.mark.parametrize(("count", "error"), [(LIST_FROM - 1, None), (LIST_FROM, StorageDenied("no list"))])
def test_without_a_list_each_job_is_asked_for(count, error):
    bucket, seen = Bucket([], error), []
    list(survey_jobs(jobs(count), bucket, lambda job, listing: seen.append(listing) or DONE))
    assert seen == [None] * count
