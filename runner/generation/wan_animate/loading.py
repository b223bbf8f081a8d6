"""Loading: the recipe's models from the store onto a device, each in its precision, with the reason for every choice.

In:   a store, a recipe, a device. Out: an `AnimatePipeline`, and what was chosen in words for the log and the record.
Never: jobs. The transformer comes from the source, from a file of `quantize`, or from the published FP4 file.
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
    "see_whole_reference",
    "tune",
]


def load_pipeline(
    models: ResolvedRecipe,
    device: torch.device,
    assume: Mapping[str, str] | None = None,
    *,
    plan: MemoryPlan | None = None,
) -> tuple[AnimatePipeline, dict[str, Any]]:
    """The recipe's pipeline on `device`, in its precision, and what was chosen and why. Reads local files only.

    `plan`: where things go, by default everything on the device. Of a recipe that leaves its choice to the device, the
    one with the choice made (`runtime/fast_choice.py`).
    Raises WeightsCorrupt where a file does not hold exactly the model's tensors: a missing one would be filled with
    noise by the library, with a mere warning.
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
        transformer, chosen = load_transformer(models, device, dtype, assume, stay=plan.buffers > 0)
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
        see_whole_reference(pipeline.image_processor)
        plan = replace(plan, vae_dtype=_name_of(vae.dtype))
        said = chosen | {"text_encoder": text_why} | move_models(pipeline, device, plan)
        said |= tune(pipeline, recipe, device)
        if recipe.choice:
            said["choice"]["why"]["vae"] = vae_why
        return pipeline, said
    except (RuntimeError, MemoryError) as err:
        exhausted = as_out_of_memory(err, device, doing="loading the models")
        if exhausted is None:
            raise
        raise exhausted from err


def _load_autoencoder(models: ResolvedRecipe, plan: MemoryPlan, device: torch.device) -> tuple[Any, str]:
    """The autoencoder in the plan's dtype; in that of the two of 16 bits which suits its weights, and why, where the
    recipe leaves the choice open: both take the same bytes."""
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
    """The recipe's transformer, once, from the files its variant names; what was loaded, in how many bytes, and how.

    `stay`: leave the weights on the host, whatever device will compute.
    """
    variant = models.variant
    said: dict[str, Any] = {"transformer": variant.why}
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
            said |= {"made_with": {k: v for k, v in file.metadata.items() if k.startswith("video_lab.")}}
            counted = "svdq_layers" if isinstance(fmt, SvdqLayout) else "fp4_layers"
            said |= {counted: len(file.layers), "unverified": [], **file.chosen}
        else:
            from runner.quantization.files.published import load_published
            from runner.quantization.formats.e2m1 import G32

            published, fmt = load_published(model, variant.transformer, target, dtype, given=assume), G32
            said |= {"fp4_layers": len(published.layers), "read_as": str(published.options)}
            said |= {"unverified": list(published.assumed)}
            if published.assumed:
                structlog.get_logger().warning(
                    "weights_assumed",
                    file=variant.transformer.name,
                    assumed=", ".join(published.assumed),
                    todo="video-lab weights verify --against SOURCE settles it",
                )
        if isinstance(fmt, SvdqLayout):
            kernel, why = "eager", "weights of layers that compute in 16 bits, some rows at a time"
        else:
            kernel, why = pick_kernel(device, fmt)
        said |= {"format": fmt.name, "kernel": kernel, "kernel_why": why}
        structlog.get_logger().debug("kernel_chosen", kernel=kernel, format=fmt.name, why=why)
    said["transformer_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return model, said


def find_encoders(models: ResolvedRecipe, dtype: torch.dtype) -> tuple[Encoders, str]:
    """Both encoders, not read yet, and which file the text encoder is.

    Of their files the headers are read, so that WeightsCorrupt comes now. A run whose prompts are all on disk never
    reads the text encoder at all.
    """
    from transformers import CLIPVisionModel, UMT5EncoderModel

    from runner.generation.runtime.encoders import Encoder, Encoders

    def plain(kind: Any, name: str) -> Encoder:
        load = partial(_load_whole, kind, models, name, dtype=dtype)
        # The library's own account of what it would find there, without the data.
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
    return Encoders(text, image), f"INT4: {file.parent.name}/{file.name} is there"


def see_whole_reference(image_processor: Any) -> None:
    """Squash the reference to CLIP's square, as the original does; the shipped settings crop off head and feet."""
    crop = dict(image_processor.crop_size)
    image_processor.size = {"height": crop["height"], "width": crop["width"]}
    image_processor.do_center_crop = False


def plan_memory(
    models: ResolvedRecipe, device: torch.device, asked: str = "auto", demands: Sequence[JobDemand] = ()
) -> tuple[MemoryPlan, dict[str, Any]]:
    """Where things will be on `device`, by mode or `auto`, and the account of it for the record. Reads sizes only.

    `demands`: of the jobs to be ready for.
    """
    load, cuda = Load(**models.bytes), device.type == "cuda"
    windows = tuple({_window(demand, models.store): None for demand in demands}) or (Window(),)
    recipe = _largest(fallbacks(models.recipe, capability_of(device)), models.costs, cuda)
    plan, why = choose_plan(asked, recipe, models.costs, free_bytes(device), windows=windows, load=load, cuda=cuda)
    structlog.get_logger().info("memory_chosen", device=str(device), mode=plan.mode, asked=asked, why=why)
    return plan, {"memory": plan.as_dict() | {"asked": asked}, "memory_why": why}


def _largest(recipes: Sequence[Recipe], costs: Costs, cuda: bool) -> Recipe:
    """Of recipes that differ in what products compute in, the one that takes most memory in a denoising step."""

    def denoising(recipe: Recipe) -> int:
        window = Window.width, Window.height, Window.frames
        return forecast_memory(make_plan("resident", recipe), recipe, costs, *window, cuda=cuda).stages["denoise"]

    return max(recipes, key=denoising)


def check_cudnn(device: torch.device, recipe: Recipe, plan: MemoryPlan) -> dict[str, str]:
    """The version of cuDNN on a GPU, for the record, and what is wrong with it where convolutions have 16 bits."""
    import torch

    number = torch.backends.cudnn.version() if device.type == "cuda" else None
    if number is None:
        return {}
    said = {"cudnn": cudnn_version(number)}
    problem = cudnn_problem(number) if {recipe.dtype, plan.vae_dtype} != {"float32"} else None
    if problem is not None:
        todo = "Install cuDNN 9.15 or newer; `video-lab doctor` says how"
        structlog.get_logger().warning("cudnn_is_avoided", why=problem, todo=todo)
        said["cudnn_problem"] = problem
    return said


def _window(demand: JobDemand, store: ModelStore) -> Window:
    """A size that is not known is taken to be that of most jobs; LoRAs that are not there fail their job later."""
    width, height = demand.size or (Window.width, Window.height)
    loras = 0
    with suppress(RunnerError, OSError):
        files = store.loras(demand.loras, replace=demand.replace).values() if demand.loras else ()
        loras = sum(path.stat().st_size for path, _ in files)
    return Window(width, height, demand.frames, demand.guided, demand.interpolates, loras)


def move_models(pipeline: AnimatePipeline, device: torch.device, plan: MemoryPlan) -> dict[str, Any]:
    """Bring every model to where `plan` has it; what came of it. A failure leaves the models between places."""
    from runner.generation.runtime.streaming import BlockStream

    said: dict[str, Any] = {}
    blocks = None
    if plan.buffers:
        blocks = BlockStream.of(pipeline.transformer, device, buffers=plan.buffers)
        said = {"streamed_bytes": blocks.host_bytes, "pinned": blocks.pinned}
    else:
        pipeline.transformer.to(device)
    pipeline.configure(device, plan, blocks)
    pipeline.vae.to(device)
    pipeline.encoders.set_offload(device, plan.encoders)
    return said | {"encoders": str(device) if plan.encoders == "device" else plan.encoders}


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
    """Choose and set up; what was chosen, for the record. May be called again after `pipeline.switches` has changed.

    Raises ConfigInvalid where the recipe asks for what this device cannot do, or does wrongly. One that leaves its
    choice to the device goes on with slower products or exact attention instead; `choice` says what it came to.
    """
    import torch

    from runner.generation.runtime.attention import apply_attention
    from runner.generation.runtime.compute import apply_compute
    from runner.generation.wan_animate.autoencoder import prepare_vae
    from runner.generation.wan_animate.compiled import make_block_forward

    dtype = getattr(torch, recipe.dtype)
    model, capability = pipeline.transformer, capability_of(device)
    products = try_each(fallbacks(recipe, capability), lambda r: apply_compute(model, r, device))
    attention = try_each(
        attention_fallbacks(recipe),
        lambda r: apply_attention(model, device, dtype, eight_bit=r.eight_bit_attention),
    )
    said = {**products.said, **attention.said}
    if recipe.choice:
        said["choice"] = {
            "compute": products.recipe.compute,
            "attention": attention.recipe.attention,
            "vae": _name_of(pipeline.vae.dtype),
            "why": {"compute": products.refused, "attention": attention.refused},
        }
    said |= prepare_vae(pipeline.vae, pipeline.switches)
    pipeline.block_forward, why = make_block_forward(pipeline.switches, device, pipeline.memory)
    compiled_by = "eager" if pipeline.block_forward is None else pipeline.block_forward.backend
    return said | {"compile": compiled_by, "compile_why": why}


def hold_codes(pipeline: AnimatePipeline, recipe: Recipe) -> dict[str, Any]:
    """Keep the weights' 8-bit codes where the memory plan has room; how many layers, their bytes, and how many of them
    were `made` now: those whose weights or LoRAs have changed since the last call. Raises OutOfMemory's causes.
    """
    import torch

    from runner.quantization.kernels.kept_codes import keep_codes

    if pipeline.memory is None or not pipeline.memory.keep_codes:
        return {}
    return {"codes_kept": keep_codes(pipeline.transformer, getattr(torch, recipe.dtype))._asdict()}
