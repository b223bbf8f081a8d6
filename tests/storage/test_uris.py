"""What is behind a URI: a storage, an input; and what is refused."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import runner
from runner.errors import ConfigInvalid, InputNotFound, InputUnreadable, StorageDenied
from runner.storage import (
    LocalStorage,
    fetch_input,
    is_remote,
    local_path,
    open_storage,
    probe_writable,
    stat_input,
)
from tests.s3_servers import FaultyServer, S3Server

RUNNER = Path(runner.__file__).resolve().parent


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("out", "out"),
        ("/srv/a b/中", "/srv/a b/中"),
        ("file:///srv/a%20b/%E4%B8%AD", "/srv/a b/中"),
        ("file:///srv/a b#1?x", "/srv/a b#1?x"),
        ("file://localhost/srv", "/srv"),
        ("FILE:///srv", "/srv"),
        ("odd:name", "odd:name"),
        (Path("x"), "x"),
    ],
)
def test_local_path_of_local_uri_is_plain_path(uri: str | Path, path: str) -> None:
    assert local_path(uri) == Path(path)
    assert not is_remote(uri)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "https://host/x", "file://host/x", "file:x//", "", "a\0b"])
def test_uri_of_other_kind_is_refused(uri: str) -> None:
    if uri == "file:x//":  # no authority, hence a relative path of an odd name
        assert local_path(uri) == Path(uri)
        return
    with pytest.raises(ConfigInvalid):
        open_storage(uri)
    if "://" in uri:  # one job's input: the other jobs go on
        with pytest.raises(InputNotFound):
            stat_input(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://x", "s3://bad bucket/x", "s3://bucket/../up"])
def test_s3_uri_without_bucket_or_that_leads_up_is_refused(uri: str) -> None:
    with pytest.raises(ConfigInvalid):
        open_storage(uri)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://bucket/folder/", "s3://bucket/a/.."])
def test_input_uri_that_names_no_object_is_not_found(uri: str) -> None:
    with pytest.raises(InputNotFound, match="s3://bucket"):
        stat_input(uri)


def test_s3_root_is_normalised() -> None:
    assert open_storage("s3://bucket").root == open_storage("S3://bucket/").root == "s3://bucket"
    assert open_storage("s3://bucket/a/b/").uri("c d") == "s3://bucket/a/b/c d"


def test_local_input_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"x")
    assert fetch_input(str(tmp_path / "a b.png"), tmp_path / "scratch") == tmp_path / "a b.png"
    assert fetch_input(f"file://{tmp_path}/a%20b.png", tmp_path / "scratch") == tmp_path / "a b.png"
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(InputUnreadable, match="folder"):
        stat_input(tmp_path)
    with pytest.raises(InputNotFound, match="absent"):
        stat_input(tmp_path / "absent")
    with pytest.raises(InputNotFound):
        stat_input(tmp_path / "a b.png" / "deeper")


def test_odd_local_input_does_not_stop_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ConfigInvalid or a traceback would stop the other jobs."""
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.delenv("HOME", raising=False)
    for uri, kind, said in [
        (tmp_path / "loop", InputUnreadable, "forms a loop"),
        (tmp_path / "loop" / "x.png", InputUnreadable, "forms a loop"),
        (tmp_path / ("n" * 256), InputNotFound, "longer"),
        (tmp_path / "/".join(["n" * 200] * 25), InputNotFound, "longer"),
        (f"file://{tmp_path}/{'n' * 256}", InputNotFound, "longer"),
        ("~no-such-user/x.png", InputNotFound, "home folder"),
        (str(tmp_path / "\ud800"), InputNotFound, "not valid Unicode"),
        (f"file://{tmp_path}/\ud800", InputNotFound, "not valid Unicode"),
        ("a\0b", InputNotFound, "not a path"),
        ("", InputNotFound, "not a path"),
    ]:
        for ask in (stat_input, lambda uri: fetch_input(uri, tmp_path / "scratch")):
            with pytest.raises(kind, match=said):
                ask(uri)


def test_odd_s3_object_does_not_stop_run(
    faulty_s3: FaultyServer, aws_env: Callable[..., S3Server], tmp_path: Path
) -> None:
    bucket = aws_env(faulty_s3, AWS_MAX_ATTEMPTS="1").make_bucket()
    faulty_s3.client.put_object(Bucket=bucket, Key="x.mp4", Body=b"x")
    for ask in (stat_input, lambda uri: fetch_input(uri, tmp_path / "scratch")):
        faulty_s3.faults.clear()  # as a bucket of another region answers, or one whose name with the key is too long
        faulty_s3.fail("400", "HEAD", "x.mp4", times=1000)
        with pytest.raises(InputUnreadable, match=r"x\.mp4.*answered 400"):
            ask(f"s3://{bucket}/x.mp4")
        with pytest.raises(InputNotFound):
            ask(f"s3://{bucket}/{'n' * 1025}")
        with pytest.raises(InputNotFound):
            ask(f"s3://{bucket}/{'n' * 1025}/x")


def test_invalid_s3_endpoint_is_config_invalid(aws_env: Callable[..., S3Server]) -> None:
    aws_env(S3Server("not a url"))
    with pytest.raises(ConfigInvalid, match="AWS_ENDPOINT_URL_S3"):
        stat_input("s3://bucket/x.mp4")


def test_probe_writable_of_denied_folder_names_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def deny(*_: object, **__: object) -> Iterator[None]:
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(StorageDenied, match=r"--user") as caught:
        probe_writable(LocalStorage(tmp_path / "out"))
    assert f"{tmp_path} belongs to uid {tmp_path.stat().st_uid}" in caught.value.message


def test_only_s3_and_uris_modules_name_s3() -> None:
    """Code that depends on a scheme asks the registry or the storage itself."""
    found = []
    for path in RUNNER.rglob("*.py"):
        if path.parent.name == "storage" and (path.name == "uris.py" or path.name.startswith("s3")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("runner.storage.s3"):
                found.append(f"{path.name}:{node.lineno} imports {node.module}")
            if isinstance(node, ast.Constant) and str(node.value).lower() in ("s3", "s3:", "s3:/", "s3://"):
                found.append(f"{path.name}:{node.lineno} {node.value!r}")
    assert found == []
