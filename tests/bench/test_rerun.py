from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from runner.errors import InputNotFound
from runner.storage import open_storage
from tests.bench.run_bench import ROOT, run_bench
from tests.system_tests import system_test


@system_test
def test_rerun(tmp_path):
    """One GET a job for its record, one HEAD an input, few requests beside them, many at once; nothing is loaded."""
    found, printed = run_bench("rerun", tmp_path, "--jobs", "100", "--latency-ms", "3")
    on_s3, local = found["rows"]
    assert (on_s3["jobs"], on_s3["inputs"], local["store"]) == (100, 20, "local")
    requests = on_s3["requests"]
    assert 100 <= requests["GET"] <= 106, requests
    assert 20 <= requests["HEAD"] <= 24, requests
    assert 1 <= requests["LIST"] <= 3, requests
    assert requests["PUT"] <= 11, requests  # one of them the list of jobs, for `status`
    assert 8 <= on_s3["requests_at_once"] <= 40
    assert on_s3["requests_a_job"] == pytest.approx(sum(requests.values()) / 100, abs=0.001)
    assert max(on_s3["bytes_written"], local["bytes_written"]) < 100 * 2000
    assert on_s3["serial_s"] == 1.5
    assert "100 done jobs of 20 inputs on S3" in printed and "limits" not in printed


@pytest.fixture
def fake_s3(monkeypatch) -> Any:
    from botocore.httpsession import URLLib3Session

    spec = importlib.util.spec_from_file_location("bench_fake_s3", ROOT / "bench" / "_fake_s3.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_fake_s3", module)
    spec.loader.exec_module(module)
    for name, value in module.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(URLLib3Session, "send", URLLib3Session.send)  # put back at the end
    server = module.FakeS3()
    server.install()
    return server


def test_the_fake_server_is_one_to_the_product(fake_s3, tmp_path):
    storage = open_storage("s3://bucket/top")
    storage.write_bytes("a/贝拉 1+2.json", b"{}")
    assert storage.read_bytes("a/贝拉 1+2.json") == b"{}"
    assert storage.read_bytes("a/nothing") is None and storage.stat("a/nothing") is None
    (tmp_path / "clip").write_bytes(bytes(range(256)) * 1000)
    info = storage.publish(tmp_path / "clip", "a/clip.mp4")
    assert storage.stat("a/clip.mp4") == info and info.bytes == 256_000
    storage.fetch("a/clip.mp4", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "clip").read_bytes()
    with pytest.raises(InputNotFound):
        storage.fetch("a/nothing", tmp_path / "copy")
    for index in range(2500):
        fake_s3.put(f"bucket/top/many/{index:04d} &<", b"x")
    before = fake_s3.requests["LIST"]
    assert sorted(info.key for info in storage.list("many/")) == [f"many/{i:04d} &<" for i in range(2500)]
    assert fake_s3.requests["LIST"] - before == 3
    assert sorted(info.key for info in storage.list("a/")) == ["a/clip.mp4", "a/贝拉 1+2.json"]
    storage.delete("a/clip.mp4")
    assert storage.stat("a/clip.mp4") is None
    assert fake_s3.written == 256_002


def test_the_fake_server_keeps_conditions(fake_s3):
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.session.Session().client("s3")
    etag = client.put_object(Bucket="bucket", Key="a", Body=b"1", IfNoneMatch="*", Metadata={"sha": "x"})["ETag"]
    assert client.head_object(Bucket="bucket", Key="a")["Metadata"] == {"sha": "x"}
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"other"'}):
        with pytest.raises(ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="bucket", Key="a", Body=b"2", **condition)
    client.put_object(Bucket="bucket", Key="a", Body=b"23", IfMatch=etag)
    assert client.get_object(Bucket="bucket", Key="a", Range="bytes=1-1")["Body"].read() == b"3"
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.get_object(Bucket="bucket", Key="a", IfMatch=etag)
    client.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "a"}]})
    assert fake_s3.objects == {}
