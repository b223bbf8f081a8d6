"""Rules: the choice of layers to quantise, the dtypes of all other parameters, and the sizes in bytes.

In:   the transformer's config, or the model on the meta device; a rule's name. Out: predicates on names; sizes.
Never: weights, files, jobs.

`nn.Linear` modules are quantised: 521 of the 14B model, 17.2327 of its 17.2748 billion numbers. Its other matrices are
five `MotionLinear`s of the motion encoder, 2 MB in all, which read `weight` themselves. They, convolutions, norms,
tables and biases are not quantised. They have 16 bits, except the names that the model's class keeps in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from runner.errors import ConfigInvalid
from runner.quantization.formats.fp4_layout import Layout
from runner.quantization.formats.svdq_layout import SvdqLayout

__all__ = [
    "RULES",
    "WAN_ANIMATE_14B",
    "PlanRow",
    "Rule",
    "get_rule",
    "kept_in_fp32",
    "linear_shapes",
    "plan_sizes",
    "rule_for",
    "stored_dtype",
    "transformer_on_meta",
]

# The first and last layers of the model: few numbers, each with an effect on every pixel.
SENSITIVE = ("proj_out", "condition_embedder.time_embedder", "face_encoder.out_proj")


# It has 64 outputs in the 14B model; other programs that read SVDQ layers need multiples of 128 and do not pad.
NEVER_SVDQ = ("proj_out",)

# config.json of Wan-AI/Wan2.2-Animate-14B-Diffusers, for published FP4 files, which have none.
WAN_ANIMATE_14B: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "WanAnimateTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 36,
        "latent_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
        "motion_encoder_size": 512,
        "motion_style_dim": 512,
        "motion_dim": 20,
        "motion_encoder_dim": 512,
        "face_encoder_hidden_dim": 1024,
        "face_encoder_num_heads": 4,
        "inject_face_latents_blocks": 5,
        "motion_encoder_batch_size": 8,
    }
)


@dataclass(frozen=True)
class Rule:
    """The `nn.Linear`s that are not quantised: those whose name is one of `kept`, or begins with one and a dot."""

    name: str
    kept: tuple[str, ...]
    summary: str

    def keep(self, layer: str) -> bool:
        """Is the layer of this name not quantised?"""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.kept)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("all", (), "every nn.Linear: 521 of the 14B model, 9.78 GB"),
            Rule(
                "sensitive",
                SENSITIVE,
                "proj_out and face_encoder.out_proj stay in bf16, the time embedder in fp32 as its class asks: "
                "517 quantised, 103 MB more",
            ),
        )
    }
)


def get_rule(name: str) -> Rule:
    """Return the rule `name`. Raises ConfigInvalid with the list of rules."""
    if name not in RULES:
        raise ConfigInvalid(f"no rule {name!r}", todo="Rules: " + ", ".join(RULES))
    return RULES[name]


def rule_for(fmt: Layout | SvdqLayout, rule: Rule) -> Rule:
    """`rule`, which also keeps the layers that are never quantised in this format."""
    return replace(rule, kept=(*rule.kept, *NEVER_SVDQ)) if isinstance(fmt, SvdqLayout) else rule


def transformer_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Make a WanAnimateTransformer3DModel of this config: parameters on the meta device, buffers (tables) computed.

    `config` is the parsed config.json. Takes a second and almost no memory, for every size.
    """
    from accelerate import init_empty_weights
    from diffusers import WanAnimateTransformer3DModel

    with init_empty_weights(include_buffers=False):
        model: nn.Module = WanAnimateTransformer3DModel.from_config(dict(config))
    return model.eval()


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name → (out_features, in_features) of every nn.Linear, in order; no subclasses, which may compute otherwise."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    }


def kept_in_fp32(model: nn.Module) -> tuple[str, ...]:
    """Names that the model's class always keeps in float32 (diffusers' `_keep_in_fp32_modules`)."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def stored_dtype(param: str, fp32: Iterable[str], rest: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype of a parameter that is not quantised: float32 where one of the dotted parts of its name is in `fp32`.

    As diffusers does when it loads a model in bfloat16.
    """
    return torch.float32 if set(fp32) & set(param.split(".")) else rest


@dataclass(frozen=True)
class PlanRow:
    """A layer or another parameter: bytes of its codes, scales and factors, and bytes of all others (biases, norms,
    kept weights)."""

    name: str
    shape: tuple[int, ...]
    packed_bytes: int
    other_bytes: int


def plan_sizes(config: Mapping[str, Any], fmt: Layout | SvdqLayout, rule: Rule = RULES["all"]) -> list[PlanRow]:
    """List the content of a quantised file: a row for each nn.Linear and each other parameter, in the model's order.

    Rows with `packed_bytes` are quantised. Raises ValueError for a layer whose inputs do not fit the format.
    """
    model, rule = transformer_on_meta(config), rule_for(fmt, rule)
    linears, fp32 = linear_shapes(model), kept_in_fp32(model)
    rows: dict[str, PlanRow] = {}
    for param, tensor in model.named_parameters():
        layer, _, leaf = param.rpartition(".")
        name = layer if layer in linears else param
        row = rows.get(name) or PlanRow(name, linears.get(name, tuple(tensor.shape)), 0, 0)
        if leaf == "weight" and layer in linears and not rule.keep(layer):
            rows[name] = PlanRow(name, row.shape, fmt.bytes(*linears[layer]), row.other_bytes)
        else:
            size = tensor.numel() * stored_dtype(param, fp32).itemsize
            rows[name] = PlanRow(name, row.shape, row.packed_bytes, row.other_bytes + size)
    return list(rows.values())
