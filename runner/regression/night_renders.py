"""Night renders: the renders of one night in an output storage.

In:   an output storage and a job's record. Out: digests, boxes and files of its output, checked against the record.
Never: comparing, what is approved.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runner.errors import InputNotFound, InputUnreadable
from runner.hashing import sha256_file
from runner.records.output_layout import FRAME_DIGESTS, OUTPUT, PEOPLE, is_frame, job_key
from runner.records.record import OutputRecord, ResultRecord
from runner.regression.approving import FILES_AT_ONCE, check_digest_list
from runner.storage import Storage

__all__ = ["NightRender"]

REMEDY = "Render the job again"


@dataclass(frozen=True)
class NightRender:
    """A job that succeeded. All methods also raise storage.*."""

    storage: Storage
    record: ResultRecord

    @property
    def output(self) -> OutputRecord:
        output = self.record.output
        assert output is not None
        return output

    def check_there(self) -> None:
        """Raise InputNotFound or InputUnreadable unless the output exists with its recorded size. Reads no content."""
        if self._is_frames:
            infos = list(self.storage.list(self.output.key))
            found = sum(info.bytes for info in infos) if len(infos) == self.output.files else None
        else:
            info = self.storage.stat(self.output.key)
            found = None if info is None else info.bytes
        if found is None:
            raise InputNotFound("the output is missing", where=self._uri, todo=REMEDY)
        if found != self.output.bytes:
            raise InputUnreadable(
                f"has {found} bytes; the record says {self.output.bytes}", where=self._uri, todo=REMEDY
            )

    def digests(self) -> list[str] | None:
        """Return the hex sha256 of each frame, in order; None if there is no list. Raises InputUnreadable."""
        key = job_key(self.record.job_id, FRAME_DIGESTS)
        data = self.storage.read_bytes(key)
        if data is None:
            return None
        try:
            return check_digest_list(data, self.output)
        except ValueError as error:
            raise InputUnreadable(str(error), where=self.storage.uri(key), todo=REMEDY) from error

    def people(self) -> bytes | None:
        """Return the content of people.json; None if there is none."""
        return self.storage.read_bytes(job_key(self.record.job_id, PEOPLE))

    def fetch(self, dest: Path) -> Path | Sequence[Path]:
        """Copy the MP4, or the PNG frames in order, into the folder `dest`. Raises the errors of `check_there`."""
        if not self._is_frames:
            path = dest / OUTPUT
            self.storage.fetch(self.output.key, path)
            if self.output.sha256 is not None and sha256_file(path) != self.output.sha256:
                raise InputUnreadable("differs from the file in the record", where=self._uri, todo=REMEDY)
            return path
        keys = sorted(info.key for info in self.storage.list(self.output.key))
        if len(keys) != self.output.files:
            what = f"has {len(keys)} files; the record says {self.output.files}"
            raise InputUnreadable(what, where=self._uri, todo=REMEDY)
        keys = [key for key in keys if is_frame(key)]  # sound is not compared
        paths = [dest / key.rpartition("/")[2] for key in keys]
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(self.storage.fetch, keys, paths))
        return paths

    @property
    def _is_frames(self) -> bool:
        return self.output.key.endswith("/")

    @property
    def _uri(self) -> str:
        return self.storage.uri(self.output.key.rstrip("/"))
