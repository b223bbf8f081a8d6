"""Streamed blocks against blocks that stay on the device: the same bits, in the right order, also after failures."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from runner.generation.runtime import streaming
from runner.generation.runtime.streaming import BlockStream, CopyEngine, HostCopies, PackedBuffer
from runner.quantization.formats.e2m1 import NVFP4
from runner.quantization.linear import FP4Linear
from runner.quantization.lora.apply import attach, detach
from tests.generation.wan_animate.test_transformer import Inputs, in_four_bits, load

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


class Watched(HostCopies):
    """Copies as the host does; notes every call, and refuses what would go wrong on a device that computes later."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.readers: set[int] = set()
        self.ready: set[int] = set()

    def copy(self, buffer, target, source):
        assert buffer not in self.readers, f"buffer {buffer} is overwritten while it is read"
        super().copy(buffer, target, source)
        self.ready.add(buffer)
        self.calls.append(("copy", buffer))

    def use(self, buffer):
        assert buffer in self.ready, f"buffer {buffer} is read before anything was copied into it"
        self.readers.add(buffer)
        self.calls.append(("use", buffer))

    def done(self, buffer):
        self.readers.discard(buffer)
        self.ready.discard(buffer)
        self.calls.append(("done", buffer))

    def end(self):
        self.readers.clear()
        self.ready.clear()
        self.calls.append(("end", -1))


def layers(count: int = 5) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, 8) for _ in range(count)]


def run(modules, x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = torch.tanh(module(x))
    return x


def stream_of(modules, buffers: int) -> tuple[BlockStream, Watched]:
    watched = Watched()
    engine: CopyEngine = watched
    return BlockStream([(m,) for m in modules], CPU, buffers=buffers, engine=engine), watched


@pytest.mark.parametrize("buffers", [1, 2, 3, 9])
def test_block_stream_gives_same_bits(buffers):
    modules, x = layers(), torch.randn(3, 8)
    wanted = run(modules, x)
    stream, _ = stream_of(modules, buffers)
    for _ in range(3):
        assert torch.equal(run(stream(), x), wanted)
    assert torch.equal(run(modules, x), wanted)  # outside a pass all parameters are on the host


def test_block_stream_with_two_buffers_copies_next_block_ahead():
    stream, watched = stream_of(layers(4), 2)
    run(stream(), torch.randn(1, 8))
    assert watched.calls == [
        *(("copy", 0), ("copy", 1), ("use", 0), ("done", 0)),
        *(("copy", 0), ("use", 1), ("done", 1)),
        *(("copy", 1), ("use", 0), ("done", 0)),
        *(("use", 1), ("done", 1), ("end", -1)),
    ]


def test_block_stream_with_one_buffer_copies_each_block_before_use():
    stream, watched = stream_of(layers(3), 1)
    run(stream(), torch.randn(1, 8))
    assert watched.calls == [*(("copy", 0), ("use", 0), ("done", 0)) * 3, ("end", -1)]


def test_block_in_pass_runs_on_its_buffer_and_returns_to_host():
    modules = layers(3)
    stream, _ = stream_of(modules, 2)
    host_pointers = [m.weight.data_ptr() for m in modules]
    for i, module in enumerate(stream()):
        assert module.weight.data_ptr() != host_pointers[i]
        assert [m.weight.data_ptr() for m in modules[:i]] == host_pointers[:i]
    assert [m.weight.data_ptr() for m in modules] == host_pointers
    assert stream.buffer_bytes == 2 * 512  # weight 256 bytes, bias 32 on the next boundary of 256
    assert stream.host_bytes == 3 * 512
    stream.release()
    assert stream.buffer_bytes == 0
    assert [m.weight.data_ptr() for m in modules] == host_pointers


def test_abandoned_pass_leaves_all_parameters_on_host():
    modules, x = layers(), torch.randn(3, 8)
    wanted = run(modules, x)
    stream, watched = stream_of(modules, 2)
    host_pointers = [m.weight.data_ptr() for m in modules]
    passing = stream()
    next(passing)
    next(passing)
    with pytest.raises(RuntimeError, match="still open"):
        stream()
    with pytest.raises(RuntimeError, match="still open"):
        stream.release()
    passing.close()
    assert watched.calls[-1] == ("end", -1)
    assert [m.weight.data_ptr() for m in modules] == host_pointers
    assert torch.equal(run(stream(), x), wanted)


def test_block_stream_uses_parameters_changed_between_passes():
    modules, x = layers(3), torch.randn(3, 8)
    stream, _ = stream_of(modules, 2)
    run(stream(), x)
    modules[1].weight.mul_(2)  # in place, as a merged LoRA is
    assert torch.equal(run(stream(), x), run(modules, x))
    modules[2].bias = nn.Parameter(torch.ones(8), requires_grad=False)  # another parameter
    assert torch.equal(run(stream(), x), run(modules, x))
    modules[0].register_parameter("more", nn.Parameter(torch.ones(8), requires_grad=False))
    modules[0].forward = lambda v: nn.functional.linear(v, modules[0].weight, modules[0].bias) + modules[0].more
    assert torch.equal(run(stream(), x), run(modules, x))
    modules[0].more.mul_(3)
    assert torch.equal(run(stream(), x), run(modules, x))
    modules[2].to(torch.float64)  # moved: its bytes are elsewhere now
    modules[2].to(torch.float32)
    assert torch.equal(run(stream(), x), run(modules, x))
    before = stream.host_bytes
    modules[0].more = None
    modules[0].forward = lambda v: nn.functional.linear(v, modules[0].weight, modules[0].bias)
    assert torch.equal(run(stream(), x), run(modules, x))
    assert stream.host_bytes < before


def test_block_stream_without_buffers_or_parts_is_refused():
    with pytest.raises(ValueError, match="0 buffers for 1 parts"):
        BlockStream([(nn.Linear(2, 2),)], CPU, buffers=0)
    with pytest.raises(ValueError, match="2 buffers for 0 parts"):
        BlockStream([], CPU, buffers=2)


@pytest.mark.parametrize("four_bits", [False, True], ids=["plain", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_steps_of_tiny_model_have_same_bits(tiny_store_dir, four_bits, dtype):
    model = load(tiny_store_dir, dtype)
    if four_bits:
        in_four_bits(model)
    inputs = Inputs(model)
    conditionings = inputs.conditionings(model, guided=True)
    wanted = [inputs.step(model, conditioning, i) for i in range(2) for conditioning in conditionings]
    stream = BlockStream.of(model, CPU, buffers=2)
    fresh = inputs.conditionings(model, guided=True)
    found = [inputs.step(model, conditioning, i, blocks=stream()) for i in range(2) for conditioning in fresh]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert stream.buffer_bytes < stream.host_bytes


def test_failed_step_closes_its_pass(tiny_store_dir):
    model = load(tiny_store_dir)
    inputs = Inputs(model)
    (conditioning,) = inputs.conditionings(model)
    wanted = inputs.step(model, conditioning, 0)
    stream = BlockStream.of(model, CPU, buffers=2)

    def fail(*_args):
        raise KeyError("half-way")

    with pytest.raises(KeyError) as caught:
        inputs.step(model, conditioning, 0, blocks=stream(), block_forward=fail)
    assert caught.value.__traceback__ is not None  # still held, and with it the frames of the step
    assert torch.equal(inputs.step(model, conditioning, 0, blocks=stream()), wanted)


def test_streamed_blocks_with_loras_attached_and_detached_give_same_bits(tiny_store_dir, tmp_path):
    """Factors, merged norms and biases are attached and detached on the host and used on the device."""
    from runner.quantization.lora.apply import read_lora
    from tests.generation.fp4_stores import transformer_config
    from tests.quantization.lora_files import write_published

    write_published(tmp_path / "lora.safetensors", transformer_config(tiny_store_dir))
    lora = read_lora(tmp_path / "lora.safetensors")
    models = [load(tiny_store_dir) for _ in range(2)]
    for model in models:
        in_four_bits(model)
    staying, passing = models
    stream, inputs = BlockStream.of(passing, CPU, buffers=2), Inputs(staying)

    def both() -> list[torch.Tensor]:
        here = inputs.step(staying, inputs.conditionings(staying)[0], 0)
        there = inputs.step(passing, inputs.conditionings(passing)[0], 0, blocks=stream())
        assert torch.equal(here, there)
        return [here]

    (plain,) = both()
    size = stream.host_bytes
    for model in models:
        attach(model, [lora])
    (changed,) = both()
    assert not torch.equal(changed, plain)
    assert stream.host_bytes > size
    for model in models:
        detach(model)
    assert torch.equal(both()[0], plain)
    assert stream.host_bytes == size


def test_block_stream_is_freed_after_last_reference():
    modules = layers(2)
    stream, _ = stream_of(modules, 2)
    run(stream(), torch.randn(1, 8))
    gone = weakref.ref(stream)
    del stream
    assert gone() is None


class Runtime:
    """CUDA's, as far as locking pages goes: a page is locked once."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, range] = {}

    def cudaHostRegister(self, address, size, _flags):
        pages = range(address // 4096, (address + size - 1) // 4096 + 1)
        if any(set(pages) & set(other) for other in self.locked.values()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        if not self.code:
            self.locked[address] = pages
        return self.code

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0


def test_pinned_buffer_locks_whole_pages_until_memory_is_freed(monkeypatch):
    """Small buffers come from one heap, where neighbours share a page."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    modules = layers(20)
    wanted = [module.weight.clone() for module in modules]
    packed = [PackedBuffer(list(module.parameters()), pinned=True) for module in modules]
    assert [p.pin_failed for p in packed] == [None] * 20
    assert len(runtime.locked) == 20
    assert all(torch.equal(module.weight, weight) for module, weight in zip(modules, wanted, strict=True))
    assert all(p.flat.data_ptr() % 4096 == 0 and p.flat.numel() == 4096 for p in packed)
    del packed
    assert len(runtime.locked) == 20  # the parameters still lie there
    del modules
    gc.collect()
    assert runtime.locked == {}


def test_pinned_buffer_that_cannot_be_locked_gives_reason_and_clears_error(monkeypatch):
    """CUDA keeps the error of a call and would report it for the next kernel."""
    forgotten: list[bool] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(2))
    monkeypatch.setattr(streaming, "forget_error", lambda: forgotten.append(True))
    (layer,) = layers(1)
    packed = PackedBuffer(list(layer.parameters()), pinned=True)
    assert packed.pin_failed == "cudaHostRegister returned 2"
    assert forgotten == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def blocks(self, count=6, width=2048):
        torch.manual_seed(0)
        return [nn.Linear(width, width).to(torch.bfloat16) for _ in range(count)]

    @pytest.mark.parametrize("buffers", [1, 2])
    def test_block_stream_on_gpu_gives_same_bits(self, buffers):
        device = torch.device("cuda", 0)
        x = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16)
        staying = self.blocks()
        wanted = run([m.to(device) for m in staying], x)
        stream = BlockStream([(m,) for m in self.blocks()], device, buffers=buffers)
        assert stream.pinned == "yes"
        for _ in range(5):
            assert torch.equal(run(stream(), x), wanted)

    def test_block_stream_of_packed_weights_gives_same_bits(self):
        device = torch.device("cuda", 0)
        packed = [FP4Linear.from_linear(m, NVFP4, "absmax") for m in self.blocks()]
        x = torch.randn(512, 2048, device=device, dtype=torch.bfloat16)
        stream = BlockStream([(m,) for m in packed], device, buffers=2)
        found = run(stream(), x)
        assert torch.equal(found, run([m.to(device) for m in packed], x))

    def test_block_stream_holds_only_buffers_on_device(self):
        device = torch.device("cuda", 0)
        stream = BlockStream([(m,) for m in self.blocks(12)], device, buffers=2)
        x = torch.randn(8, 2048, device=device, dtype=torch.bfloat16)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(stream(), x)
        torch.cuda.synchronize(device)
        weights = 2048 * 2048 * 2
        assert torch.cuda.max_memory_allocated(device) - before < 3 * weights
        stream.release()
        assert torch.cuda.memory_allocated(device) - before < weights

    def test_pin_that_fails_leaves_no_error_for_next_kernel(self):
        size = 1 << 22
        buffer = torch.empty(size, dtype=torch.uint8)
        assert streaming.pin(buffer) is None
        assert streaming.pin(buffer) is not None  # locked already
        assert float(torch.ones(4, device="cuda").sum()) == 4

    def test_abandoned_pass_on_gpu_allows_writes_to_host_weights(self):
        device = torch.device("cuda", 0)
        modules = self.blocks()
        stream = BlockStream([(m,) for m in modules], device, buffers=2)
        x = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16)
        passing = stream()
        next(passing)
        passing.close()
        for module in modules:
            module.weight.mul_(2)
        found = run(stream(), x)
        assert torch.equal(found, run([m.to(device) for m in modules], x))
