"""A CUDA device that is not there: torch.compile generates code for it, and Triton compiles that code's kernels.

In:   an architecture's name. Out: a context in which torch and Triton see one device of it, and ask no driver.
Never: a number: tensors on it are FakeTensors, which have shapes, strides and dtypes and no memory.

torch's own path stays as it is (Dynamo, AOTAutograd, Inductor). Replaced are the questions to the driver on it.
Caches of torch keep answers beyond the context: one process, one architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

from tests.gpu_env.known_torch import find_private

__all__ = ["DEVICES", "FakeDevice", "fake_cuda"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class FakeDevice:
    """One device by the names of torch's device properties.

    Limits by compute capability from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
    multiprocessors, L2 and memory from NVIDIA's data sheets.
    """

    name: str
    major: int
    minor: int
    multi_processor_count: int
    max_threads_per_multi_processor: int
    shared_memory_per_block_optin: int  # bytes
    shared_memory_per_multiprocessor: int  # bytes
    L2_cache_size: int  # bytes
    total_memory: int  # bytes
    shared_memory_per_block: int = 48 * KIB
    max_threads_per_block: int = 1024
    regs_per_multiprocessor: int = 65_536
    warp_size: int = 32
    gcnArchName: str = ""  # AMD's

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor


DEVICES = MappingProxyType(
    {
        "sm_80": FakeDevice("A100", 8, 0, 108, 2048, 163 * KIB, 164 * KIB, 40 * MIB, 80 * GIB),
        "sm_89": FakeDevice("RTX 4090", 8, 9, 128, 1536, 99 * KIB, 100 * KIB, 72 * MIB, 24 * GIB),
        "sm_90": FakeDevice("H200", 9, 0, 132, 2048, 227 * KIB, 228 * KIB, 50 * MIB, 141 * GIB),
        "sm_120": FakeDevice("RTX 5090", 12, 0, 170, 1536, 99 * KIB, 100 * KIB, 96 * MIB, 32 * GIB),
    }
)


def _replacements(device: FakeDevice) -> dict[str, Callable[..., Any]]:
    """`module:name` → what stands there within the context; a function of its own each, by which Dynamo knows it."""
    import torch
    from torch._inductor.fx_passes import joint_graph

    def properties(_device: Any = None) -> FakeDevice:
        return device

    def flash(query: Any, key: Any, value: Any, **how: Any) -> Any:
        """torch asks the driver which kernel it should take; for 16 bits without a mask it takes flash attention."""
        if how.get("attn_mask") is not None or how.get("is_causal"):
            raise NotImplementedError("attention with a mask on a fake device")
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    register_patterns, fold = joint_graph.lazy_init, joint_graph.UniformValueConstantFolder._deduce_value

    def fold_on_cpu(folder: Any, node: Any) -> Any:
        """Inductor makes the value of a constant tensor on its device, to read one number of it."""
        if node.target is torch.ops.aten.full.default and len(node.args) == 2:
            return torch.full([1], node.args[1], dtype=node.kwargs.get("dtype"))
        return fold(folder, node)

    interface = "torch._dynamo.device_interface:CudaInterface"
    return {
        "torch.cuda:is_available": lambda: True,
        "torch.cuda:device_count": lambda: 1,
        "torch.cuda:current_device": lambda: 0,
        "torch.cuda:get_device_properties": properties,
        "torch.cuda:get_device_capability": lambda _device=None: device.capability,
        "torch.cuda:get_rng_state": lambda *_: torch.empty(0),
        "torch.cuda:set_rng_state": lambda *_: None,
        "torch.cuda:_exchange_device": lambda _index: 0,
        "torch.cuda:_maybe_exchange_device": lambda _index: 0,
        # Dynamo asks it for the current stream, Inductor's FakeTensors for a context.
        "torch.accelerator:is_available": lambda: False,
        # The interface holds the functions of torch.cuda as they were when it was imported.
        f"{interface}.device_count": staticmethod(lambda: 1),
        f"{interface}.current_device": staticmethod(lambda: 0),
        f"{interface}.get_device_properties": staticmethod(properties),
        f"{interface}.Worker.get_device_properties": staticmethod(properties),
        "torch.nn.functional:scaled_dot_product_attention": flash,
        "torch._inductor.fx_passes.joint_graph:UniformValueConstantFolder._deduce_value": fold_on_cpu,
        # Patterns of Inductor are traced with small tensors on the device of the graph; they match by structure.
        "torch._inductor.fx_passes.joint_graph:lazy_init": lambda _device=None: register_patterns(torch.device("cpu")),
    }


@contextmanager
def fake_cuda(architecture: str) -> Iterator[FakeDevice]:
    """Within it torch sees one device of `DEVICES`, and Triton compiles for it. LookupError: see `find_private`."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    device = DEVICES[architecture]
    target = GPUTarget("cuda", 10 * device.major + device.minor, device.warp_size)

    class FakeDriver(CudaDriver):
        """Triton's driver, of which compiling asks the target alone."""

        def __init__(self) -> None:
            """Loads no library of the driver."""

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    with ExitStack() as undone:
        for name, value in _replacements(device).items():
            undone.enter_context(patch.object(*find_private(name), value))
        # Not `reset_active`, which makes a driver at once.
        undone.enter_context(patch.object(*find_private("triton.runtime:driver._active"), FakeDriver()))
        yield device
