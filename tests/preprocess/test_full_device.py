"""A device whose memory is full: the job is prepared on the CPU, its report says so, and the next one tries again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from runner.errors import InputUnreadable, OutOfMemory
from runner.preprocess import prepare
from runner.preprocess.networks.providers import NetworkOptions
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions

OPTIONS = JobOptions(fps="source", size="240x160")
AT_ITS_LIMIT = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'Conv_1' Status "
    "Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 Available memory of 2451456 is smaller than "
    "requested bytes of 25165824"
)
OF_TORCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 MiB")


class Device:
    """A session's place on a device: `full`: what a run there raises, None while there is room."""

    def __init__(self, session):
        self._session, self.full, self.runs = session, None, 0

    def run(self, names, feeds):
        self.runs += 1
        if self.full is not None:
            raise self.full
        return self._session.run(names, feeds)


@pytest.fixture
def place(preprocessor):
    """(a preprocessor that takes itself to be on cuda:0, its pose network's place)."""
    device = Device(preprocessor.pose.network.session)
    pose = type(preprocessor.pose)(replace(preprocessor.pose.network, session=device, provider="CUDA"))
    networks = NetworkOptions(tensorrt="on", arena_bytes=1)  # of a GPU; the CPU refuses both
    return Preprocessor(preprocessor.detector, pose, "cuda:0", networks=networks), device


@pytest.mark.parametrize("error", [RuntimeError(AT_ITS_LIMIT), OF_TORCH], ids=["arena", "torch"])
def test_prepare_on_full_device_runs_on_cpu_and_next_job_on_device(
    preprocessor, place, reference, tmp_path, make_clip, error
):
    clip = make_clip(tmp_path / "clip.mp4", [(40 + 2 * i, 60) for i in range(20)])
    there, device = place
    expected = preprocessor.prepare(reference, clip, OPTIONS)
    device.full = error
    with capture_logs() as logs:
        made = there.prepare(reference, clip, OPTIONS)
    np.testing.assert_array_equal(made.track.points, expected.track.points)
    assert (made.report["prepared_on"], made.report["provider"]) == ("cpu", "CPUExecutionProvider")
    (warning,) = made.report["warnings"]
    assert "prepared on the CPU, because memory on cuda:0 ran out" in warning and "--memory" in warning
    assert [log["event"] for log in logs if log["log_level"] == "warning"] == ["preparing_on_the_cpu"]
    host = there._host
    assert device.runs == 1
    device.full = None
    again = there.prepare(reference, clip, OPTIONS)
    np.testing.assert_array_equal(again.track.points, expected.track.points)
    assert "prepared_on" not in again.report and again.report["provider"] == "CUDA"
    assert again.report["warnings"] == []
    device.full = error
    there.prepare(reference, clip, OPTIONS).close()
    assert there._host is host  # opened once


def test_prepare_with_other_error_or_full_cpu_fails(preprocessor, place, reference, tmp_path, make_clip, monkeypatch):
    clip = make_clip(tmp_path / "clip.mp4", [(40 + 2 * i, 60) for i in range(20)])
    there, device = place
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(InputUnreadable):
        there.prepare(reference, tmp_path / "text.mp4", OPTIONS)
    device.full = RuntimeError("CUDA failure 700: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        there.prepare(reference, clip, OPTIONS)
    assert there._host is None
    here, device = Preprocessor(preprocessor.detector, there.pose), there.pose.network.session
    device.full = RuntimeError(AT_ITS_LIMIT)
    with pytest.raises(OutOfMemory, match="ran out of memory"):
        here.prepare(reference, clip, OPTIONS)


def test_load_of_networks_on_full_device_opens_them_on_cpu(networks, monkeypatch):
    asked, opened = [], prepare.open_backend

    def open_there(name, detector, pose, device, options):
        asked.append((device, options))
        if device != "cpu":
            raise OutOfMemory("no memory to load the model on cuda")
        return opened(name, detector, pose, device, options)

    monkeypatch.setattr(prepare, "open_backend", open_there)
    with capture_logs() as logs:
        there = Preprocessor.load(*networks, device="cuda", networks=NetworkOptions(tensorrt="on", arena_bytes=5))
    assert there.description["device"] == "cpu"
    assert [device for device, _ in asked] == ["cuda", "cpu"]
    assert asked[1][1] == NetworkOptions()
    assert [log["event"] for log in logs] == ["preprocessing_on_the_cpu"]
