"""Job names: names of a run's job and its report's job, for platforms that allow each name once.

In:   a `Submission`. Out: two names, the same ones for the same run. Never: requests to a platform.
"""

from __future__ import annotations

import hashlib
import re

from runner.errors import ConfigInvalid
from runner.launch.submission import Submission

__all__ = ["job_names"]

LONGEST = 63  # Kubernetes: a DNS label (RFC 1123), because a Job's name is part of pods' host names; GCP Batch: same
REPORT = "-report"
_NAME = re.compile(r"[a-z](?:[-a-z0-9]*[a-z0-9])?")


def job_names(submission: Submission) -> tuple[str, str]:
    """Return the names of the run's job and of the report's job: the submission's name and a digest of its run id.

    Raises ConfigInvalid for a name that is too long or has characters that Kubernetes and GCP Batch do not allow.
    """
    name = submission.name
    digest = hashlib.sha256(submission.run_id.encode()).hexdigest()[:8]
    longest = LONGEST - len(f"-{digest}{REPORT}")
    if len(name) > longest or not _NAME.fullmatch(name):
        raise ConfigInvalid(
            f"{name!r} cannot be the name of a job: it must have 1 to {longest} of the characters a-z, 0-9 and -, "
            "begin with a letter and not end with -",
            where="--name",
            todo="Give another name, e.g. --name night-renders",
        )
    return f"{name}-{digest}", f"{name}-{digest}{REPORT}"
