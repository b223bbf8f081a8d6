"""Output layout: the keys of all objects that a run writes to its output storage.

In:   ids of jobs, runs and shards. Out: keys, and the parts of a key. Never: reading or writing.

    jobs/<id>/result.json                  the record, written last
    jobs/<id>/attempt.json                 the mark of an attempt under way
    jobs/<id>/output.mp4                   the output, or its frames: jobs/<id>/frames/<token>/000000.png, …
    jobs/<id>/frames/<token>/audio.wav     their sound, if the job keeps it and there is some
    jobs/<id>/pose.mp4, poster.jpg         previews
    jobs/<id>/parts/<chain>/0001.tar, …    the finished segments of a job that is under way, and 0001.state after each
    jobs/<id>/frames.sha256                the digest of each frame, one a line
    jobs/<id>/people.json                  boxes of the people in each frame; not for jobs with official files
    runs/<run-id>/<shard>.summary.json     and .metrics.prom, .events.jsonl
    runs/<run-id>/manifest.jsonl           only of a submitted run: the manifest that all its tasks read
    runs/<run-id>/jobs.json                the jobs of its manifest
    runs/<run-id>/regression.json          how far its jobs may differ from their baseline, if the manifest sets limits
    runs/<run-id>/report.html, .json       written by the verb `report`

To add a name, add a line here. A file that is removed together with the job's output must be in OUTPUT_FILES too.
"""

from __future__ import annotations

__all__ = [
    "ATTEMPT",
    "AUDIO",
    "EVENTS",
    "FRAMES",
    "FRAME_DIGESTS",
    "JOBS",
    "KEPT",
    "MANIFEST",
    "METRICS",
    "OUTPUT",
    "PEOPLE",
    "POSE",
    "POSTER",
    "PREVIEWS",
    "REGRESSION",
    "REPORT_HTML",
    "REPORT_JSON",
    "RESULT",
    "RUNS",
    "RUN_JOBS",
    "SUMMARY",
    "frames_folder",
    "is_frame",
    "is_output_file",
    "is_part",
    "job_folder",
    "job_key",
    "part_name",
    "parts_folder",
    "run_file_key",
    "run_folder",
    "run_key",
    "segments_of_state",
    "shard_of_summary",
    "split_job_key",
    "split_run_key",
    "state_name",
]

JOBS, RUNS = "jobs/", "runs/"

# Of a job, below its folder
RESULT = "result.json"
ATTEMPT = "attempt.json"
OUTPUT = "output.mp4"
FRAMES = "frames/"
AUDIO = "audio.wav"  # in the folder of the frames
POSE = "pose.mp4"
POSTER = "poster.jpg"
FRAME_DIGESTS = "frames.sha256"
PEOPLE = "people.json"

PREVIEWS = (POSE, POSTER)
KEPT = (*PREVIEWS, FRAME_DIGESTS, PEOPLE)  # of an output of either form
OUTPUT_FILES = (OUTPUT, *KEPT)
PARTS = "parts/"
PART_END, STATE_END = ".tar", ".state"

# Of a shard of a run, after its name and a dot
SUMMARY = "summary.json"
METRICS = "metrics.prom"
EVENTS = "events.jsonl"

# Of a run, whatever its shards
MANIFEST = "manifest.jsonl"
RUN_JOBS = "jobs.json"
REGRESSION = "regression.json"
REPORT_HTML, REPORT_JSON = "report.html", "report.json"


def job_folder(job_id: str) -> str:
    """Return the job's folder with a slash at the end. It is the prefix of all keys of the job."""
    return f"{JOBS}{job_id}/"


def job_key(job_id: str, name: str) -> str:
    """Return the key of a job's file. `name`: RESULT, OUTPUT, …"""
    return job_folder(job_id) + name


def frames_folder(job_id: str, token: str) -> str:
    """Return the folder of one attempt's frames, with a slash at the end. `token`: different for each attempt."""
    return f"{job_folder(job_id)}{FRAMES}{token}/"


def is_frame(key: str) -> bool:
    """Return whether an object in a folder of frames is a frame, and not their sound."""
    return key.endswith(".png")


def split_job_key(key: str) -> tuple[str, str] | None:
    """Return (job id, name below the job's folder) of a key; None if it is not in a job's folder."""
    job_id, slash, name = key.removeprefix(JOBS).partition("/")
    return (job_id, name) if key.startswith(JOBS) and slash else None


def is_output_file(name: str) -> bool:
    """Return whether a file of this name in a job's folder belongs to an output. Records and marks do not."""
    return name in OUTPUT_FILES or name.startswith(FRAMES)


def parts_folder(job_id: str, chain: str = "") -> str:
    """Return the folder of finished segments, with a slash at the end.

    `chain`: the name of segments that can be continued together; "": all chains.
    """
    return f"{job_folder(job_id)}{PARTS}" + (f"{chain}/" if chain else "")


def part_name(segments: int) -> str:
    """Return the name of the part of segment number `segments` (from 1) in its folder."""
    return f"{segments:04d}{PART_END}"


def state_name(segments: int) -> str:
    """Return the name of the state after `segments` segments in its folder."""
    return f"{segments:04d}{STATE_END}"


def segments_of_state(name: str) -> int | None:
    """Return how many segments are finished in a state of this name; None for another file."""
    digits = name.removesuffix(STATE_END)
    return int(digits) if name.endswith(STATE_END) and digits.isdecimal() and digits.isascii() else None


def is_part(name: str) -> bool:
    """Return whether a file of this name in a job's folder belongs to its finished segments."""
    return name.startswith(PARTS)


def run_folder(run_id: str) -> str:
    """Return the run's folder with a slash at the end."""
    return f"{RUNS}{run_id}/"


def run_key(run_id: str, shard: str, name: str) -> str:
    """Return the key of a shard's file. `name`: SUMMARY, METRICS or EVENTS."""
    return f"{run_folder(run_id)}{shard}.{name}"


def run_file_key(run_id: str, name: str) -> str:
    """Return the key of a run's file. `name`: MANIFEST, RUN_JOBS, REGRESSION, REPORT_HTML or REPORT_JSON."""
    return run_folder(run_id) + name


def split_run_key(key: str) -> tuple[str, str] | None:
    """Return (run id, name below the run's folder) of a key; None if it is not in a run's folder."""
    run_id, slash, name = key.removeprefix(RUNS).partition("/")
    return (run_id, name) if key.startswith(RUNS) and slash else None


def shard_of_summary(name: str) -> str | None:
    """Return the shard whose summary has this name in the run's folder; None for another file."""
    shard = name.removesuffix(f".{SUMMARY}")
    return shard if shard != name and "/" not in name else None
