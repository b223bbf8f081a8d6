"""Loading: the recipe's models from the store onto a device, each in its precision, with the reason for every choice.

In:   a store, a recipe, a device. Out: an `AnimatePipeline`, and what was chosen in words for the log and the record.
Never: jobs. The transformer comes from the source, from a file of `quantize`, or from the published FP4 file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from runner.errors import WeightsCorrupt
from runner.generation.device import as_out_of_memory
from runner.generation.recipes import Recipe
from runner.generation.schedule import make_scheduler
from runner.generation.store import ModelStore

if TYPE_CHECKING:
    import torch

    from runner.generation.pipeline import AnimatePipeline

__all__ = ["load_pipeline", "load_transformer", "place", "see_whole_reference"]

# Beside the weights: activations at 720p (about 10 GB) and what the allocator and the autoencoder need on top.
WORKSPACE_BYTES = 12 * 2**30


def load_pipeline(
    store: ModelStore, recipe: Recipe, device: torch.device, assume: Mapping[str, str] | None = None
) -> tuple[AnimatePipeline, dict[str, Any]]:
    """The recipe's pipeline on `device`, in its precision, and what was chosen and why. Reads local files only.

    Raises WeightsCorrupt where a file does not hold exactly the model's tensors: a missing one would be filled with
    noise by the library, with a mere warning.
    """
    import torch
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging as diffusers_logging
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel
    from transformers.utils import logging as transformers_logging

    from runner.generation.pipeline import AnimatePipeline

    diffusers_logging.disable_progress_bar()  # the run has its own
    transformers_logging.disable_progress_bar()
    dtype, vae_dtype = getattr(torch, recipe.dtype), getattr(torch, recipe.vae_dtype)
    try:
        transformer, chosen = load_transformer(store, recipe, device, dtype, assume)
        text_encoder, text_why = _load_text_encoder(store, recipe, dtype)
        components = {
            "tokenizer": _load(AutoTokenizer, store, recipe, "tokenizer"),
            "image_processor": _load(CLIPImageProcessorPil, store, recipe, "image_processor"),
            "text_encoder": text_encoder,
            "image_encoder": _load_whole(CLIPVisionModel, store, recipe, "image_encoder", dtype=dtype),
            "transformer": transformer,
            "vae": _load_whole(AutoencoderKLWan, store, recipe, "vae", torch_dtype=vae_dtype),
        }
        pipeline = AnimatePipeline(scheduler=make_scheduler(recipe.scheduler, grid=recipe.grid), **components)
        see_whole_reference(pipeline.image_processor)
        return pipeline, chosen | {"text_encoder": text_why} | place(pipeline, device)
    except (RuntimeError, MemoryError) as err:
        exhausted = as_out_of_memory(err, device, doing="loading the models")
        if exhausted is None:
            raise
        raise exhausted from err


def load_transformer(
    store: ModelStore,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    assume: Mapping[str, str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The recipe's transformer, once, from the files its variant names; what was loaded, in how many bytes, and how."""
    variant = store.variant(recipe)
    said: dict[str, Any] = {"transformer": variant.why}
    if variant.kind == "source":
        from diffusers import WanAnimateTransformer3DModel

        model = _load_whole(WanAnimateTransformer3DModel, store, recipe, "transformer", torch_dtype=dtype)
    else:
        from runner.quantization.kernels import pick_kernel
        from runner.quantization.rules import transformer_on_meta

        model = transformer_on_meta(store.config(recipe, "transformer"))
        if variant.kind == "quantized":
            from runner.quantization.checkpoint_read import load_quantized

            file = load_quantized(model, variant.transformer, device, dtype)
            fmt = file.format
            said |= {"made_with": {k: v for k, v in file.metadata.items() if k.startswith("video_lab.")}}
            said |= {"fp4_layers": len(file.layers), "unverified": []}
        else:
            from runner.quantization.e2m1 import G32
            from runner.quantization.published import load_published

            published, fmt = load_published(model, variant.transformer, device, dtype, given=assume), G32
            said |= {"fp4_layers": len(published.layers), "read_as": str(published.assumptions)}
            said |= {"unverified": list(published.assumed)}
            if published.assumed:
                structlog.get_logger().warning(
                    "weights_assumed",
                    file=variant.transformer.name,
                    assumed=", ".join(published.assumed),
                    todo="video-lab weights verify --against SOURCE settles it",
                )
        kernel, why = pick_kernel(device, fmt)
        said |= {"format": fmt.name, "kernel": kernel, "kernel_why": why}
        structlog.get_logger().info("kernel_chosen", kernel=kernel, format=fmt.name, why=why)
    said["transformer_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return model, said


def _load_text_encoder(store: ModelStore, recipe: Recipe, dtype: torch.dtype) -> tuple[Any, str]:
    file = store.variant(recipe).text_encoder
    if file is None:
        from transformers import UMT5EncoderModel

        return _load_whole(UMT5EncoderModel, store, recipe, "text_encoder", dtype=dtype), "the plain folder"
    from runner.quantization.text_encoder import load_text_encoder

    return load_text_encoder(file, "cpu", dtype), f"INT4: {file.parent.name}/{file.name} is there"


def see_whole_reference(image_processor: Any) -> None:
    """Squash the reference to CLIP's square, as the original does; the shipped settings crop off head and feet."""
    crop = dict(image_processor.crop_size)
    image_processor.size = {"height": crop["height"], "width": crop["width"]}
    image_processor.do_center_crop = False


def place(pipeline: AnimatePipeline, device: torch.device) -> dict[str, str]:
    """Move the models. The encoders run once per distinct input: they stay on the host where the device is small."""
    import torch

    pipeline.compute_device = device
    encoders, why = device, "with the rest"
    if device.type == "cuda":
        models = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.image_encoder)
        # A file of FP4 is read straight onto the device: what is there already is not free any more.
        needed = sum(p.nbytes for m in models for p in m.parameters() if p.device.type != "cuda") + WORKSPACE_BYTES
        free, _total = torch.cuda.mem_get_info(device)
        if free < needed:
            encoders = torch.device("cpu")
            why = f"{free / 2**30:.0f} GiB free on the device, {needed / 2**30:.0f} GiB needed to hold all models"
    pipeline.transformer.to(device)
    pipeline.vae.to(device)
    pipeline.text_encoder.to(encoders)
    pipeline.image_encoder.to(encoders)
    return {"encoders": str(encoders), "encoders_why": why}


def _load(kind: Any, store: ModelStore, recipe: Recipe, name: str, **settings: Any) -> Any:
    folder = store.component(recipe, name)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise WeightsCorrupt(
            f"cannot be loaded ({type(err).__name__}: {err})", where=folder, todo="Download this folder again"
        ) from err


def _load_whole(kind: Any, store: ModelStore, recipe: Recipe, name: str, **settings: Any) -> Any:
    model, info = _load(kind, store, recipe, name, use_safetensors=True, output_loading_info=True, **settings)
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            some = ", ".join(str(key) for key in sorted(info[problem])[:3])
            raise WeightsCorrupt(
                f"{len(info[problem])} {problem.replace('_keys', '')} tensors ({some}, …)",
                where=store.component(recipe, name),
                todo="These are not the weights that its config.json describes; download this folder again",
            )
    return model.eval()
