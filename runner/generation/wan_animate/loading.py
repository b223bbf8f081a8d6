"""Loading: load the recipe's models from the store onto a device, each in its precision.

In:   a store, a recipe, a device. Out: an `AnimatePipeline`, and a report of the choices for the log and the record.
Never: jobs. The transformer comes from the published weights, from a file of `quantize`, or from the published FP4
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from runner.errors import RunnerError, WeightsCorrupt
from runner.forecast.flops import Costs
from runner.generation.protocol import JobDemand
from runner.generation.runtime.compute import capability_of
from runner.generation.runtime.device import as_out_of_memory, cudnn_problem, cudnn_version, free_bytes
from runner.generation.runtime.fast_choice import attention_fallbacks, fallbacks, try_each
from runner.generation.runtime.memory_plan import Load, MemoryPlan, Window, choose_plan, forecast_memory, make_plan
from runner.spec.recipes import Recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

if TYPE_CHECKING:
    import torch

    from runner.generation.runtime.encoders import Encoders
    from runner.generation.wan_animate.pipeline import AnimatePipeline
    from runner.quantization.formats.e2m1 import Format

__all__ = [
    "check_cudnn",
    "find_encoders",
    "hold_codes",
    "load_pipeline",
    "load_transformer",
    "move_models",
    "plan_memory",
    "squash_reference",
    "tune",
]


def load_pipeline(
    models: ResolvedRecipe,
    device: torch.device,
    assume: Mapping[str, str] | None = None,
    *,
    plan: MemoryPlan | None = None,
) -> tuple[AnimatePipeline, dict[str, Any]]:
    """Load the recipe's pipeline on `device`, and report what was chosen and why. Reads local files only.

    `plan`: by default everything on the device. The recipe has no open choice any more
    (`runtime/fast_choice.py`).
    Raises WeightsCorrupt if a file does not have exactly the model's tensors: the library would fill a missing one with
    noise and only warn.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers import AutoTokenizer, CLIPImageProcessorPil
    from transformers.utils import logging as transformers_logging

    from runner.generation.wan_animate.pipeline import AnimatePipeline

    recipe = models.recipe
    plan = plan or make_plan("resident", recipe)

    diffusers_logging.disable_progress_bar()  # the run has its own
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, recipe.dtype)
    try:
        encoders, text_why = find_encoders(models, dtype)
        transformer, loaded = load_transformer(models, device, dtype, assume, stay=plan.buffers > 0)
        vae, vae_why = _load_autoencoder(models, plan, device)
        components = {
            "tokenizer": _load(AutoTokenizer, models, "tokenizer"),
            "image_processor": _load(CLIPImageProcessorPil, models, "image_processor"),
            "text_encoder": encoders.text,
            "image_encoder": encoders.image,
            "transformer": transformer,
            "vae": vae,
        }
        pipeline = AnimatePipeline(**components)
        squash_reference(pipeline.image_processor)
        plan = replace(plan, vae_dtype=_name_of(vae.dtype))
        report = loaded | {"text_encoder": text_why} | move_models(pipeline, device, plan)
        report |= tune(pipeline, recipe, device)
        if recipe.choice:
            report["choice"]["why"]["vae"] = vae_why
        return pipeline, report
    except (RuntimeError, MemoryError) as err:
        exhausted = as_out_of_memory(err, device, doing="loading the models")
        if exhausted is None:
            raise
        raise exhausted from err


def _load_autoencoder(models: ResolvedRecipe, plan: MemoryPlan, device: torch.device) -> tuple[Any, str]:
    """Load the autoencoder in the plan's dtype.

    If the recipe leaves the choice open, a 16-bit dtype becomes the one that suits the weights; returns also why. Both
    16-bit dtypes take the same bytes.
    """
    import torch

    from runner.generation.wan_animate.autoencoder import FramewiseVae
    from runner.generation.wan_animate.half_choice import pick_half

    if not models.recipe.choice or plan.vae_dtype == "float32":
        return _load_whole(FramewiseVae, models, "vae", torch_dtype=getattr(torch, plan.vae_dtype)), ""
    dtype, why = pick_half(_load_whole(FramewiseVae, models, "vae", torch_dtype=torch.float32).to(device))
    return _load_whole(FramewiseVae, models, "vae", torch_dtype=dtype), why


def _name_of(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def load_transformer(
    models: ResolvedRecipe,
    device: torch.device,
    dtype: torch.dtype,
    assume: Mapping[str, str] | None = None,
    *,
    stay: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load the recipe's transformer from its checkpoint's files; report what was loaded, in how many bytes, and how.

    `stay`: leave the weights on the host, whichever device will compute.
    """
    variant = models.variant
    report: dict[str, Any] = {"transformer": variant.why}
    if variant.kind == "source":
        from diffusers import WanAnimateTransformer3DModel

        model = _load_whole(WanAnimateTransformer3DModel, models, "transformer", torch_dtype=dtype)
    else:
        import torch

        from runner.quantization.formats.svdq_layout import SvdqLayout
        from runner.quantization.kernels.dequantize import pick_kernel
        from runner.quantization.rules import transformer_on_meta

        target = torch.device("cpu") if stay else device
        model = transformer_on_meta(models.config("transformer"))
        if variant.kind == "quantized":
            from runner.quantization.files.checkpoint_read import load_quantized

            file = load_quantized(model, variant.transformer, target, dtype)
            fmt: Format | SvdqLayout = file.format
            report |= {"made_with": {k: v for k, v in file.metadata.items() if k.startswith("video_lab.")}}
            counted = "svdq_layers" if isinstance(fmt, SvdqLayout) else "fp4_layers"
            report |= {counted: len(file.layers), "unverified": [], **file.chosen}
        else:
            from runner.quantization.files.published import load_published
            from runner.quantization.formats.e2m1 import G32

            published, fmt = load_published(model, variant.transformer, target, dtype, given=assume), G32
            report |= {"fp4_layers": len(published.layers), "read_as": str(published.options)}
            report |= {"unverified": list(published.assumed)}
            if published.assumed:
                structlog.get_logger().warning(
                    "weights_assumed",
                    file=variant.transformer.name,
                    assumed=", ".join(published.assumed),
                    todo="Run video-lab weights verify --against SOURCE to find out how the file must be read",
                )
        if isinstance(fmt, SvdqLayout):
            kernel, why = "eager", "weights of layers that compute in 16 bits, some rows at a time"
        else:
            kernel, why = pick_kernel(device, fmt)
        report |= {"format": fmt.name, "kernel": kernel, "kernel_why": why}
        structlog.get_logger().debug("kernel_chosen", kernel=kernel, format=fmt.name, why=why)
    report["transformer_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return model, report


def find_encoders(models: ResolvedRecipe, dtype: torch.dtype) -> tuple[Encoders, str]:
    """Return both encoders, not loaded yet, and where the text encoder comes from.

    The headers of their files are read now, so that WeightsCorrupt is raised early. A run whose prompts are all cached
    on disk never loads the text encoder.
    """
    from transformers import CLIPVisionModel, UMT5EncoderModel

    from runner.generation.runtime.encoders import Encoder, Encoders

    def plain(kind: Any, name: str) -> Encoder:
        load = partial(_load_whole, kind, models, name, dtype=dtype)
        # The library reports problems of the files without reading the data.
        outline = load(device_map="meta", ignore_mismatched_sizes=True)
        return Encoder(name, load, nbytes=sum(p.nbytes for p in outline.parameters()))

    file = models.variant.text_encoder
    image = plain(CLIPVisionModel, "image_encoder")
    if file is None:
        return Encoders(plain(UMT5EncoderModel, "text_encoder"), image), "the plain folder"
    from runner.quantization.files.text_encoder import check_text_encoder, load_text_encoder

    text = Encoder(
        "text_encoder", partial(load_text_encoder, file, "cpu", dtype), nbytes=check_text_encoder(file, dtype)
    )
    return Encoders(text, image), f"INT4: {file.parent.name}/{file.name} was found"


def squash_reference(image_processor: Any) -> None:
    """Squash the reference to CLIP's square, as the official code does. The shipped settings crop head and feet."""
    crop = dict(image_processor.crop_size)
    image_processor.size = {"height": crop["height"], "width": crop["width"]}
    image_processor.do_center_crop = False


def plan_memory(
    models: ResolvedRecipe, device: torch.device, asked: str = "auto", demands: Sequence[JobDemand] = ()
) -> tuple[MemoryPlan, dict[str, Any]]:
    """Choose the memory plan on `device` by mode or `auto`, and report it for the record. Reads sizes only.

    `demands`: of the jobs to come.
    """
    load, cuda = Load(**models.bytes), device.type == "cuda"
    windows = tuple({_window(demand, models.store): None for demand in demands}) or (Window(),)
    recipe = _largest(fallbacks(models.recipe, capability_of(device)), models.costs, cuda)
    plan, why = choose_plan(asked, recipe, models.costs, free_bytes(device), windows=windows, load=load, cuda=cuda)
    structlog.get_logger().info("memory_chosen", device=str(device), mode=plan.mode, asked=asked, why=why)
    return plan, {"memory": plan.as_dict() | {"asked": asked}, "memory_why": why}


def _largest(recipes: Sequence[Recipe], costs: Costs, cuda: bool) -> Recipe:
    """Of recipes that differ in GEMM precision, return the one that takes most memory in a denoising step."""

    def denoising(recipe: Recipe) -> int:
        window = Window.width, Window.height, Window.frames
        return forecast_memory(make_plan("resident", recipe), recipe, costs, *window, cuda=cuda).stages["denoise"]

    return max(recipes, key=denoising)


def check_cudnn(device: torch.device, recipe: Recipe, plan: MemoryPlan) -> dict[str, str]:
    """Report the cuDNN version on a GPU, and its problem with 3D convolutions in 16 bits if the recipe has some."""
    import torch

    number = torch.backends.cudnn.version() if device.type == "cuda" else None
    if number is None:
        return {}
    report = {"cudnn": cudnn_version(number)}
    problem = cudnn_problem(number) if {recipe.dtype, plan.vae_dtype} != {"float32"} else None
    if problem is not None:
        todo = "Install cuDNN 9.15 or newer; `video-lab doctor` shows how"
        structlog.get_logger().warning("cudnn_is_avoided", why=problem, todo=todo)
        report["cudnn_problem"] = problem
    return report


def _window(demand: JobDemand, store: ModelStore) -> Window:
    """Return the window of a demand. An unknown size becomes the default; missing LoRAs fail their job later."""
    width, height = demand.size or (Window.width, Window.height)
    loras = 0
    with suppress(RunnerError, OSError):
        files = store.loras(demand.loras, replace=demand.replace).values() if demand.loras else ()
        loras = sum(path.stat().st_size for path, _ in files)
    return Window(width, height, demand.frames, demand.guided, demand.interpolates, loras)


def move_models(pipeline: AnimatePipeline, device: torch.device, plan: MemoryPlan) -> dict[str, Any]:
    """Move every model to its device in `plan`, and report it. After a failure some models may have been moved."""
    from runner.generation.runtime.streaming import BlockStream

    report: dict[str, Any] = {}
    blocks = None
    if plan.buffers:
        blocks = BlockStream.of(pipeline.transformer, device, buffers=plan.buffers)
        report = {"streamed_bytes": blocks.host_bytes, "pinned": blocks.pinned}
    else:
        pipeline.transformer.to(device)
    pipeline.configure(device, plan, blocks)
    pipeline.vae.to(device)
    pipeline.encoders.set_offload(device, plan.encoders)
    return report | {"encoders": str(device) if plan.encoders == "device" else plan.encoders}


def _load(kind: Any, models: ResolvedRecipe, name: str, **settings: Any) -> Any:
    folder = models.component(name)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise WeightsCorrupt(
            f"cannot be loaded ({type(err).__name__}: {err})", where=folder, todo="Download this folder again"
        ) from err


def _load_whole(kind: Any, models: ResolvedRecipe, name: str, **settings: Any) -> Any:
    model, info = _load(kind, models, name, use_safetensors=True, output_loading_info=True, **settings)
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            some = ", ".join(str(key) for key in sorted(info[problem])[:3])
            raise WeightsCorrupt(
                f"{len(info[problem])} {problem.replace('_keys', '')} tensors ({some}, …)",
                where=models.component(name),
                todo="These are not the weights that its config.json describes; download this folder again",
            )
    return model.eval()


def tune(pipeline: AnimatePipeline, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Choose and set up precision, attention and compilation, and report them for the record.

    May be called again after `pipeline.switches` has changed. Raises ConfigInvalid if this device cannot compute what
    the recipe requests, or computes it wrong. A recipe that leaves its choice to the device falls back to slower
    products or exact attention; `choice` in the report has the result.
    """
    import torch

    from runner.generation.runtime.attention import apply_attention
    from runner.generation.runtime.compute import apply_precision
    from runner.generation.wan_animate.autoencoder import prepare_vae
    from runner.generation.wan_animate.compiled import make_block_forward

    dtype = getattr(torch, recipe.dtype)
    model, capability = pipeline.transformer, capability_of(device)
    products = try_each(fallbacks(recipe, capability), lambda r: apply_precision(model, r, device))
    attention = try_each(
        attention_fallbacks(recipe),
        lambda r: apply_attention(model, device, dtype, eight_bit=r.eight_bit_attention),
    )
    report = {**products.report, **attention.report}
    if recipe.choice:
        report["choice"] = {
            "compute": products.recipe.compute,
            "attention": attention.recipe.attention,
            "vae": _name_of(pipeline.vae.dtype),
            "why": {"compute": products.refused, "attention": attention.refused},
        }
    report |= prepare_vae(pipeline.vae, pipeline.switches)
    pipeline.block_forward, why = make_block_forward(pipeline.switches, device, pipeline.memory)
    compiled_by = "eager" if pipeline.block_forward is None else pipeline.block_forward.backend
    return report | {"compile": compiled_by, "compile_why": why}


def hold_codes(pipeline: AnimatePipeline, recipe: Recipe) -> dict[str, Any]:
    """Keep the weights' 8-bit codes if the memory plan has them; report the count of layers, their bytes, and `made`.

    `made` counts the layers whose codes were made now, because weights or LoRAs have changed since the last call.
    Raises what a full device raises.
    """
    import torch

    from runner.quantization.kernels.kept_codes import keep_codes

    if pipeline.memory is None or not pipeline.memory.keep_codes:
        return {}
    return {"codes_kept": keep_codes(pipeline.transformer, getattr(torch, recipe.dtype))._asdict()}
