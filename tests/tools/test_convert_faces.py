"""The face networks: the published files under the store's names, or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.hashing import sha256_file
from runner.regression.face_network import FACE_FILES


def test_the_package_s_networks_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert_faces import FILES, main

    monkeypatch.setattr("sys.argv", ["convert_faces.py", str(tmp_path / "models/metrics")])
    main()
    made = {path.name: sha256_file(path) for path in (tmp_path / "models/metrics").iterdir()}
    assert made == dict(FILES.values())
    assert set(made) == set(FACE_FILES)


def test_a_damaged_or_missing_network_leaves_nothing(tmp_path: Path) -> None:
    from convert_faces import FILES, copy_networks, package_folder

    source = tmp_path / "source"
    source.mkdir()
    first, second = FILES
    shutil.copyfile(package_folder() / first, source / first)
    with pytest.raises(WeightsMissing, match=second):
        copy_networks(source, tmp_path / "dest")
    (source / second).write_bytes(b"another")
    with pytest.raises(WeightsCorrupt, match="its checksum is"):
        copy_networks(source, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_the_page_names_the_same_checksums() -> None:
    from convert_faces import FILES
    from convert_lpips import CHECKSUM

    page = (Path(__file__).resolve().parents[2] / "docs/metric-networks.md").read_text(encoding="utf-8")
    for published, (name, checksum) in FILES.items():
        (row,) = (line for line in page.splitlines() if f"`metrics/{name}` |" in line and published in line)
        assert checksum in row
    assert CHECKSUM in page
