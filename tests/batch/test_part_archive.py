"""Part archives: what was packed comes back, and whatever else is said to be damaged."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from runner.batch.part_archive import pack_files, unpack_files
from runner.errors import InternalError, StorageFull

CONTENT = {"output.mp4": b"pictures" * 100, "frames.sha256": b"", "pngs/000007.png": b"seven", "pngs/000008.png": b"8"}


def make(folder: Path, content: dict[str, bytes] = CONTENT) -> dict[str, Path]:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: folder / name for name in content}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_packed_comes_back(tmp_path: Path) -> None:
    pack_files(make(tmp_path / "in"), tmp_path / "part.tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "of an earlier try").write_bytes(b"x")
    assert unpack_files(tmp_path / "part.tar", tmp_path / "out") == set(CONTENT)
    assert files(tmp_path / "out") == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "part.tar"]


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    second = make(tmp_path / "b", dict(reversed(CONTENT.items())))
    for path in second.values():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    pack_files(first, tmp_path / "a.tar")
    pack_files(second, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def unpacks(packed: Path, folder: Path) -> bool:
    """Whether it gives the content back; else it must say that it is damaged, and leave nothing."""
    message = None
    try:
        unpack_files(packed, folder)
    except InternalError as error:
        message = error.message
    if message is None:
        return files(folder) == CONTENT
    assert "damaged" in message
    assert packed.name in message
    assert not folder.exists()
    return False


def test_flipped_bits_are_found_or_harmless(tmp_path: Path) -> None:
    packed, bad = tmp_path / "part.tar", tmp_path / "bad.tar"
    pack_files(make(tmp_path / "in"), packed)
    whole, random, found = packed.read_bytes(), np.random.default_rng(0), 0
    content = [i for name, data in CONTENT.items() if data for i in [whole.rindex(data)]]
    for at in [*content, *random.integers(0, len(whole), 200)]:
        data = bytearray(whole)
        data[at] ^= 1 << int(random.integers(8))
        bad.write_bytes(data)
        whole_again = unpacks(bad, tmp_path / "out")
        assert whole_again == (tmp_path / "out").exists()  # else other content was given
        assert not (whole_again and at in content)
        found += not whole_again
    assert found > 30  # the rest is padding


def test_a_cut_archive_is_damaged(tmp_path: Path) -> None:
    packed, cut = tmp_path / "part.tar", tmp_path / "cut.tar"
    pack_files(make(tmp_path / "in"), packed)
    whole = packed.read_bytes()
    end = whole.rindex(b"seven") + 5
    for size in [0, 1, 511, 512, 513, 1024, 1030, *range(1536, end, 199)]:
        cut.write_bytes(whole[:size])
        assert not unpacks(cut, tmp_path / "out"), size


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing


@pytest.mark.parametrize(
    ("listed", "entries"),
    [
        (["a.mp4"], []),
        ([], [entry("a.mp4")]),
        (["a.mp4"], [entry("a.mp4"), entry("a.mp4")]),
        (["a.mp4"], [entry("a.mp4", tarfile.SYMTYPE, "/etc/passwd")]),
        (["a.mp4"], [entry("a.mp4", tarfile.LNKTYPE, "sha256sums")]),
        (["a.mp4"], [entry("a.mp4", tarfile.FIFOTYPE)]),
        (["a.mp4"], [entry("a.mp4", tarfile.DIRTYPE)]),
        (["../a.mp4"], [entry("../a.mp4")]),
        (["/tmp/a.mp4"], [entry("/tmp/a.mp4")]),
        (["pngs/../../a.mp4"], [entry("pngs/../../a.mp4")]),
        (["other/a.mp4"], [entry("other/a.mp4")]),
    ],
    ids=[
        "missing",
        "not listed",
        "twice",
        "symbolic link",
        "hard link",
        "pipe",
        "folder",
        "above",
        "absolute",
        "above, from within",
        "another folder",
    ],
)
def test_other_archives_are_refused(tmp_path: Path, listed: list[str], entries: list[tarfile.TarInfo]) -> None:
    """Names that lead out of the folder, links, devices, entries that are not listed or are missing."""
    sums = "".join(f"{EMPTY}  {name}\n" for name in listed).encode()
    (tmp_path / "in").mkdir()
    packed = tmp_path / "in" / "part.tar"
    with tarfile.open(packed, "w") as archive:
        first = entry("sha256sums")
        first.size = len(sums)
        archive.addfile(first, io.BytesIO(sums))
        for each in entries:
            archive.addfile(each)
    with pytest.raises(InternalError, match="damaged"):
        unpack_files(packed, tmp_path / "in" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in packed.parent.iterdir()] == ["part.tar"]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"no archive" * 1000)
    assert not unpacks(tmp_path / "text", tmp_path / "out")
    pack_files(make(tmp_path / "in"), tmp_path / "part.tar")
    with tarfile.open(tmp_path / "zipped", "w:gz") as archive:
        archive.add(tmp_path / "in")
    assert not unpacks(tmp_path / "zipped", tmp_path / "out")
    with pytest.raises(ValueError, match="name"):
        pack_files({"../up.mp4": tmp_path / "text"}, tmp_path / "part.tar")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part.tar.part").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(StorageFull):
        pack_files(make(tmp_path / "in"), tmp_path / "out" / "part.tar")
    assert list((tmp_path / "out").iterdir()) == []
    pack_files(make(tmp_path / "in"), tmp_path / "part.tar")

    def full(source: object, dest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(StorageFull):
        unpack_files(tmp_path / "part.tar", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()
