from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runner.batch.scratch import scratch_folder


def test_it_is_there_inside_and_gone_after(tmp_path):
    with scratch_folder(tmp_path / "cache") as folder:
        (folder / "jobs").mkdir()
        assert folder.parent == tmp_path / "cache"
    assert list((tmp_path / "cache").iterdir()) == []


def test_runs_that_share_a_cache_leave_each_other_alone(tmp_path):
    with scratch_folder(tmp_path) as first:
        (first / "input.mp4").write_bytes(b"x")
        with scratch_folder(tmp_path) as second:
            assert second != first
            assert (first / "input.mp4").exists()
        assert (first / "input.mp4").exists()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """An input of gigabytes, at each machine that is taken back: the cache outlives the container."""
    killed = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from runner.batch.scratch import scratch_folder
        with scratch_folder(Path(sys.argv[1])) as folder:
            (folder / "input.mp4").write_bytes(b"x")
            os._exit(9)
    """)
    command = [sys.executable, "-c", killed, str(tmp_path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == 9
    assert [path.name for path in tmp_path.glob("*/input.mp4")] == ["input.mp4"]
    (tmp_path / "poses").mkdir()
    (tmp_path / "run-of-somebody").mkdir()  # without a lock: not ours
    with scratch_folder(tmp_path):
        assert list(tmp_path.glob("*/input.mp4")) == []
    assert {path.name for path in tmp_path.iterdir()} == {"poses", "run-of-somebody"}


def test_a_cache_that_is_a_file_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match="cache"), scratch_folder(tmp_path / "cache"):
        pass
