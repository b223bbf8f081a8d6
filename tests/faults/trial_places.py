"""Trial places: where trials keep inputs and outputs, on this disk or on an S3 server, seen without the product."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tests.s3_servers import S3Server

__all__ = ["LocalPlace", "Place", "S3Place"]

INPUTS = {"reference.png": b"a reference, which the stub does not open", "video.mp4": b"a video, neither " * 64}


class Place(Protocol):
    kind: str

    def inputs(self) -> dict[str, str]:
        """URIs of `reference` and `video`."""

    def output(self, name: str, like: str | None = None) -> str:
        """The URI of a new output: empty, or a copy of the output `like`."""

    def files(self, uri: str, below: str = "") -> dict[str, bytes]:
        """Every file or object of an output, or of a folder in it, hidden ones too, by key. One that is removed
        meanwhile is left out. `below` ends with a slash."""

    def read(self, uri: str, key: str) -> bytes | None:
        """One file or object of an output; None where nothing lies there."""

    def remove(self, uri: str) -> None: ...


class LocalPlace:
    kind = "local"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, data in INPUTS.items():
            (folder / name).write_bytes(data)

    def inputs(self) -> dict[str, str]:
        return {"reference": str(self._folder / "reference.png"), "video": str(self._folder / "video.mp4")}

    def output(self, name: str, like: str | None = None) -> str:
        path = self._folder / name
        if like is not None:
            shutil.copytree(like, path)
        return str(path)

    def files(self, uri: str, below: str = "") -> dict[str, bytes]:
        top, found = Path(uri), {}
        for folder, _, names in os.walk(top / below):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    found[path.relative_to(top).as_posix()] = path.read_bytes()
        return found

    def read(self, uri: str, key: str) -> bytes | None:
        try:
            return Path(uri, key).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, uri: str) -> None:
        shutil.rmtree(uri, ignore_errors=True)


class S3Place:
    """`kind`: how the server is called in tables."""

    def __init__(self, server: S3Server, kind: str = "S3") -> None:
        self.kind = kind
        self._server = server
        self._bucket = server.make_bucket()
        for name, data in INPUTS.items():
            server.client.put_object(Bucket=self._bucket, Key=f"in/{name}", Body=data)

    def inputs(self) -> dict[str, str]:
        base = f"s3://{self._bucket}/in"
        return {"reference": f"{base}/reference.png", "video": f"{base}/video.mp4"}

    def output(self, name: str, like: str | None = None) -> str:
        if like is not None:
            bucket, prefix = self._split(like)
            for key in self._keys(like):
                source = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
                self._server.client.copy_object(Bucket=self._bucket, Key=f"{name}/{key}", CopySource=source)
        return f"s3://{self._bucket}/{name}"

    def files(self, uri: str, below: str = "") -> dict[str, bytes]:
        found = {key: self.read(uri, key) for key in self._keys(uri, below)}
        return {key: data for key, data in found.items() if data is not None}

    def read(self, uri: str, key: str) -> bytes | None:
        bucket, prefix = self._split(uri)
        client = self._server.client
        try:
            return bytes(client.get_object(Bucket=bucket, Key=f"{prefix}/{key}")["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    def remove(self, uri: str) -> None:
        bucket, prefix = self._split(uri)
        for key in self._keys(uri):
            self._server.client.delete_object(Bucket=bucket, Key=f"{prefix}/{key}")

    def _keys(self, uri: str, below: str = "") -> list[str]:
        bucket, prefix = self._split(uri)
        pages = self._server.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/{below}")
        found: list[Mapping[str, Any]] = [entry for page in pages for entry in page.get("Contents", ())]
        return [str(entry["Key"]).removeprefix(f"{prefix}/") for entry in found]

    def _split(self, uri: str) -> tuple[str, str]:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return bucket, prefix
