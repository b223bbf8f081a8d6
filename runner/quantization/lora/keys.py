"""LoRA keys: translate the tensor names of a LoRA file to the parameters that they change.

In:   the keys of one file, in any style in use for Wan. Out: for each key the parameter in the library's naming, and
      the key's role. Never: tensors, shapes, models.

Styles, mixed or not (N is a block):
    ComfyUI, LightX2V   diffusion_model.blocks.N.self_attn.q.{lora_down.weight,lora_up.weight,diff,diff_b}, .diff_m
    Wan2.2-Lightning    the same with .alpha, or with lora_A, lora_B for lora_down, lora_up; with or without the prefix
    diffusers, PEFT     transformer.blocks.N.attn1.to_q.{lora_A,lora_B}[.default].weight, with or without the prefix
    PEFT by itself      base_model.model.blocks.N.…, in either naming, before any of the prefixes above
    musubi-tuner        lora_unet_blocks_N_self_attn_q.{lora_down.weight,lora_up.weight,alpha}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["LoraPart", "Role", "parse_keys", "unsupported"]

Role = Literal["down", "up", "alpha", "diff", "scaled_diff"]


@dataclass(frozen=True)
class LoraPart:
    """The use of one tensor of a file.

    param:  the parameter it changes, in the library's naming ("blocks.3.attn1.to_q.weight").
    role:   "down" and "up" are the two factors of a low-rank change and "alpha" its numerator; "diff" is added
            unscaled; "scaled_diff" is added times alpha / rank of its layer (PEFT's `lora_bias`).
    module: the layer, whose alpha applies to all of its parameters.
    """

    param: str
    role: Role
    module: str


# Original name inside a block -> the library's. The original code runs norm1, norm3, norm2, and only norm3 has weights;
# the library numbers them in the order of execution, so that its norm2 is the original's norm3.
BLOCK = {
    **{f"self_attn.{a}": f"attn1.{b}" for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))},
    **{f"cross_attn.{a}": f"attn2.{b}" for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "norm2": "norm3",
    "modulation": "scale_shift_table",
}
TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "patch_embedding": "patch_embedding",
    "pose_patch_embedding": "pose_patch_embedding",
}
# Inside a block these two names have different meanings in the original naming and in the library's.
AMBIGUOUS = {"norm2", "norm3"}
ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
LIBRARY_PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."
UNDERSCORE_PREFIX = "lora_unet_"
UNDERSCORED = {name.replace(".", "_"): name for name in (*BLOCK, *TOP)}
TABLE = "scale_shift_table"  # a parameter of the model itself, without a `.weight` suffix

_ADAPTER = r"(?:\.[A-Za-z0-9_-]+)?"  # PEFT writes the adapter's name between lora_A and weight: `.default`
_SUFFIXES: tuple[tuple[re.Pattern[str], Role, str], ...] = tuple(
    (re.compile(rf"(.+)\.{suffix}"), role, leaf)  # type: ignore[misc]
    for suffix, role, leaf in (
        (r"(?:lora_down|lora\.down)\.weight", "down", "weight"),
        (r"(?:lora_up|lora\.up)\.weight", "up", "weight"),
        (rf"lora_A{_ADAPTER}\.weight", "down", "weight"),
        (rf"lora_B{_ADAPTER}\.weight", "up", "weight"),
        (rf"lora_B{_ADAPTER}\.bias", "scaled_diff", "bias"),
        (r"alpha", "alpha", "weight"),
        (r"diff", "diff", "weight"),
        (r"diff_b", "diff", "bias"),
        (r"diff_m", "diff", TABLE),
    )
)
# Parts of other adapter kinds. With them a low-rank pair is not W += up @ down.
_UNSUPPORTED = re.compile(
    r".*\.(dora_scale|lora_magnitude_vector(\..+)?|lora_mid\.weight|hada_[wt].*|lokr_[wt].*|b?oft_.*|set_weight)"
)


def unsupported(key: str) -> str | None:
    """The part in this key of another kind of adapter (DoRA, LoHa, LoKr…), or None for a LoRA's key."""
    match = _UNSUPPORTED.fullmatch(key)
    return match[1] if match else None


def parse_keys(keys: Iterable[str]) -> dict[str, LoraPart | None]:
    """Key -> its part; None for an unknown suffix. Modules without a translation keep their name.

    All keys of a file decide together: `blocks.N.norm3` is the cross-attention's norm if any other key is in the
    original naming, and the library's third norm otherwise.
    """
    split = {key: _split(key) for key in keys}
    original = any(_original(key, parts[0]) for key, parts in split.items() if parts)
    return {key: _part(*parts, original) if parts else None for key, parts in split.items()}


def _split(key: str) -> tuple[str, Role, str] | None:
    """(module in the file's naming, without prefix; role; leaf)."""
    for pattern, role, leaf in _SUFFIXES:
        if match := pattern.fullmatch(key):
            return _strip(match[1]), role, leaf
    return None


def _strip(module: str) -> str:
    module = module.removeprefix(PEFT_PREFIX)
    if module.startswith(UNDERSCORE_PREFIX):
        return _dotted(module.removeprefix(UNDERSCORE_PREFIX))
    for prefix in (*ORIGINAL_PREFIXES, LIBRARY_PREFIX):
        if module.startswith(prefix):
            return module.removeprefix(prefix)
    return module


def _dotted(module: str) -> str:
    """ "blocks_3_self_attn_q" -> "blocks.3.self_attn.q"; other names are returned unchanged."""
    if match := re.fullmatch(r"blocks_(\d+)_(.+)", module):
        return f"blocks.{match[1]}.{UNDERSCORED.get(match[2], match[2])}"
    return UNDERSCORED.get(module, module)


def _original(key: str, module: str) -> bool:
    """Does this key alone show that its file is in the original naming?"""
    if key.removeprefix(PEFT_PREFIX).startswith((*ORIGINAL_PREFIXES, UNDERSCORE_PREFIX)):
        return True
    match = re.fullmatch(r"blocks\.\d+\.(.+)", module)
    if match:
        return match[1] in BLOCK and match[1] not in AMBIGUOUS
    return TOP.get(module, module) != module


def _part(module: str, role: Role, leaf: str, original: bool) -> LoraPart:
    if leaf == TABLE:  # `blocks.N.diff_m` and `head.diff_m` name the module of the table
        owner = "" if module == "head" else f"{module}."
        return LoraPart(f"{owner}{TABLE}", role, f"{owner}{TABLE}")
    module = _translate(module, original)
    if module.rsplit(".", 1)[-1] == TABLE:
        return LoraPart(module, role, module)
    return LoraPart(f"{module}.{leaf}", role, module)


def _translate(module: str, original: bool) -> str:
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", module)
    if match is None:
        return TOP.get(module, module)
    if match[2] in AMBIGUOUS and not original:
        return module
    return f"{match[1]}.{BLOCK.get(match[2], match[2])}"
