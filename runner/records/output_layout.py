"""Output layout: the key of everything that a run writes to its output storage.

In:   ids of jobs, runs and shards. Out: keys, and what a key names. Never: reading or writing.

    jobs/<id>/result.json                  the record, written last
    jobs/<id>/attempt.json                 the mark of an attempt under way
    jobs/<id>/output.mp4                   the output, or its frames: jobs/<id>/frames/<token>/000000.png, …
    jobs/<id>/frames/<token>/audio.wav     their sound, where it was asked for and there is some
    jobs/<id>/pose.mp4, poster.jpg         previews
    jobs/<id>/parts/<chain>/0001.tar, …    the finished segments of a job that is under way, and 0001.state after each
    jobs/<id>/frames.sha256                the digest of each frame, one a line
    jobs/<id>/people.json                  where the people are, frame by frame; not of jobs with official files
    runs/<run-id>/<shard>.summary.json     and .metrics.prom, .events.jsonl
    runs/<run-id>/manifest.jsonl           of a run that was submitted: the manifest that all its tasks read
    runs/<run-id>/jobs.json                the jobs of its manifest
    runs/<run-id>/regression.json          how far its jobs may be from their baseline, where the manifest says so
    runs/<run-id>/report.html, .json       what `report` has written

A new name is one line here. A file of a job that goes when its output goes belongs into OUTPUT_FILES as well.
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
    """With a slash at the end: also the prefix of all keys of the job."""
    return f"{JOBS}{job_id}/"


def job_key(job_id: str, name: str) -> str:
    """`name`: RESULT, OUTPUT, …"""
    return job_folder(job_id) + name


def frames_folder(job_id: str, token: str) -> str:
    """Where one attempt puts its frames, with a slash at the end; `token` tells the attempts apart."""
    return f"{job_folder(job_id)}{FRAMES}{token}/"


def is_frame(key: str) -> bool:
    """Is an object in a folder of frames one of them? The sound that lies beside them is not."""
    return key.endswith(".png")


def split_job_key(key: str) -> tuple[str, str] | None:
    """(job id, name below the job's folder) of a key; None for what does not lie in the folder of a job."""
    job_id, slash, name = key.removeprefix(JOBS).partition("/")
    return (job_id, name) if key.startswith(JOBS) and slash else None


def is_output_file(name: str) -> bool:
    """Does a file of this name below a job's folder belong to an output? Records and marks do not."""
    return name in OUTPUT_FILES or name.startswith(FRAMES)


def parts_folder(job_id: str, chain: str = "") -> str:
    """Where finished segments are kept, with a slash at the end; `chain` tells apart those that cannot be continued
    with each other."""
    return f"{job_folder(job_id)}{PARTS}" + (f"{chain}/" if chain else "")


def part_name(segments: int) -> str:
    """Of the part that is the last of `segments`, below its folder."""
    return f"{segments:04d}{PART_END}"


def state_name(segments: int) -> str:
    """Of the state after `segments` segments, below its folder."""
    return f"{segments:04d}{STATE_END}"


def segments_of_state(name: str) -> int | None:
    """How many segments are finished in a state of this name; None for another file."""
    digits = name.removesuffix(STATE_END)
    return int(digits) if name.endswith(STATE_END) and digits.isdecimal() and digits.isascii() else None


def is_part(name: str) -> bool:
    """Does a file of this name below a job's folder belong to its finished segments?"""
    return name.startswith(PARTS)


def run_folder(run_id: str) -> str:
    """With a slash at the end."""
    return f"{RUNS}{run_id}/"


def run_key(run_id: str, shard: str, name: str) -> str:
    """`name`: SUMMARY, METRICS or EVENTS."""
    return f"{run_folder(run_id)}{shard}.{name}"


def run_file_key(run_id: str, name: str) -> str:
    """`name`: MANIFEST, RUN_JOBS, REGRESSION, REPORT_HTML or REPORT_JSON."""
    return run_folder(run_id) + name


def split_run_key(key: str) -> tuple[str, str] | None:
    """(run id, name below the run's folder) of a key; None for what does not lie in the folder of a run."""
    run_id, slash, name = key.removeprefix(RUNS).partition("/")
    return (run_id, name) if key.startswith(RUNS) and slash else None


def shard_of_summary(name: str) -> str | None:
    """The shard whose summary has this name below the run's folder; None for another file."""
    shard = name.removesuffix(f".{SUMMARY}")
    return shard if shard != name and "/" not in name else None
