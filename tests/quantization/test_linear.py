"""FP4Linear against F.linear on the dequantised weight: what it holds, adds, gives back, and how it compiles."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, dequantize
from runner.quantization.linear import FP4Linear, fp4_linear, release_workspace, workspace_bytes

BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    release_workspace()


def expected(layer: FP4Linear, x: Tensor, weight_delta: Tensor | float = 0.0) -> Tensor:
    weight = dequantize(layer.stored, layer.fmt) + weight_delta
    return F.linear(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_product_with_the_dequantised_weight(fmt, bias, dtype):
    layer = FP4Linear.from_linear(nn.Linear(96, 40, bias=bias), fmt)
    for shape in [(96,), (7, 96), (2, 3, 96)]:
        x = torch.randn(shape).to(dtype)
        found = layer(x)
        assert found.dtype is dtype
        assert found.shape == (*shape[:-1], 40)
        assert torch.equal(found, expected(layer, x))


@BOTH
def test_no_full_precision_weight_is_kept(fmt):
    layer = FP4Linear.from_linear(nn.Linear(256, 512), fmt)
    held = sum(parameter.nbytes for parameter in layer.parameters()) + sum(buffer.nbytes for buffer in layer.buffers())
    assert held == fmt.bytes(512, 256) + 512 * 4  # and the bias
    layer(torch.randn(3, 256))
    assert held == sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert workspace_bytes() == 512 * 256 * 4


def test_one_workspace_serves_all_layers_and_grows_to_the_largest():
    small, wide, tall = (FP4Linear.from_linear(nn.Linear(*shape), G32) for shape in [(32, 8), (256, 64), (64, 200)])
    x = {layer: torch.randn(4, layer.in_features) for layer in (small, wide, tall)}
    wanted = {layer: expected(layer, values) for layer, values in x.items()}
    sizes = []
    for layer in (small, tall, small, wide, tall, small):
        assert torch.equal(layer(x[layer]), wanted[layer])
        sizes.append(workspace_bytes() // 4)
    assert sizes == [256, 12800, 12800, 16384, 16384, 16384]
    small(x[small].bfloat16())
    assert workspace_bytes() == 16384 * 4 + 256 * 2  # another dtype has its own
    release_workspace()
    assert workspace_bytes() == 0


def test_results_do_not_lie_in_the_workspace():
    layers = [FP4Linear.from_linear(nn.Linear(64, 64), NVFP4) for _ in range(3)]
    x = torch.randn(5, 64)
    results = [layer(x) for layer in layers]
    assert all(torch.equal(result, expected(layer, x)) for result, layer in zip(results, layers, strict=True))


def test_inference_mode_leaves_nothing_that_hurts_later():
    layer, x = FP4Linear.from_linear(nn.Linear(64, 64), G32), torch.randn(2, 64)
    with torch.inference_mode():
        first = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), first)


def test_threads_do_not_meet_in_a_workspace():
    layers = [FP4Linear.from_linear(nn.Linear(256, 128 + 32 * n), G32) for n in range(4)]
    x = torch.randn(4, 256)
    wanted = [expected(layer, x) for layer in layers]
    wrong: list[int] = []
    start = threading.Barrier(len(layers))

    def work(n: int) -> None:
        start.wait()
        for _ in range(40):
            if not torch.equal(layers[n](x), wanted[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert workspace_bytes() == 0  # this thread computed nothing


@BOTH
def test_loras_are_added_exactly_and_leave_nothing(fmt):
    layer = FP4Linear.from_linear(nn.Linear(128, 96), fmt)
    x = torch.randn(5, 128)
    before, names = layer(x), [name for name, _ in layer.named_parameters()]
    first = torch.randn(4, 128), torch.randn(96, 4), 0.7
    second = torch.randn(16, 128).to(torch.bfloat16), torch.randn(96, 16).to(torch.bfloat16), -0.3
    delta = 0.7 * first[1] @ first[0] - 0.3 * second[1].float() @ second[0].float()
    layer.set_lora([first, second])
    torch.testing.assert_close(layer(x), expected(layer, x, delta), rtol=1e-5, atol=1e-4)
    layer.set_lora([first])  # in place of both
    torch.testing.assert_close(layer(x), expected(layer, x, 0.7 * first[1] @ first[0]), rtol=1e-5, atol=1e-4)
    for nothing in (None, []):
        layer.set_lora([first])
        layer.set_lora(nothing)
        assert torch.equal(layer(x), before)
        assert [name for name, _ in layer.named_parameters()] == names
        assert list(layer.state_dict()) == names


def test_a_lora_costs_one_rounding_in_bfloat16():
    layer = FP4Linear.from_linear(nn.Linear(512, 256, bias=False), G32)
    down, up = torch.randn(8, 512).to(torch.bfloat16), torch.randn(256, 8).to(torch.bfloat16)
    layer.set_lora([(down, up, 0.01)])
    weight = layer(torch.eye(512, dtype=torch.bfloat16)).T.float()
    exact = dequantize(layer.stored, G32) + 0.01 * up.float() @ down.float()
    assert float((weight - exact).norm() / exact.norm()) < 2**-8


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_bias_delta_is_added_and_taken_back(has_bias):
    layer = FP4Linear.from_linear(nn.Linear(64, 32, bias=has_bias), G32)
    x, delta = torch.randn(3, 64), torch.randn(32)
    before = layer(x)
    layer.set_bias_delta(delta.to(torch.float16))
    torch.testing.assert_close(layer(x), before + delta.to(torch.float16).float())
    layer.set_bias_delta(None)
    assert torch.equal(layer(x), before)
    assert "bias_delta" not in layer.state_dict()


def test_deltas_that_do_not_fit_are_refused():
    layer = FP4Linear.from_linear(nn.Linear(64, 32), G32)
    for down, up in [((4, 32), (32, 4)), ((4, 64), (64, 4)), ((4, 64), (32, 8)), ((4, 64, 1), (32, 4))]:
        with pytest.raises(ValueError, match="do not fit a weight of \\[32, 64\\]"):
            layer.set_lora([(torch.zeros(down), torch.zeros(up), 1.0)])
    assert layer.lora_down is None
    with pytest.raises(ValueError, match="does not fit 32 outputs"):
        layer.set_bias_delta(torch.zeros(64))


@BOTH
def test_a_shell_takes_what_a_file_holds(fmt):
    layer = FP4Linear.from_linear(nn.Linear(64, 32), fmt)
    shell = FP4Linear.empty(64, 32, True, fmt)
    assert all(parameter.is_meta for parameter in shell.parameters())
    assert {name: parameter.shape for name, parameter in shell.named_parameters()} == {
        name: parameter.shape for name, parameter in layer.named_parameters()
    }
    shell.load_state_dict(layer.state_dict(), assign=True, strict=True)
    x = torch.randn(2, 64)
    assert torch.equal(shell(x), layer(x))
    assert not any(parameter.requires_grad for parameter in shell.parameters())


@BOTH
def test_the_dtypes_of_the_format_survive_a_cast(fmt):
    layer, x = FP4Linear.from_linear(nn.Linear(64, 32), fmt), torch.randn(2, 64)
    wanted = {name: tensor.clone() for name, tensor in layer.stored.items()}
    layer.set_lora([(torch.randn(2, 64), torch.randn(32, 2), 1 / 3)])
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        assert all(torch.equal(layer.stored[name], tensor) for name, tensor in wanted.items())
        assert layer.stored["weight_scale"].dtype is wanted["weight_scale"].dtype
        assert layer.lora_scale.dtype is torch.float32
    assert layer.bias.dtype is torch.float32
    layer.half()
    assert layer(x.half()).dtype is torch.float16
    assert all(parameter.is_meta for parameter in layer.to("meta").parameters())


def test_the_first_parameter_is_floating():
    """Models ask it for the dtype of a module: WanAnimate casts its time embedding to what it finds there."""
    for fmt in FORMATS.values():
        assert next(FP4Linear.from_linear(nn.Linear(64, 32), fmt).parameters()).is_floating_point()
        assert next(FP4Linear.from_linear(nn.Linear(64, 32, bias=False), fmt).parameters()).is_floating_point()
    assert not FP4Linear.from_linear(nn.Linear(64, 32), G32).weight.dtype.is_floating_point


class Block(nn.Module):
    """Attention and a feed-forward, in the proportions of a transformer's block."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + self.feed(self.norm(x))


def quantised_block(fmt) -> Block:
    block = Block()
    source = {name: child for name, child in block.named_modules() if type(child) is nn.Linear}
    for name, child in source.items():
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, FP4Linear.from_linear(child, fmt))
    return block.eval()


@BOTH
def test_a_compiled_block_is_one_graph(fmt):
    block, x = quantised_block(fmt), torch.randn(2, 16, 64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
        assert counter.frame_count == 1
        plain = block(x)
        for scale in (1.0, 0.5, -2.0):  # one more graph for layers with a LoRA, none for another LoRA
            block.q.set_lora([(torch.randn(4, 64), torch.randn(64, 4), scale)])
            torch.testing.assert_close(compiled(x), block(x))
            assert not torch.equal(block(x), plain)
            assert counter.frame_count == 2
        block.q.set_lora(None)
        assert torch.equal(compiled(x), plain)
        assert counter.frame_count == 2
    torch._dynamo.reset()


@BOTH
def test_the_operator_is_one(fmt):
    layer = FP4Linear.from_linear(nn.Linear(64, 32), fmt)
    weight = layer.weight_packed, layer.weight_scale, layer.weight_scale_2, fmt.name
    lora = torch.randn(4, 64), torch.randn(32, 4), torch.ones(4)
    torch.library.opcheck(fp4_linear, (torch.randn(2, 3, 64), *weight, layer.bias, torch.randn(32), *lora))
    torch.library.opcheck(fp4_linear, (torch.randn(64), *weight, None, None, None, None, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
def test_a_gpu_computes_the_same_on_any_stream(fmt):
    layer, x = FP4Linear.from_linear(nn.Linear(96, 40), fmt), torch.randn(33, 96)
    lora, delta = (torch.randn(4, 96).bfloat16(), torch.randn(40, 4).bfloat16(), 0.3), torch.randn(40)
    plain = layer(x)
    layer.set_lora([lora])
    layer.set_bias_delta(delta)
    wanted = layer(x)
    layer.cuda()
    assert all(parameter.is_cuda for parameter in layer.parameters())
    torch.testing.assert_close(layer(x.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-4)
    layer.set_lora([lora])  # from the host, beside a weight that is on the device
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = layer(x.cuda())
    side.synchronize()
    torch.testing.assert_close(beside.cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert workspace_bytes() == 2 * 40 * 96 * 4 + 40 * 96 * 4  # two streams, and what the host took
    layer.set_lora(None)
    layer.set_bias_delta(None)
    torch.testing.assert_close(layer(x.cuda()).cpu(), plain, rtol=1e-4, atol=1e-4)
    half = layer(x.cuda().bfloat16())
    assert half.dtype is torch.bfloat16
    assert float((half.cpu().float() - plain).norm() / plain.norm()) < 0.01


def test_a_layer_shows_what_it_is():
    layer = FP4Linear.from_linear(nn.Linear(64, 32), G32)
    assert repr(layer) == "FP4Linear(in_features=64, out_features=32, bias=True, format=g32)"
    layer.set_lora([(torch.zeros(4, 64), torch.zeros(32, 4), 1.0)])
    assert "lora_rank=4" in repr(layer)
