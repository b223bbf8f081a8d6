"""Output checks: what must hold of an output folder after a kill, after a fault and at the end, seen from outside.

In:   the files of an output by key, what finished runs made (`learn`), which jobs were finished before. Out: what is
wrong, in words. Never: the product's ledger; of the product only the record's schema is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Finished", "JobState", "Problem", "check_end", "check_meanwhile", "hidden_files", "learn", "look"]

MP4 = "output.mp4"
PREVIEWS = ("pose.mp4", "poster.jpg", "frames.sha256", "people.json")


class Problem(NamedTuple):
    """`kind` is what tables count: `wrong frames`, `output removed`, `record`, `job lost`, `left over`, …"""

    kind: str
    what: str


@dataclass(frozen=True)
class Finished:
    """What one job's run leaves when nothing disturbs it. Digests by name: `output.mp4`, or `000000.png`, …"""

    job: str
    output: Mapping[str, str]
    previews: Mapping[str, str]
    frames_sha256: str


@dataclass(frozen=True)
class JobState:
    """One job's folder. `outputs`: fingerprints of the runs whose output lies there whole, recorded or not."""

    record: Mapping[str, Any] | None
    outputs: frozenset[str]
    problems: tuple[Problem, ...]

    @property
    def done(self) -> str | None:
        """The fingerprint of a record of success that is right in every part; else None."""
        if self.record is None or self.problems or self.record["status"] != "succeeded":
            return None
        return str(self.record["fingerprint"])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def learn(files: Mapping[str, bytes]) -> dict[str, Finished]:
    """By fingerprint: what an undisturbed run left."""
    found = {}
    for key, data in files.items():
        if key.startswith("jobs/") and key.endswith("/result.json"):
            record, folder = json.loads(data), key.removesuffix("result.json")
            assert record["status"] == "succeeded", record
            found[record["fingerprint"]] = Finished(
                record["job_id"],
                {name: sha256(data) for name, data in _output(files, record["output"]["key"]).items()},
                {name: sha256(files[folder + name]) for name in PREVIEWS if folder + name in files},
                record["output"]["frames_sha256"],
            )
    return found


def look(files: Mapping[str, bytes], job: str, finished: Mapping[str, Finished]) -> JobState:
    """One job's folder as it is now."""
    data = files.get(f"jobs/{job}/result.json")
    record: dict[str, Any] | None = None
    problems: list[Problem] = []
    if data is not None:
        try:
            record = json.loads(data)
        except ValueError:
            problems.append(Problem("record", "its record is torn"))
        if record is not None and (wrong := next(_validator().iter_errors(record), None)):
            problems.append(Problem("record", f"its record breaks the schema: {wrong.message}"))
            record = None
    if record is not None and record["status"] == "succeeded":
        problems += _wrong_in(record, job, files, finished)
    return JobState(record, _whole_outputs(files, job, finished), tuple(problems))


def _wrong_in(
    record: Mapping[str, Any], job: str, files: Mapping[str, bytes], finished: Mapping[str, Finished]
) -> list[Problem]:
    """What a record of success says and is not so."""
    made, output = finished.get(record["fingerprint"]), record["output"]
    if made is None or made.job != job or record["job_id"] != job:
        return [Problem("record", "its record has the fingerprint of no run of it")]
    if output is None:
        return [Problem("record", "its record of success names no output")]
    there = _output(files, output["key"])
    problems = []
    if output["frames_sha256"] != made.frames_sha256:
        problems.append(Problem("wrong frames", "frames_sha256 is not that of an undisturbed run"))
    if {name: sha256(data) for name, data in there.items()} != dict(made.output):
        what = "the output of another run" if _whole_outputs(files, job, finished) else "other bytes or none"
        problems.append(Problem("wrong frames", f"its record stands beside {what}"))
    elif (output["files"], output["bytes"]) != (len(there), sum(map(len, there.values()))):
        problems.append(Problem("record", "its record tells another number or size of files"))
    if MP4 in there:
        problems += _wrong_identity(output, there[MP4])
    return problems


def _wrong_identity(output: Mapping[str, Any], data: bytes) -> list[Problem]:
    kind, _, value = output["identity"].partition(":")
    wanted = {"sha256": sha256(data), "etag": f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}:{len(data)}"}
    problems = []
    if value != wanted.get(kind):
        problems.append(Problem("record", "its record has an identity that its output has not"))
    if output["sha256"] != sha256(data):
        problems.append(Problem("record", "its record has a sha256 that its output has not"))
    return problems


def _output(files: Mapping[str, bytes], key: str) -> dict[str, bytes]:
    """The files of the output under `key`, by name; a key that ends with `/` is a folder of frames."""
    if key.endswith("/"):
        within = {name.removeprefix(key): data for name, data in files.items() if name.startswith(key)}
        return {name: data for name, data in within.items() if not _is_hidden(name)}
    return {key.rpartition("/")[2]: files[key]} if key in files else {}


def _whole_outputs(files: Mapping[str, bytes], job: str, finished: Mapping[str, Finished]) -> frozenset[str]:
    """An output is whole where its files lie beside each other, whatever else lies there."""
    folders: dict[str, dict[str, str]] = {}
    for key, data in files.items():
        if key.startswith(f"jobs/{job}/"):
            folder, _, name = key.rpartition("/")
            folders.setdefault(folder, {})[name] = sha256(data)
    return frozenset(
        fingerprint
        for fingerprint, made in finished.items()
        if made.job == job and any(made.output.items() <= names.items() for names in folders.values())
    )


def check_meanwhile(
    state: JobState, older: str | None, target: str, *, may_lack_record: bool, may_have_failed: bool
) -> list[Problem]:
    """What is wrong with a job whose run ended before its time. `older`: the fingerprint that was done before it.

    `may_lack_record`: the run was publishing, when an older record is already removed and no new one written.
    `may_have_failed`: the run lived on and may have recorded its failure, where no older output lies.
    """
    problems = list(state.problems)
    status = None if state.record is None else state.record["status"]
    if status == "failed" and not may_have_failed:
        problems.append(Problem("called failed", f"its record: {(state.record or {}).get('error')}"))
    if older is None:
        return problems
    if not state.outputs & {older, target}:
        problems.append(Problem("output removed", "a good older output was removed or broken"))
    if older in state.outputs:  # once it is replaced, its record may go, and the run may fail before the next one
        if status is None and not may_lack_record and not state.problems:
            problems.append(Problem("record", "the record of a good older output was removed"))
        if status == "failed":
            problems.append(Problem("record", "the record of a good older output was replaced by that of a failure"))
    if status == "succeeded" and state.record and state.record["fingerprint"] not in (older, target):
        problems.append(Problem("record", "its record is of a run that was never asked for"))
    return problems


def check_end(
    files: Mapping[str, bytes], targets: Mapping[str, str], finished: Mapping[str, Finished]
) -> list[Problem]:
    """What is wrong at the end, when every job must be done with the fingerprint that `targets` names for it."""
    problems = []
    for job, target in targets.items():
        state = look(files, job, finished)
        if state.done != target:
            status = state.record and (state.record["status"], state.record.get("error"))
            problems.append(Problem("job lost", f"{job} is not done at the end: {state.problems or status}"))
            continue
        assert state.record is not None
        key = state.record["output"]["key"]
        wanted = {f"jobs/{job}/result.json": None} | {
            f"jobs/{job}/{n}": d for n, d in finished[target].previews.items()
        }
        wanted |= {key + name if key.endswith("/") else key: digest for name, digest in finished[target].output.items()}
        there = {k for k in files if k.startswith(f"jobs/{job}/")}
        if there != wanted.keys():
            more, less = sorted(there - wanted.keys()), sorted(wanted.keys() - there)
            problems.append(Problem("left over", f"{job}: left over {more}, missing {less}"))
        other = [k for k, digest in wanted.items() if digest is not None and k in files and sha256(files[k]) != digest]
        if other:
            problems.append(Problem("wrong frames", f"{job}: other bytes in {other}"))
    strange = {k.split("/")[1] for k in files if k.startswith("jobs/") and not _is_hidden(k)} - targets.keys()
    if strange:
        problems.append(Problem("left over", f"folders of no job: {sorted(strange)}"))
    return problems


def hidden_files(files: Mapping[str, bytes]) -> list[str]:
    """Keys of staged files and probes, which a kill may leave."""
    return [key for key in files if _is_hidden(key)]


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


@functools.cache
def _validator() -> Any:
    import jsonschema

    from runner.records.record import schemas

    return jsonschema.Draft202012Validator(schemas()["result.v1.schema.json"])
