"""Chosen jobs: selects the jobs of a manifest for one process, by its flags and then by its shard.

In:   settings, the scheduler's environment. Out: the manifest, jobs, the shard. Never: storage, which jobs are done.
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
    """Return the whole manifest, this shard's jobs in manifest order, the shard, and the source of the shard.

    The shard is taken from the jobs that `only` and `limit` select. Raises ManifestInvalid, ConfigInvalid, storage.*.
    """
    manifest = read_manifest(settings.manifest)
    jobs = select_jobs(manifest.jobs, settings.only, settings.limit)
    shard, why = choose_shard(settings.shard, settings.shard_count, os.environ)
    return manifest, list(shard.take(jobs)), shard, why
