"""Baseline: which render stands for a job, damaged files, and how many requests it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import InputUnreadable, StorageUnavailable
from runner.records.output_layout import FRAME_DIGESTS, OUTPUT, RESULT
from runner.regression import baseline as baseline_module
from runner.regression.approving import ApprovalRequest, Approved
from runner.regression.baseline import Baseline
from runner.regression.baseline_layout import JobName, approvals_key, name_job
from runner.storage import LocalStorage, Storage, open_storage
from tests.regression.night_stores import HookedStorage, write_render
from tests.s3_servers import FaultyServer

GPU = {"engine": {"device": "cuda"}, "computed_by": {"device": "NVIDIA H200"}}
OTHER_GPU = {"engine": {"device": "cuda"}, "computed_by": {"device": "NVIDIA L4"}}


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    return Baseline(LocalStorage(tmp_path / "baseline"))


@pytest.fixture
def accept(tmp_path: Path, baseline: Baseline) -> Callable[..., JobName]:
    """Render a job and approve it; its name. `draft`: as a draft."""

    def work(job_id: str = "a", *, draft: bool = False, **more: Any) -> JobName:
        out = LocalStorage(tmp_path / "out")
        record = write_render(out, tmp_path / "s", job_id, **more)
        done = baseline.approve(out, record, ApprovalRequest("anna", "good", draft=draft))
        assert isinstance(done, Approved)
        return name_job(record)

    return work


def test_baseline_find_prefers_own_device_then_newest_of_other_devices(baseline, accept):
    cpu, gpu = accept(content="cpu"), accept(content="gpu", **GPU)
    l4 = accept(content="l4", **OTHER_GPU)
    assert [name.device for name in (cpu, gpu, l4)] == ["cpu", "nvidia-h200", "nvidia-l4"]
    found = baseline.find([cpu, gpu, cpu])
    assert {name: job.name for name, job in found.items()} == {cpu: cpu, gpu: gpu}
    unknown = cpu._replace(device="nvidia-b200")
    assert baseline.find([unknown])[unknown].name == l4  # approved last
    accept(content="gpu again", finished_at="2026-01-02T00:00:00+00:00", **GPU)
    assert baseline.find([unknown])[unknown].name == gpu
    other = cpu._replace(recipe="bf16")
    missing = cpu._replace(job_id="b")
    assert list(baseline.find([other, unknown, missing, cpu])) == [unknown, cpu]


def test_baseline_find_uses_draft_of_other_device_as_last_choice(baseline, accept):
    cpu = accept()
    unknown = cpu._replace(device="nvidia-b200")
    gpu = accept(draft=True, **GPU)
    assert baseline.find([unknown])[unknown].name == cpu
    assert baseline.find([gpu])[gpu].approval.draft
    baseline.approve_removal(cpu, ApprovalRequest("bea", "gone", "r"))
    assert baseline.find([unknown, cpu])[unknown].name == gpu
    assert cpu not in baseline.find([cpu])  # removed here: another device's does not count


def test_baseline_jobs_lists_jobs_of_device_and_recipe(baseline, accept):
    names = [accept(job_id) for job_id in ("b", "a", "c")]
    accept("d", **GPU)
    baseline.storage.write_bytes("cpu/fp4-distill/jobs/lost/0123456789abcdef/output.mp4", b"half")
    assert [job.name.job_id for job in baseline.jobs("cpu", "fp4-distill")] == ["a", "b", "c"]
    assert [job.name for job in baseline.jobs("cpu", "fp4-distill", without={"a", "c"})] == [names[0]]
    assert baseline.jobs("cpu", "bf16") == []
    lost = JobName("cpu", "fp4-distill", "lost")
    assert baseline.find([lost]) == {}


def test_baseline_with_unrelated_files_ignores_them(baseline, accept):
    cpu = accept()
    for key in ("README.md", "notes/x", "cpu/notes", "cpu/fp4-distill/jobs/README"):
        baseline.storage.write_bytes(key, b"")
    (baseline.storage.path / "tab\there" / "fp4-distill" / "jobs" / "a").mkdir(parents=True)
    unknown = cpu._replace(device="nvidia-b200")
    assert baseline.find([unknown])[unknown].name == cpu
    assert [job.name for job in baseline.jobs("cpu", "fp4-distill")] == [cpu]


@pytest.mark.parametrize("png", [False, True], ids=["mp4", "png"])
def test_baseline_job_with_damaged_files_is_unreadable(tmp_path, baseline, accept, png):
    name = accept(png=png)

    def look():
        return baseline.find([name])[name]

    folder, digests = Path(look().storage.uri(look().output_key.rstrip("/"))).parent, look().digests()
    assert look().is_frames == png
    damages = [
        ("frames/000001.png" if png else OUTPUT, b"first 1", lambda job: job.fetch(tmp_path / "f")),
        (FRAME_DIGESTS, digests[1].encode(), lambda job: job.digests()),
        (RESULT, look().approval.fingerprint.encode(), lambda job: job.record),
    ]
    for file, part, use in damages:
        path = folder / file
        good = path.read_bytes()
        use(look())
        for data in (good.replace(part, part[1:] + part[:1]), good.replace(part, part[1:]), b""):
            path.write_bytes(data)
            with pytest.raises(InputUnreadable, match=str(folder)):
                use(look())
        path.unlink()
        if file == FRAME_DIGESTS:
            assert look().digests() is None
        else:
            with pytest.raises(InputUnreadable, match=str(folder)):
                use(look())
        path.write_bytes(good)
    if png:
        (folder / "frames" / "000003.png").write_bytes(b"one more")
        with pytest.raises(InputUnreadable, match="differs from the approved one"):
            look().fetch(tmp_path / "f")


def test_baseline_job_fetch_returns_frames_in_order(tmp_path, baseline, accept):
    name = accept(png=True)
    paths = baseline.find([name])[name].fetch(tmp_path / "f")
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    assert [path.read_bytes() for path in paths] == [b"first 0", b"first 1", b"first 2"]


def test_baseline_find_with_unreadable_approval_raises(baseline, accept):
    name = accept()
    baseline.storage.write_bytes(approvals_key(name), b"{")
    with pytest.raises(InputUnreadable, match="not a list of approvals"):
        baseline.find([name])
    hooked = HookedStorage(baseline.storage)

    def fail(method: str, arguments: Any) -> None:
        if method == "read_versioned":
            raise StorageUnavailable("the store is away")

    hooked.before = fail
    with pytest.raises(StorageUnavailable):
        Baseline(hooked).find([name])


def test_baseline_find_lists_each_recipe_once_and_reads_one_object_per_job(
    tmp_path: Path, faulty_s3: FaultyServer, aws_env: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing jobs and the contents of the folders cost no request."""
    aws_env(faulty_s3)
    storage: Storage = open_storage(f"s3://{faulty_s3.make_bucket()}/baseline")
    local = Baseline(LocalStorage(tmp_path / "local"))
    out = LocalStorage(tmp_path / "out")
    names = []
    for number in range(4):
        record = write_render(out, tmp_path / "s", f"job{number}", png=True)
        local.approve(out, record, ApprovalRequest("anna", "good"))
        names.append(name_job(record))
    for info in local.storage.list():
        storage.publish(local.storage.path / info.key, info.key)
    many = [JobName("cpu", "fp4-distill", f"none{number}") for number in range(50)]
    baseline = Baseline(storage)

    def requests(work: Callable[[], object]) -> tuple[int, int, int]:
        faulty_s3.requests.clear()
        work()
        listed, read = len(faulty_s3.seen("GET", "list-type=2")), len(faulty_s3.seen("GET", "approved.json"))
        return listed, read, len(faulty_s3.requests) - listed - read

    assert requests(lambda: baseline.find(names)) == (1, 4, 0)
    assert requests(lambda: baseline.find([*names, *many])) == (2, 4, 0)  # and the devices
    assert requests(lambda: baseline.find(name._replace(device="nvidia-l4") for name in names)) == (3, 4, 0)
    assert requests(lambda: baseline.jobs("cpu", "fp4-distill", without=[f"job{n}" for n in range(3)])) == (1, 1, 0)
    monkeypatch.setattr(baseline_module, "READS_AT_ONCE", 1)
    assert requests(lambda: baseline.find(names)) == (1, 4, 0)
