"""Attention's backend: the order of candidates by device, the trial that each must pass, and where it is set."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName

from runner.errors import ConfigInvalid
from runner.generation.runtime import attention as module
from runner.generation.runtime.attention import (
    LIMITS,
    AttentionBackend,
    apply_attention,
    available_backends,
    candidates,
    pick_backend,
    trial,
)
from runner.spec.recipes import get_recipe

CPU = torch.device("cpu")
TORCH = {"native", "_native_flash", "_native_cudnn", "_native_math"}
ALL = TORCH | {"_flash_3", "sage", "_sage_qk_int8_pv_fp16_cuda"}


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
def test_candidates_by_device(capability, dtype, available, wanted):
    found = candidates(capability, dtype, available)
    assert [backend.name for backend in found] == wanted
    assert all(backend.why for backend in found)


def test_8_bits_where_they_run_and_an_error_where_not():
    assert [b.name for b in candidates((12, 0), "bfloat16", ALL, eight_bit=True)] == ["sage"]
    assert [b.name for b in candidates((9, 0), "bfloat16", ALL, eight_bit=True)] == ["_sage_qk_int8_pv_fp16_cuda"]
    with pytest.raises(ConfigInvalid, match=r"SageAttention 2\.1\.1 or later is not installed"):
        candidates((8, 9), "bfloat16", TORCH, eight_bit=True)
    for capability, dtype in ((None, "bfloat16"), ((7, 5), "float16"), ((9, 0), "float32")):
        with pytest.raises(ConfigInvalid, match="needs a CUDA device"):
            candidates(capability, dtype, ALL, eight_bit=True)


def test_what_is_available_downloads_nothing():
    found = available_backends()
    assert found >= TORCH
    assert not any(name.endswith("_hub") for name in found)
    assert found <= {backend.value for backend in AttentionBackendName}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, LIMITS["exact"])], ids=str)
def test_a_right_backend_passes_its_trial(dtype, most):
    assert trial("native", CPU, dtype, 8, 64) < most
    assert trial("_native_math", CPU, dtype, 1, 16) < most


def test_what_raises_or_is_wrong_is_passed_over(monkeypatch):
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
    with pytest.raises(ConfigInvalid, match="no attention computes right on cpu"):
        pick_backend(CPU, torch.bfloat16, 2, 16)


def test_self_attention_alone_is_set(tiny_store_dir):
    folder = tiny_store_dir / get_recipe("fp32").weights / "transformer"
    model = WanAnimateTransformer3DModel.from_pretrained(folder, local_files_only=True)
    said = apply_attention(model, CPU, torch.float32)
    assert said["attention"] == "native"
    assert said["attention_error"] < 1e-5
    for block in model.blocks:
        assert block.attn1.processor._attention_backend == "native"
        assert block.attn2.processor._attention_backend is None
    assert all(adapter.processor._attention_backend is None for adapter in model.face_adapter)
    with pytest.raises(ConfigInvalid, match="attention is exact then"):
        apply_attention(model, CPU, torch.bfloat16, eight_bit=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_choice_on_a_gpu_is_right_at_the_models_shape():
    name, why, error = pick_backend(torch.device("cuda"), torch.bfloat16, 40, 128)
    assert error <= LIMITS["exact"]
    assert why
    assert name != "_native_math"
