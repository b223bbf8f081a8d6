"""Regular file: what is none is refused, at once or in time."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from runner.errors import InputNotFound, InputUnreadable
from runner.storage import regular_file, stat_input
from runner.storage.regular_file import answer_in_time, check_regular_file


def test_check_regular_file_accepts_file_and_link(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1234")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "empty").touch()
    assert check_regular_file(file).st_size == check_regular_file(tmp_path / "link").st_size == 4
    assert check_regular_file(tmp_path / "empty").st_size == 0
    assert stat_input(file).bytes == 4


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/self/status", "/proc/kmsg", "/sys/kernel/uevent_seqnum"])
def test_stat_input_of_kernel_file_is_refused(path):
    """/proc/kmsg answers only when the kernel has a message, /proc/self/mem with an error."""
    if not Path(path).exists():
        pytest.skip("not on this machine")
    begin = time.monotonic()
    with pytest.raises(InputUnreadable, match="whose files the kernel generates"):
        stat_input(path)
    assert time.monotonic() - begin < 5


def test_stat_input_of_device_is_refused():
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputUnreadable, match="is a pipe or a device"):
            stat_input(path)


def test_stat_input_of_pipe_socket_or_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name has 108 bytes at most
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(InputUnreadable, match="is a pipe or a device"):
                stat_input(tmp_path / name)
    with pytest.raises(InputUnreadable, match="is a folder"):
        stat_input(tmp_path)


def test_stat_input_of_link_loop_or_long_name_does_not_stop_run(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300), Path("/" + "a/" * 3000)):
        with pytest.raises((InputUnreadable, InputNotFound)) as caught:
            stat_input(path)
        assert not caught.value.stops_run


def test_check_regular_file_without_answer_times_out(tmp_path, monkeypatch):
    """For example, the server of the mount is gone."""
    release = threading.Event()
    monkeypatch.setattr(regular_file, "_look", lambda path: release.wait(60))
    with pytest.raises(InputUnreadable, match=r"did not answer within 0\.05 s"):
        check_regular_file(tmp_path / "a", answer_s=0.05)
    release.set()


def test_answer_in_time_raises_error_of_thread(tmp_path):
    with pytest.raises(KeyError):
        answer_in_time(lambda: {}["a"], tmp_path)
