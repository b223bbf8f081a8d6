"""Attention's backend: the order of candidates by device, the trial that each must pass, and where it is set."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from runner.errors import ConfigInvalid
from runner.generation.runtime import attention as module
from runner.generation.runtime.attention import (
    BACKENDS,
    LIMITS,
    AttentionBackend,
    apply_attention,
    available_backends,
    candidates,
    pick_backend,
    run_attention,
    set_backend,
    trial,
)
from runner.spec.recipes import get_recipe

CPU = torch.device("cpu")
TORCH = {"native", "_native_flash", "_native_cudnn", "_native_math"}
SAGE = {"sage", "_sage_qk_int8_pv_fp16_cuda"}
ALL = TORCH | SAGE | {"_flash_3", "comfy_int8"}
CAPABILITIES = (None, (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))


@pytest.mark.parametrize(
    ("capability", "dtype", "available", "wanted"),
    [
        (None, "bfloat16", ALL, ["native"]),
        ((9, 0), "bfloat16", ALL, ["_flash_3", "_native_cudnn", "_native_flash", "native"]),
        ((9, 0), "bfloat16", TORCH, ["_native_cudnn", "_native_flash", "native"]),
        ((9, 0), "float32", ALL, ["native"]),
        ((8, 0), "bfloat16", ALL, ["_native_flash", "native"]),
        ((8, 9), "bfloat16", ALL, ["_native_flash", "native"]),
        ((12, 0), "bfloat16", ALL, ["_native_flash", "native"]),
        ((12, 0), "bfloat16", {"native"}, ["native"]),
    ],
)
def test_candidates_on_device_come_in_expected_order(capability, dtype, available, wanted):
    found = candidates(capability, dtype, available)
    assert [backend.name for backend in found] == wanted
    assert all(backend.why for backend in found)


@pytest.mark.parametrize(
    ("capability", "available", "wanted"),
    [
        ((12, 0), ALL, ["comfy_int8", "sage"]),
        ((9, 0), ALL, ["comfy_int8", "_sage_qk_int8_pv_fp16_cuda"]),
        ((8, 0), ALL - SAGE, ["comfy_int8"]),
        ((7, 5), ALL, ["comfy_int8"]),
        ((8, 9), ALL - {"comfy_int8"}, ["sage"]),
    ],
)
def test_candidates_in_8_bits_prefer_comfy_kitchen_to_sage_attention(capability, available, wanted):
    assert [b.name for b in candidates(capability, "bfloat16", available, eight_bit=True)] == wanted


def test_candidates_in_8_bits_without_backend_raise_with_remedy():
    with pytest.raises(ConfigInvalid) as caught:
        candidates((8, 9), "bfloat16", TORCH, eight_bit=True)
    said = caught.value.message
    assert "comfy-kitchen 0.2.40 with int8_attention is not installed" in said
    assert "SageAttention 2.1.1 or later is not installed" in said
    assert "Install it with pip install 'video-lab-runner[gpu]', or build SageAttention" in said
    assert said.endswith("or leave it out: then attention is exact")
    for capability, dtype in ((None, "bfloat16"), ((7, 0), "float16"), ((9, 0), "float32")):
        with pytest.raises(ConfigInvalid, match=r"needs a CUDA device of capability 7\.5"):
            candidates(capability, dtype, ALL, eight_bit=True)


def test_backends_table_rows_equal_candidates_of_all_devices():
    found = set()
    for capability in CAPABILITIES:
        for dtype in ("bfloat16", "float16", "float32"):
            found |= {backend.name for backend in candidates(capability, dtype, ALL)}
            if capability is not None and capability >= (7, 5) and dtype != "float32":
                found |= {backend.name for backend in candidates(capability, dtype, ALL, eight_bit=True)}
    assert found == set(BACKENDS)


def test_available_backends_contain_no_downloaded_kernels():
    found = available_backends()
    assert found >= TORCH
    assert not any(name.endswith("_hub") for name in found)
    assert found <= {backend.value for backend in AttentionBackendName} | {"comfy_int8"}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, LIMITS["exact"])], ids=str)
def test_trial_of_correct_backend_passes(dtype, most):
    assert trial("native", CPU, dtype, 8, 64) < most
    assert trial("_native_math", CPU, dtype, 1, 16) < most


def test_pick_backend_skips_backends_that_raise_or_are_wrong(monkeypatch):
    errors = {"_flash_3": RuntimeError("no kernel image\nmore"), "_native_cudnn": 0.5, "_native_flash": 0.004}

    def tried(name, *_):
        if isinstance(errors[name], Exception):
            raise errors[name]
        return errors[name]

    monkeypatch.setattr(module, "trial", tried)
    monkeypatch.setattr(
        module, "candidates", lambda *_: [AttentionBackend(name, f"{name} is there") for name in errors]
    )
    name, why, error = pick_backend(CPU, torch.bfloat16, 2, 16)
    assert (name, error) == ("_native_flash", 0.004)
    assert why == (
        "_native_flash is there; _flash_3 refused: RuntimeError: no kernel image; "
        "_native_cudnn refused: error 0.5000, 0.01 allowed"
    )
    errors["_native_flash"] = float("nan")
    with pytest.raises(ConfigInvalid, match="no attention backend passes its trial on cpu"):
        pick_backend(CPU, torch.bfloat16, 2, 16)


@pytest.mark.parametrize(
    "comfy", [RuntimeError("requires the CUDA extension on SM75 or newer"), 0.2], ids=["raises", "off"]
)
def test_pick_backend_in_8_bits_with_failed_package_takes_next_with_reason(monkeypatch, comfy):
    errors = {"comfy_int8": comfy, "sage": 0.03}

    def tried(name, *_):
        if isinstance(errors[name], Exception):
            raise errors[name]
        return errors[name]

    monkeypatch.setattr(module, "trial", tried)
    monkeypatch.setattr(module, "available_backends", lambda: frozenset(ALL))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    name, why, error = pick_backend(torch.device("cuda"), torch.bfloat16, 40, 128, eight_bit=True)
    assert (name, error) == ("sage", 0.03)
    assert why.startswith("asked for; SageAttention is installed; comfy_int8 refused: ")
    assert ("CUDA extension" if isinstance(comfy, Exception) else "error 0.2000, 0.06 allowed") in why
    monkeypatch.setattr(module, "available_backends", lambda: frozenset(ALL - SAGE))
    with pytest.raises(ConfigInvalid) as caught:
        pick_backend(torch.device("cuda"), torch.bfloat16, 40, 128, eight_bit=True)
    said = caught.value.message
    assert "comfy_int8 refused" in said and "SageAttention 2.1.1 or later is not installed" in said
    assert "Build SageAttention from its repository" in said and "pip install" not in said
    errors["comfy_int8"] = 0.03
    assert pick_backend(torch.device("cuda"), torch.bfloat16, 40, 128, eight_bit=True)[0] == "comfy_int8"


def test_available_backends_find_comfy_kitchen_by_its_function(monkeypatch):
    for package, found in (
        (SimpleNamespace(int8_attention=None), True),
        (SimpleNamespace(int8_linear=None), False),  # an older release
        (None, False),
    ):
        monkeypatch.setitem(sys.modules, "comfy_kitchen", package)
        assert ("comfy_int8" in available_backends()) == found


def test_run_attention_call_of_comfy_kitchen_fits_its_signature():
    package = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    called = []

    def take(*given, **more):
        inspect.signature(package.int8_attention).bind(*given, **more)
        called.append((given, more))
        return given[0].contiguous()

    query, key, value = (torch.randn(1, tokens, 4, 128, dtype=torch.bfloat16) for tokens in (70, 50, 50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "int8_attention", take)
        run_attention(query, key, value, "comfy_int8")
    (given, more) = called.pop()
    assert not more
    # Its own check, but for the device: layout, dtypes, strides, head_dim.
    validate = sys.modules["comfy_kitchen.sage_attention"]._validate_inputs
    with pytest.raises(ValueError, match="must be on the same CUDA device"):
        validate(*given, None)
    assert [tuple(x.shape) for x in given] == [(1, 4, 70, 128), (1, 4, 50, 128), (1, 4, 50, 128)]
    assert all(x.stride(-1) == 1 for x in given)
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in (query, key, value)]  # views


@pytest.mark.parametrize("name", sorted(name for name, row in BACKENDS.items() if row.opaque))
def test_opaque_backend_gets_views_of_inputs_and_returns_contiguous_output(name, monkeypatch):
    taken = stub_package(monkeypatch, name)
    query, key, value = (torch.randn(1, tokens, 2, 16, dtype=torch.bfloat16) for tokens in (9, 7, 7))
    found = run_attention(query, key, value, name)
    assert found.shape == query.shape and found.is_contiguous()
    torch.testing.assert_close(found, run_attention(query, key, value, "native"), rtol=0.02, atol=0.02)
    assert taken == [x.data_ptr() for x in (query, key, value)]
    torch.library.opcheck(module.opaque_attention, (query, key, value, name), test_utils="test_faketensor")


def stub_package(monkeypatch, name: str, prepare=lambda: None) -> list[int]:
    """Put torch's attention in the place of the package that row `name` calls, in the package's own layout.

    Returns where the arguments of the first call lay, once it was made. `prepare` runs in each, as part of the package.
    """
    taken: list[int] = []

    def attend(q, k, v):
        if not taken:
            taken.extend(x.data_ptr() for x in (q, k, v))
        prepare()
        return torch._scaled_dot_product_attention_math(q, k, v)[0]

    def tokens_first(q, k, v, *_, **more):
        assert more.get("tensor_layout", "NHD") == "NHD"
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    if name == "comfy_int8":
        monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(int8_attention=attend))
    elif name == "_native_cudnn":
        monkeypatch.setattr(module, "sdpa_kernel", lambda _: nullcontext())
        monkeypatch.setattr(module, "functional", SimpleNamespace(scaled_dot_product_attention=attend))
    elif name == "_flash_3":  # the library's own operator round the package has no kernel but for CUDA
        monkeypatch.setattr(attention_dispatch, "_wrapped_flash_attn_3", lambda **kw: (tokens_first(**kw), None))
    else:
        function = {"sage": "sageattn"}.get(name, name.removeprefix("_").replace("sage", "sageattn"))
        assert hasattr(attention_dispatch, function)
        monkeypatch.setattr(attention_dispatch, function, tokens_first)
    return taken


def test_apply_attention_sets_only_self_attention(tiny_store_dir):
    folder = tiny_store_dir / get_recipe("fp32").weights / "transformer"
    model = WanAnimateTransformer3DModel.from_pretrained(folder, local_files_only=True)
    said = apply_attention(model, CPU, torch.float32)
    assert said["attention"] == "native"
    assert said["attention_error"] < 1e-5
    for block in model.blocks:
        assert block.attn1.processor._attention_backend == "native"
        assert block.attn2.processor._attention_backend is None
    assert all(adapter.processor._attention_backend is None for adapter in model.face_adapter)
    with pytest.raises(ConfigInvalid, match="then attention is exact"):
        apply_attention(model, CPU, torch.bfloat16, eight_bit=True)
    for name in BACKENDS:  # the library's own enumeration lacks one
        set_backend(model.blocks[0].attn1, name)
        assert model.blocks[0].attn1.processor._attention_backend == name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pick_backend_on_gpu_is_within_limit_at_model_shape():
    name, why, error = pick_backend(torch.device("cuda"), torch.bfloat16, 40, 128)
    assert error <= LIMITS["exact"]
    assert why
    assert name != "_native_math"
