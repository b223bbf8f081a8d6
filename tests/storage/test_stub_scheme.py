"""A backend is one class and one row of the registry: a stub scheme serves all that a run reads and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from runner.cli import main
from runner.errors import ConfigInvalid, InputNotFound, InputUnreadable
from runner.spec.manifest import load_manifest
from runner.storage import LocalStorage, Storage, fetch_input, is_remote, open_storage, stat_input
from runner.storage.roots import check_inside, parse_roots
from runner.storage.sync import sync_models
from runner.storage.uris import BACKENDS
from runner.verbs.doctor import run_checks
from tests.faults.stub_runs import run_command
from tests.storage.test_base import StorageContract
from tests.stub_generator import StubGenerator
from tests.verbs.test_doctor import Machine


class StubStorage(LocalStorage):
    @classmethod
    def from_uri(cls, uri: str | Path, environ: Mapping[str, str]) -> StubStorage:
        return cls(Path(environ["STUB_FOLDER"], str(uri).partition("://")[2]), root=str(uri).rstrip("/"))


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that stands for all buckets of `stub://`."""
    monkeypatch.setitem(BACKENDS, "stub", f"{__name__}:StubStorage")
    monkeypatch.setenv("STUB_FOLDER", str(tmp_path / "buckets"))
    return tmp_path / "buckets"


class TestStubStorage(StorageContract):
    scheme = "stub"

    @pytest.fixture
    def store(self) -> Storage:
        return open_storage("stub://bucket/some prefix/中文/")


def put(stub: Path, key: str, data: bytes) -> None:
    (stub / key).parent.mkdir(parents=True, exist_ok=True)
    (stub / key).write_bytes(data)
    os.utime(stub / key, (1, 1))


def test_an_input_is_fetched(stub: Path, tmp_path: Path) -> None:
    put(stub, "media/dances/samba.mp4", b"dance")
    assert is_remote("STUB://media/dances/samba.mp4")
    path = fetch_input("stub://media/dances/samba.mp4", tmp_path / "scratch")
    assert path.is_relative_to(tmp_path / "scratch")
    assert path.read_bytes() == b"dance"
    for uri in ("stub://media", "stub://media/dances/", "stub://media/none.mp4"):
        with pytest.raises(InputNotFound):
            stat_input(uri)


def test_an_unknown_scheme_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigInvalid, match=r"file:///.*s3://bucket/key.*stub://bucket/key"):
        open_storage("gs://bucket")
    with pytest.raises(InputNotFound, match="stub://bucket/key"):
        stat_input("gs://bucket/x.mp4")


def test_roots() -> None:
    roots = parse_roots(["STUB://media/in/", "s3://media/other"])
    assert check_inside("stub://media/in/a.mp4", roots) == "stub://media/in/a.mp4"
    for uri in ("stub://media/inside/a.mp4", "stub://media/in/../a.mp4", "s3://media/in/a.mp4", "stub://media/other/a"):
        with pytest.raises(InputUnreadable, match="lies outside"):
            check_inside(uri, roots)
    with pytest.raises(ConfigInvalid, match="stub://bucket/prefix"):
        parse_roots(["stub://"])


def test_the_places_of_a_manifest(stub: Path) -> None:
    jobs = [
        {"id": "beside", "reference": "refs/a.png", "video": "../b.mp4"},
        {"id": "whole", "reference": "STUB://other/a.png", "video": "s3://bucket/b.mp4"},
        {"id": "local", "reference": "/srv/a.png", "video": "b.mp4"},
    ]
    put(stub, "media/deep/night.jsonl", "\n".join(json.dumps(job | {"prompt": "ok"}) for job in jobs).encode())
    found = {job.id: (job.reference, job.video) for job in load_manifest("stub://media/deep/night.jsonl").jobs}
    assert found == {
        "beside": ("stub://media/deep/refs/a.png", "stub://media/b.mp4"),
        "whole": ("stub://other/a.png", "s3://bucket/b.mp4"),
        "local": ("/srv/a.png", "stub://media/deep/b.mp4"),
    }


def test_a_model_store_is_synced(stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"Wan/config.json": b"{}", "Wan/model.safetensors": b"1" * 5000}
    for key, data in files.items():
        put(stub, f"models/v1/{key}", data)
    fetched: list[str] = []
    fetch = StubStorage.fetch
    monkeypatch.setattr(
        StubStorage,
        "fetch",
        lambda self, key, dest, on_bytes=None: fetched.append(key) or fetch(self, key, dest, on_bytes),
    )

    def sync() -> dict[str, bytes]:
        fetched.clear()
        folder = sync_models("stub://models/v1", tmp_path / "cache", lambda key: True)
        assert folder.parent == tmp_path / "cache"
        return {key: (folder / key).read_bytes() for key in files}

    assert sync() == files
    assert fetched == sorted(files)
    assert sync() == files
    assert fetched == []
    files["Wan/config.json"] = b"[]"  # of the same size and time
    put(stub, "models/v1/Wan/config.json", b"[]")
    assert sync() == files
    assert fetched == ["Wan/config.json"]


def test_doctor_asks_there(stub: Path, tmp_path: Path) -> None:
    put(stub, "models/v1/Wan/config.json", b"{}")
    checks = run_checks("stub://models/v1", "stub://results/night", tmp_path, "cpu", probes=Machine())
    assert {c.name: c.status for c in checks if c.name in ("weights", "output")} == {"weights": "ok", "output": "ok"}
    assert list((stub / "results/night").iterdir()) == []  # the probe object is gone
    checks = run_checks("stub://models/v2", None, tmp_path, "cpu", probes=Machine())
    assert {c.name: c.status for c in checks}["weights"] == "fail"


def test_a_run_reads_and_writes_there(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "ref.png")
    put(stub, "media/ref.png", (tmp_path / "ref.png").read_bytes())
    put(stub, "media/dance.mp4", b"not opened by the stub")
    jobs = [{"id": f"job{n}", "reference": "ref.png", "video": "dance.mp4", "prompt": "ok"} for n in range(2)]
    put(stub, "media/night.jsonl", "\n".join(json.dumps(job) for job in jobs).encode())
    monkeypatch.setattr("runner.verbs.run.build_engine", None)  # `run_command` replaces it; undone after the test
    words = ["stub://media/night.jsonl", "--out", "stub://results/night", "--cache", str(tmp_path / "cache")]
    run: Callable[..., int] = lambda *more: run_command([*words, *more], StubGenerator, {})  # noqa: E731

    assert run("--run-id", "n1", "--input-root", "stub://media") == 0
    record = json.loads((stub / "results/night/jobs/job1/result.json").read_bytes())
    assert record["inputs"]["video"]["uri"] == "stub://media/dance.mp4"
    assert record["output"]["uri"] == "stub://results/night/jobs/job1/output.mp4"
    assert record["output"]["identity"] == f"sha256:{record['output']['sha256']}"
    assert run("--run-id", "n2") == 0
    summary = json.loads((stub / "results/night/runs/n2/00000-of-00001.summary.json").read_bytes())
    assert summary["counts"]["skipped"] == 2
    capsys.readouterr()
    assert main(["status", "stub://results/night", "--json"]) == 0
    assert "stub://results/night/jobs/job1/output.mp4" in capsys.readouterr().out
    assert run("--run-id", "n3", "--force", "--input-root", "stub://elsewhere") == 1

    assert main(["validate", "stub://media/night.jsonl", "--input-root", "stub://media"]) == 0
    assert main(["validate", "stub://media/night.jsonl", "--input-root", "s3://media"]) == 1
    put(stub, f"results/night/jobs/job1/.staged-{'0' * 32}.tmp", b"half")
    assert main(["clean", "stub://results/night", "--yes", "--older-than", "0s"]) == 0
    assert not list((stub / "results/night/jobs/job1").glob(".staged*"))
