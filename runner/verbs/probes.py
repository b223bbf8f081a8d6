"""Probes of `doctor`: read facts of this machine; each probe returns a fact or raises ProbeFailed with a reason.

Out: versions, devices, sizes. Never: judgement; doctor.py decides what is good enough.
Packages that are slow to import or may be missing are imported inside the probe that needs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["Driver", "Gpu", "ProbeFailed", "Probes", "TorchInfo"]

# An ONNX graph of one Identity over float[1] (opset 13): a session of it shows which providers really load.
IDENTITY_GRAPH = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02"
    "080142040a00100d"
)
# Calls _exit after the module has loaded, so that its teardown cannot fail.
LOAD_EXTENSION = """
import os, sys
from importlib import util
import torch
util.module_from_spec(util.spec_from_file_location(*sys.argv[1:]))
os._exit(0)
"""


class ProbeFailed(Exception):
    """The fact could not be read; the message gives the reason."""


@dataclass(frozen=True)
class TorchInfo:
    version: str
    cuda: str | None  # CUDA version of the build, None for a CPU build
    devices: tuple[tuple[str, tuple[int, int]], ...]  # (name, compute capability) that torch can use


@dataclass(frozen=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Driver:
    version: str  # of the kernel driver, e.g. 580.65.06
    gpus: tuple[Gpu, ...]


class Probes:
    """The machine this process runs on."""

    def python_version(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    def package(self, name: str) -> str:
        """Return the version of an importable package."""
        try:
            import_module(name)
        except Exception as err:  # a broken wheel may raise anything, e.g. ImportError, OSError, AttributeError
            reason = str(err).splitlines()[0] if str(err) else ""
            raise ProbeFailed(f"{name} cannot be imported ({type(err).__name__}: {reason})") from err
        owners = metadata.packages_distributions().get(name, [name])  # e.g. decord2 provides the module decord
        return self.distribution(owners[0]) or "of unknown version"

    def distribution(self, name: str) -> str | None:
        """Return the version of an installed distribution, even if it cannot be imported; None if not installed."""
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def torch(self) -> TorchInfo:
        self.package("torch")
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = tuple((torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count))
        return TorchInfo(torch.__version__, torch.version.cuda, devices)

    def cudnn(self) -> int | None:
        """Return the version number of torch's cuDNN, e.g. 92000 for 9.20.0; None in a build without it."""
        self.package("torch")
        import torch

        try:
            number: int | None = torch.backends.cudnn.version()
        except (RuntimeError, OSError) as err:  # libraries that do not load, or are older than at torch's build
            raise ProbeFailed(f"torch cannot load cuDNN ({str(err).splitlines()[0]})") from err
        return number

    def driver(self) -> Driver:
        self.package("pynvml")
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as err:
            raise ProbeFailed(f"no NVIDIA driver was found ({err})") from err
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            gpus = []
            for handle in handles:
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                gpus.append(Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
            return Driver(str(pynvml.nvmlSystemGetDriverVersion()), tuple(gpus))
        except pynvml.NVMLError as err:
            raise ProbeFailed(f"the NVIDIA driver cannot be queried ({err})") from err
        finally:
            pynvml.nvmlShutdown()

    def host_memory_bytes(self) -> int:
        """Return the RAM that this process may use, bytes: the machine's, or the container's limit if lower."""
        import psutil

        limits = [psutil.virtual_memory().total]
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                limits.append(int(Path(path).read_text()))
            except (OSError, ValueError):  # another cgroup version, no container, or "max": no limit
                continue
        return min(limits)

    def providers(self, wanted: str) -> list[str]:
        """Return the execution providers of a real session with `wanted` first: a listed provider may fail to load."""
        self.package("onnxruntime")
        import onnxruntime

        if wanted not in onnxruntime.get_available_providers():
            return ["CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a provider that does not load is absent from the result; no log is needed
        requested = list(dict.fromkeys([wanted, "CPUExecutionProvider"]))
        try:
            return list(onnxruntime.InferenceSession(IDENTITY_GRAPH, options, providers=requested).get_providers())
        except Exception as err:  # onnxruntime has no public exception types
            raise ProbeFailed(f"onnxruntime cannot open a session ({str(err).splitlines()[0]})") from err

    def tensorrt(self) -> str:
        """Return the name of onnxruntime's TensorRT provider if its libraries exist. Loads nothing, to save seconds."""
        self.package("onnxruntime")
        import onnxruntime

        from runner.preprocess.networks.providers import TENSORRT, has_tensorrt_libraries

        if TENSORRT not in onnxruntime.get_available_providers():
            raise ProbeFailed("this onnxruntime was built without TensorRT")
        if not has_tensorrt_libraries():
            raise ProbeFailed("libnvinfer is not installed")
        return TENSORRT

    def extension(self, distribution: str, module: str) -> str:
        """Return the version of an installed distribution after loading its compiled `module` with torch in a process.

        The package itself is not imported: that may take ten seconds.
        """
        names = {f"{module}{suffix}" for suffix in EXTENSION_SUFFIXES}
        found = [path for path in metadata.files(distribution) or () if path.name in names]
        name = f"{distribution} {metadata.version(distribution)}"
        if not found:
            raise ProbeFailed(f"{name} has no {module}")
        torch, path = self.package("torch"), str(found[0].locate())
        try:
            command = [sys.executable, "-c", LOAD_EXTENSION, module, path]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as err:
            raise ProbeFailed(f"the test of {module} of {name} failed ({err})") from err
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            reason = last[0].removeprefix("ImportError: ").removeprefix(f"{path}: ")
            raise ProbeFailed(f"{module} of {name} does not load with torch {torch} ({reason})")
        return metadata.version(distribution)

    def encoder(self, name: str) -> str:
        """Return the long name of a video encoder of PyAV."""
        self.package("av")
        import av

        try:
            return str(av.codec.Codec(name, "w").long_name)
        except (ValueError, LookupError) as err:  # UnknownCodecError is a ValueError
            raise ProbeFailed(f"this build of PyAV has no {name} encoder") from err

    def compiler(self) -> str:
        """Return the path of the C compiler that Triton and Inductor would call."""
        for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
            if name and (path := shutil.which(name)):
                return path
        raise ProbeFailed("no C compiler (cc, gcc or clang)")

    def python_header(self) -> str:
        """Return the path of this interpreter's Python.h."""
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.is_file():
            raise ProbeFailed(f"no {header}")
        return str(header)
