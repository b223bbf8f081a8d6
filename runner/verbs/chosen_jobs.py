"""Chosen jobs: which jobs of a manifest one process takes: those that its flags select, of these its shard's.

In:   settings, the scheduler's environment. Out: the manifest, jobs, the shard. Never: storage, what is done.
"""

from __future__ import annotations

import os

from runner.batch.shards import AnyShard, Shard, choose_shard
from runner.spec.manifest import Job, Manifest
from runner.verbs.selection import select_jobs
from runner.verbs.settings import PlanSettings, RunSettings
from runner.verbs.validate import read_manifest

__all__ = ["choose_jobs"]


def choose_jobs(settings: RunSettings | PlanSettings) -> tuple[Manifest, list[Job], Shard | AnyShard, str]:
    """The whole manifest, this shard's jobs in its order, the shard, and where the shard came from.

    The shard is cut from the jobs that `only` and `limit` leave. Raises ManifestInvalid, ConfigInvalid, storage.*.
    """
    manifest = read_manifest(settings.manifest)
    jobs = select_jobs(manifest.jobs, settings.only, settings.limit)
    shard, why = choose_shard(settings.shard, settings.shard_count, os.environ)
    return manifest, list(shard.take(jobs)), shard, why
