"""The reader of Inductor's code, on a small graph whose launches and bytes are counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.gpu_env.generated_code import GeneratedCode, TensorFacts

KERNEL = '''
async_compile.triton("triton_{0}", """
@triton_heuristics.pointwise(triton_meta={{"signature": {{{1}, "xnumel": "i32", "X": "constexpr"}}, "device": D(0)}})
@triton.jit
def triton_{0}(): pass
""", device_str="cuda")
'''
CALL = """
class Runner:
    def call(self, args):
        arg0, arg1 = args
        args.clear()
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((8, 4), (4, 1), torch.bfloat16)
            raw_stream0 = get_raw_stream(0)
            triton_norm.run(arg0, arg1, buf0, 32, stream=raw_stream0)
            buf1 = torch.ops.lab.product.default(buf0, arg1, 'name', None)
            del arg1
            buf2 = buf1
            assert_size_stride(buf2, (8, 4), (4, 1), 'lab')
            del buf1
            buf3 = torch.ops.lab.attention.default(reinterpret_tensor(buf2, (4, 8), (8, 1), 0), buf0)
            buf4 = buf3[0]
            del buf3
            buf6 = reinterpret_tensor(buf2, (32, ), (1, ), 0); del buf2  # reuse
            triton_add.run(buf6, buf4, 32, stream=raw_stream0)
            del buf4
        return (buf6, )
"""
NORM = KERNEL.format("norm", '"in_ptr0": "*bf16", "in_ptr1": "*fp32", "out_ptr0": "*bf16"')
ADD = KERNEL.format("add", '"in_out_ptr0": "*bf16", "in_ptr0": "*bf16"')
TENSORS = {
    "arg0": TensorFacts((8, 4), 64),
    "arg1": TensorFacts((4,), 16),
    "buf0": TensorFacts((8, 4), 64),
    "buf1": TensorFacts((8, 4), 64),
    "buf2": TensorFacts((8, 4), 64),
    "buf4": TensorFacts((8, 4), 64, item_of="buf3"),
    "buf5": TensorFacts((8,), 32, item_of="buf3"),  # the code never names it: it goes with buf3
    "buf6": TensorFacts((32,), 64),
}
CODE = GeneratedCode(NORM + ADD + CALL, TENSORS)


def test_launches_in_order():
    assert [launch.name for launch in CODE.launches] == [
        "triton_norm",
        "torch.ops.lab.product.default",
        "torch.ops.lab.attention.default",
        "triton_add",
    ]
    assert [launch.name for launch in CODE.triton_launches] == list(CODE.kernels) == ["triton_norm", "triton_add"]
    assert CODE.signature("triton_add") == {"in_out_ptr0": "*bf16", "in_ptr0": "*bf16", "xnumel": "i32"}
    assert CODE.launches[2].given == ("buf2", "buf0")


def test_the_peak_by_hand():
    """buf0 64, the product 64, both items of attention 64 + 32; buf0 is never deleted."""
    assert CODE.peak == 64 + 64 + 64 + 32


def test_memory_that_is_given_back_is_not_counted():
    call = CALL.replace("del buf1\n", "del buf1, buf0\n").replace(", buf0)", ", buf2)")
    assert replace(CODE, text=NORM + ADD + call).peak == 64 + 64 + 32


def test_traffic_by_hand():
    """In bfloat16 32 numbers are read and 32 written, beside 4 in float32; what is overwritten counts twice."""
    assert [CODE.traffic(launch) for launch in CODE.triton_launches] == [64 + 16 + 64, 2 * 64 + 64]


def test_who_wrote_last():
    attention, add = CODE.launches[2:]
    assert CODE.writer("buf2", attention).name == "torch.ops.lab.product.default"
    assert CODE.writer("buf0", attention).name == "triton_norm"
    assert CODE.writer("buf4", add) == attention
    with pytest.raises(ValueError, match="nothing writes arg0"):
        CODE.writer("arg0", add)


@pytest.mark.parametrize(
    ("line", "why"),
    [("buf3 = torch.ops.lab", "what does some.pool allocate"), ("args.clear()", "If in generated code")],
)
def test_what_is_not_understood_is_an_error(line, why):
    other = "buf7 = some.pool(3)\n            buf3 = torch.ops.lab" if "pool" in why else "if args: pass"
    with pytest.raises(ValueError, match=why):
        _ = replace(CODE, text=NORM + ADD + CALL.replace(line, other, 1)).peak


def test_an_argument_that_is_no_tensor_and_no_number_is_an_error():
    with pytest.raises(ValueError, match="which tensor is other"):
        _ = replace(CODE, text=NORM + ADD + CALL.replace("reinterpret_tensor(buf2, (4", "other(buf2, (4")).launches


def test_two_graphs_are_an_error():
    with pytest.raises(ValueError, match="2 functions"):
        _ = replace(CODE, text=CODE.text + CALL).launches
