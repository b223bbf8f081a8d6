"""The loop when two run at once, a store fails or a device dies: nothing wrong is done, nothing good is removed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from runner.batch.delivery import Delivery
from runner.batch.ledger import Ledger
from runner.batch.loop import FRAME_BUFFER_ITEMS, Engine
from runner.batch.survey import make_surveyor, survey_jobs
from runner.errors import JobWeightsMissing, StorageDenied, StorageFull, StorageUnavailable
from runner.records.record import AttemptMark
from runner.spec.manifest import Job
from runner.storage import LocalStorage, open_storage
from runner.storage.file_hashes import FileHashes
from runner.verbs.status import read_run_status
from tests.batch.loop_bench import SIGTERM, Bench, bench
from tests.stub_generator import StubGenerator

__all__ = ["bench"]  # the fixture


def interrupted(storage):
    """`storage`, which calls its `then` once, right after an output was stored under its key."""

    class Interrupted(type(storage)):
        then = None

        def publish(self, local, key, **conditions):
            info = super().publish(local, key, **conditions)
            if self.then is not None and key.endswith("output.mp4"):
                then, self.then = self.then, None
                then()
            return info

    return Interrupted(storage.root)


@pytest.mark.parametrize("where", ["disk", pytest.param("S3", marks=pytest.mark.s3)])
def test_output_replaced_before_record_is_written_is_rendered_again(bench, tmp_path, request, where):
    """Two runners have different seeds. The first is stopped past its lease between its upload and its record."""
    other = Bench(tmp_path / "other")
    if where == "S3":
        server = request.getfixturevalue("moto_s3")
        request.getfixturevalue("aws_env")(server)
        bench.out = open_storage(f"s3://{server.make_bucket()}/out")
    other.out = bench.out
    reference = Bench(tmp_path / "reference")
    reference.run(reference.job("a", seed=1), reference.job("b", seed=2))
    storage = interrupted(bench.out)
    seen = []

    def then() -> None:
        assert other.run(other.job("a", seed=2), run_id="other") == 0
        seen.append(bench.result("a"))

    storage.then = then
    assert bench.run(bench.job("a", seed=1), storage=storage, lease_s=0) == 0
    assert seen[0]["run_id"] == "other"
    assert seen[0]["output"]["frames_sha256"] == reference.result("b")["output"]["frames_sha256"]
    assert "lease_lost" in [event["event"] for event in bench.events]
    assert bench.result("a")["reason"] == "options.seed: 2 → 1", "it was rendered again, over the record that stood"
    assert bench.result("a")["output"]["frames_sha256"] == reference.result("a")["output"]["frames_sha256"]
    assert bench.run(bench.job("a", seed=1), run_id="r2") == 0
    assert bench.summary["jobs"][0]["reason"] == "done"


class Swapping(LocalStorage):
    """Another runner stores other bytes under the key of an output right after each upload."""

    def publish(self, local, key, **conditions):
        info = super().publish(local, key, **conditions)
        if key.endswith("output.mp4"):
            super().write_bytes(key, b"of another seed")
        return info


def test_output_identity_is_that_of_uploaded_bytes(bench):
    assert bench.run(bench.job("a"), storage=Swapping(bench.folder / "out")) == 0
    output = bench.result("a")["output"]
    assert output["identity"] == f"sha256:{output['sha256']}"
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert bench.summary["jobs"][0]["reason"] == "the output is not what the record says: jobs/a/output.mp4"
    path = bench.folder / "out/jobs/a/output.mp4"
    assert bench.result("a")["output"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert bench.result("a")["output"]["bytes"] == path.stat().st_size


class StuckMark(LocalStorage):
    def delete(self, key, **conditions):
        if key.endswith("attempt.json"):
            raise StorageUnavailable("the mark cannot be removed", where=key)
        return super().delete(key, **conditions)


def test_job_whose_mark_cannot_be_removed_succeeds(bench):
    for run in range(4):
        assert bench.run(bench.job("a"), run_id=f"r{run}", storage=StuckMark(bench.folder / "out"), lease_s=0) == 0
        assert bench.summary["jobs"][0]["status"] == ("succeeded" if run == 0 else "skipped")
        assert {"output.mp4", "result.json"} <= bench.files("a")
    assert "mark_not_removed" in [event["event"] for event in bench.events]
    assert bench.generator.tries == {"ok": 1}
    assert bench.run(bench.job("a"), run_id="last") == 0
    assert "attempt.json" not in bench.files("a")


class AwayAt(LocalStorage):
    """Fails the publication of keys that end with `name`, after what `publish` of a real store may have done before."""

    def __init__(self, root, name, error=StorageUnavailable):
        super().__init__(root)
        self.name, self.error, self.failed = name, error, 0

    def publish(self, local, key, **conditions):
        if key.endswith(self.name):
            self.failed += 1
            raise self.error("the store is away", where=key)
        return super().publish(local, key, **conditions)


def snapshot(bench, name) -> dict[str, bytes]:
    root = bench.folder / "out/jobs" / name
    return {key: (root / key).read_bytes() for key in bench.files(name, parts=False) if key != "attempt.json"}


@pytest.mark.parametrize(("form", "name"), [("mp4", "output.mp4"), ("png", "000003.png")])
@pytest.mark.parametrize(("error", "code"), [(StorageUnavailable, 3), (StorageDenied, 1), (StorageFull, 3)])
def test_failed_publication_keeps_older_output_and_record(bench, form, name, error, code):
    output = {"format": form}
    bench.run(bench.job("a", seed=41, output=output))
    before = snapshot(bench, "a")
    away = AwayAt(bench.folder / "out", name, error)
    assert bench.run(bench.job("a", seed=42, output=output), run_id="r2", storage=away) == code
    assert away.failed >= 1
    assert before.items() <= snapshot(bench, "a").items()
    assert bench.result("a") == json.loads(before["result.json"])
    (row,) = read_run_status(bench.out).rows
    assert (row.status, "an older output is kept" in row.reason) == ("failed", True)
    assert bench.run(bench.job("a", seed=41, output=output), run_id="r3") == 0
    assert bench.summary["jobs"][0]["reason"] == "done"
    assert bench.run(bench.job("a", seed=42, output=output), run_id="r4") == 0
    assert bench.summary["jobs"][0]["status"] == "succeeded"
    folders = {Path(key).parent for key in bench.files("a") if key.startswith("frames/")}
    assert len(folders) == (form == "png"), "what the failed publication left is gone, and so is the older output"


@pytest.mark.parametrize("prompt", ["oom", "fail-generate"])
def test_forced_run_that_fails_keeps_valid_output(bench, prompt, monkeypatch):
    bench.run(bench.job("a", "ok"))
    before = snapshot(bench, "a")
    generate = StubGenerator.generate

    def failing(self, conditions, *more):
        conditions.request = replace(conditions.request, prompt=prompt)
        return generate(self, conditions, *more)

    monkeypatch.setattr(StubGenerator, "generate", failing)
    assert bench.run(bench.job("a", "ok"), run_id="r2", force=True) == 1
    assert snapshot(bench, "a") == before
    monkeypatch.undo()
    assert bench.run(bench.job("a", "ok"), run_id="r3") == 0
    assert bench.summary["jobs"][0]["reason"] == "done"
    assert "attempt.json" not in bench.files("a")


def test_out_of_memory_keeps_older_output_of_other_options(bench):
    bench.run(bench.job("a", "ok"))
    before = snapshot(bench, "a")
    assert bench.run(bench.job("a", "oom"), run_id="r2") == 1
    assert snapshot(bench, "a") == before
    assert "older_output_kept" in [event["event"] for event in bench.events]


def marks(bench) -> dict[str, tuple[str, bool]]:
    """Job → (stage, whether its attempt would count if the process died now)."""
    found = {}
    for path in (bench.folder / "out/jobs").glob("*/attempt.json"):
        mark = AttemptMark.model_validate_json(path.read_bytes())
        found[mark.job_id] = (mark.stage, mark.counts)
    return found


def test_attempt_counts_only_while_job_is_generating(bench, monkeypatch):
    seen, prepared, generate = [], threading.Event(), StubGenerator.generate

    def looking(self, conditions, *more):
        if not seen:
            assert prepared.wait(10)
            seen.append(marks(bench))
        return generate(self, conditions, *more)

    def prepare(self, request, timer, original=StubGenerator.prepare):
        if self.prepared:
            prepared.set()
        return original(self, request, timer)

    monkeypatch.setattr(StubGenerator, "generate", looking)
    monkeypatch.setattr(StubGenerator, "prepare", prepare)
    assert bench.run(bench.job("a"), bench.job("b")) == 0
    assert seen == [{"a": ("generating", True), "b": ("preparing", False)}]


def test_job_waiting_for_delivery_does_not_count_as_generating(bench, monkeypatch):
    """However many jobs wait, one attempt counts if the process dies: the attempt of the job that is generating."""
    bench.generator = StubGenerator(frames=1, segments=1)
    seen, generate, publish, waits = [], StubGenerator.generate, Delivery.publish, threading.Event()

    def looking(self, conditions, *more):
        if self.tries.get("ok", 0) == 4:
            seen.append(sorted(name for name, (_, counts) in marks(bench).items() if counts))
            waits.set()
        return generate(self, conditions, *more)

    def slowly(self, *more):
        assert waits.wait(10)
        return publish(self, *more)

    monkeypatch.setattr(StubGenerator, "generate", looking)
    monkeypatch.setattr(Delivery, "publish", slowly)
    assert bench.run(*[bench.job(f"j{n}") for n in range(6)]) == 0
    assert seen == [["j4"]]


def test_marks_of_stopping_process_do_not_count(bench):
    """A machine that is taken back may be gone before the running job has drained."""
    bench.generator = StubGenerator(generate_s=1.0)
    seen = []

    def signal() -> None:
        bench.generator.generating.wait(10)
        bench.stop.request(SIGTERM)
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:
            seen.extend(name for name, (_, counts) in marks(bench).items() if not counts)

    thread = threading.Thread(target=signal)
    thread.start()
    bench.run(bench.job("a"))
    thread.join()
    assert seen == ["a"]


def test_stop_signal_before_job_begins_keeps_mark_of_earlier_attempt(bench, monkeypatch):
    """The mark has the number of crashes in this job, or the failure after which an older output was kept."""
    mark = AttemptMark(job_id="a", attempt=2, fingerprint="f", run_id="r", host="h", started_at="t").to_json()
    bench.out.write_bytes("jobs/a/attempt.json", mark)
    decide = Ledger.decide

    def deciding(self, *arguments):
        try:
            return decide(self, *arguments)
        finally:
            bench.stop.request(SIGTERM)

    monkeypatch.setattr(Ledger, "decide", deciding)
    assert bench.run(bench.job("a")) == 143
    assert bench.out.read_bytes("jobs/a/attempt.json") == mark


@pytest.mark.parametrize("place", ["a file", "a file for its parent", "a folder as record", "a folder as mark"])
def test_blocked_job_path_fails_only_that_job(bench, place):
    jobs = bench.folder / "out/jobs"
    jobs.mkdir(parents=True)
    if place == "a file":
        (jobs / "bad").write_text("in the way")
    elif place == "a file for its parent":
        (jobs / "bad").symlink_to(bench.reference)
    else:
        (jobs / "bad" / ("result.json" if "record" in place else "attempt.json") / "x").mkdir(parents=True)
    assert bench.run(bench.job("a"), bench.job("bad"), bench.job("c")) == 1
    assert [line["status"] for line in bench.summary["jobs"]] == ["succeeded", "failed", "succeeded"]
    assert bench.summary["jobs"][1]["error"]["code"] == "storage.denied"
    assert "bad" in bench.summary["jobs"][1]["error"]["message"]
    read_run_status(bench.out)


@pytest.mark.parametrize("place", ["loop", "long name", "long path"])
def test_invalid_input_path_fails_only_that_job(bench, place):
    odd = bench.folder / "loop.mp4"
    odd.symlink_to(odd)
    video = {"loop": str(odd), "long name": str(bench.folder / ("n" * 300)), "long path": "/" + "d/" * 3000 + "v.mp4"}
    bad = replace(bench.job("bad"), video=video[place])
    assert bench.run(bench.job("a"), bad, bench.job("c")) == 1
    assert [line["status"] for line in bench.summary["jobs"]] == ["succeeded", "failed", "succeeded"]
    assert bench.summary["jobs"][1]["error"]["code"].startswith("input.")


def test_missing_weights_of_one_job_fail_only_that_job(bench):
    jobs = [bench.job("a"), bench.job("bad", seed=7), bench.job("c")]
    bench.run(*jobs, run_id="r0")
    before = snapshot(bench, "bad")

    def own(job):
        if job.id in ("bad", "new"):
            raise JobWeightsMissing("no LoRA is called style")
        return {}

    bench.own = own
    jobs += [bench.job("new")]
    for run in ("r1", "r2"):  # the second time, the failure of the first is replaced
        assert bench.run(*jobs, run_id=run) == 1
        assert [line["status"] for line in bench.summary["jobs"]] == ["skipped", "failed", "skipped", "failed"]
        assert "record_not_written" not in [event["event"] for event in bench.events]
        assert bench.result("new")["error"]["code"] == "weights.missing"
        assert snapshot(bench, "bad") == before
    bench.own = lambda job: {}
    assert bench.run(*jobs, run_id="r3") == 0


def test_record_with_invalid_output_key_does_not_stop_run(bench):
    bench.run(bench.job("a"), bench.job("b"))
    path = bench.folder / "out/jobs/a/result.json"
    record = json.loads(path.read_bytes())
    record["output"]["key"] = "../../elsewhere"
    path.write_text(json.dumps(record))
    assert bench.run(bench.job("a"), bench.job("b"), run_id="r2") == 0
    assert [line["status"] for line in bench.summary["jobs"]] == ["succeeded", "skipped"]


def test_generation_waits_for_delivery_at_buffer_limit(bench, monkeypatch):
    """Each job between generation and delivery holds open files, however small its frames are."""
    bench.generator = StubGenerator(frames=1, segments=1)
    publish, most = Delivery.publish, []

    def slowly(self, *more):
        if not most:
            previous = -1
            while previous != (previous := bench.generator.tries["ok"]):  # until generation stands still
                time.sleep(0.3)
            most.append(previous)
        return publish(self, *more)

    monkeypatch.setattr(Delivery, "publish", slowly)
    assert bench.run(*[bench.job(f"j{n}") for n in range(60)]) == 0
    assert most[0] <= FRAME_BUFFER_ITEMS + 2


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: device-side assert triggered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA failure 4: driver shutting down ; GPU=0",
    ],
)
def test_lost_device_ends_run_with_3_and_fails_no_other_job(bench, monkeypatch, message):
    generate, prepare, dead = StubGenerator.generate, StubGenerator.prepare, threading.Event()

    def preparing(self, request, timer):
        if request.prompt == "next":
            assert dead.wait(10)
            raise RuntimeError(message)  # whatever touches the device now
        return prepare(self, request, timer)

    def generating(self, conditions, *more):
        if conditions.request.prompt == "dies":
            dead.set()
            raise RuntimeError(message)
        return generate(self, conditions, *more)

    monkeypatch.setattr(StubGenerator, "generate", generating)
    monkeypatch.setattr(StubGenerator, "prepare", preparing)
    jobs = [bench.job("a"), bench.job("b", "dies"), bench.job("c", "next"), bench.job("d")]
    assert bench.run(*jobs) == 3
    assert [line["status"] for line in bench.summary["jobs"]] == ["succeeded", "failed", "not_run", "not_run"]
    assert bench.summary["jobs"][1]["error"]["code"] == "device.lost"
    assert bench.files("c") == bench.files("d") == set()
    assert bench.result("b")["attempts_counted"] == 1
    monkeypatch.undo()
    assert bench.run(*jobs, run_id="r2") == 0


def test_lost_device_in_preparation_blames_no_job(bench, monkeypatch):
    def preparing(self, request, timer):
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0")

    monkeypatch.setattr(StubGenerator, "prepare", preparing)
    assert bench.run(bench.job("a"), bench.job("b")) == 3
    assert bench.files("a") == bench.files("b") == set()


def clone(bench, count: int, storage=None) -> list[Job]:
    """Jobs that are done: the record and output of one, `count` times."""
    first = bench.job("j0")
    assert bench.run(first, storage=storage, run_id="first") == 0
    storage = storage or bench.out
    text = storage.read_bytes("jobs/j0/result.json").decode()
    output = storage.read_bytes("jobs/j0/output.mp4")
    for n in range(1, count):
        storage.write_bytes(f"jobs/j{n}/output.mp4", output)
        storage.write_bytes(f"jobs/j{n}/result.json", text.replace("jobs/j0/", f"jobs/j{n}/").encode())
    return [bench.job(f"j{n}") for n in range(count)]


@pytest.mark.s3
def test_rerun_on_s3_sends_one_request_per_job(bench, faulty_s3, aws_env):
    aws_env(faulty_s3)
    base = f"s3://{faulty_s3.make_bucket()}"
    storage = open_storage(f"{base}/out")
    for path in (bench.reference, bench.video):
        storage.publish(path, f"in/{path.name}")
    bench.reference, bench.video = f"{base}/out/in/ref.png", f"{base}/out/in/video.mp4"
    jobs = clone(bench, 100, storage)
    storage.write_bytes("jobs/j7/output.mp4", b"somebody else's")
    storage.delete("jobs/j8/output.mp4")
    faulty_s3.requests.clear()
    ledger = Ledger(storage)
    surveyor = make_surveyor(Engine("stub", bench.generator.identity, StubGenerator), ledger, ())
    decisions = list(survey_jobs(jobs, storage, surveyor))
    assert [n for n, decision in enumerate(decisions) if decision is None] == [7, 8]
    kinds = Counter(method for method, _, _ in faulty_s3.requests)
    assert kinds["HEAD"] <= 2 + 1, "each distinct input once, and the one output that was not listed"
    assert kinds["GET"] <= 100 + 2, "each record once, and the list"


@pytest.mark.s3
def test_record_names_unverified_transfer(bench, faulty_s3, aws_env):
    """The ETag of another tool's multipart object is no digest. A plain object with a flipped bit is fetched again."""
    aws_env(faulty_s3)
    bucket = faulty_s3.make_bucket()
    bench.video.write_bytes(b"v" * (6 * 2**20))
    parts = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    faulty_s3.client.upload_file(str(bench.video), bucket, "video.mp4", Config=parts)
    faulty_s3.client.put_object(Bucket=bucket, Key="ref.png", Body=bench.reference.read_bytes())
    bench.reference, bench.video = f"s3://{bucket}/ref.png", f"s3://{bucket}/video.mp4"
    faulty_s3.fail("flip", "GET", "/ref.png")
    assert bench.run(bench.job("a")) == 0
    assert [note.split(" (")[0] for note in bench.result("a")["notes"]] == [f"unverified transfer: {bench.video}"]
    assert len(faulty_s3.seen("GET", "/ref.png")) == 2


def test_rerun_does_not_hash_unchanged_files(bench, monkeypatch):
    memory = bench.folder / "cache/file-hashes.json"
    jobs = clone(bench, 5)
    for path in (bench.folder).rglob("*"):
        os.utime(path, (1, 1))  # a file that has just changed may change again within its clock's tick
    hashes = FileHashes(memory)
    assert bench.run(*jobs, run_id="r2", hashes=hashes) == 0
    hashes.save()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was hashed again"))
    assert bench.run(*jobs, run_id="r3", hashes=FileHashes(memory)) == 0
    assert bench.summary["counts"]["skipped"] == 5
