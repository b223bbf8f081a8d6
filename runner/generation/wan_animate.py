"""Wan-Animate: Wan2.2-Animate-14B as a `Generator`: loaded once, every job streams through it.

In:   a model store, a recipe, a device; then requests. Out: segments of frames.
Never: manifests, outputs, retries. A failed or abandoned job leaves nothing behind that another job could see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from runner.errors import RunnerError, WeightsCorrupt
from runner.generation.base import OnStep, Request, Segment, SegmentPlan
from runner.generation.cost import Costs
from runner.generation.device import as_out_of_memory, make_probe, pick_device
from runner.generation.plan import plan_job
from runner.generation.recipes import Recipe
from runner.generation.schedule import make_scheduler
from runner.generation.store import ModelStore
from runner.metrics import StageTimer
from runner.options import JobOptions

if TYPE_CHECKING:
    import torch

    from runner.generation.pipeline import AnimatePipeline, ConditionWindow

__all__ = ["AnimateConditions", "WanAnimateGenerator", "load_pipeline"]

# Beside the weights: activations at 720p (about 10 GB) and what the allocator and the autoencoder need on top.
WORKSPACE_BYTES = 12 * 2**30


@dataclass
class AnimateConditions:
    """One prepared job: skeletons, faces and scene by the window, and what was asked of them."""

    source: Any  # preprocess.pipeline.PoseConditions
    prompt: str
    options: JobOptions

    @property
    def frames(self) -> int:
        return self.source.frames

    @property
    def fps(self) -> Fraction:
        return self.source.fps

    @property
    def width(self) -> int:
        return self.source.width

    @property
    def height(self) -> int:
        return self.source.height

    @property
    def start_s(self) -> float:
        return self.source.start_s

    @property
    def report(self) -> Mapping[str, Any]:
        return self.source.report

    @property
    def reference(self) -> Any:
        """The character, PIL RGB."""
        return self.source.reference

    def window(self, start: int, stop: int) -> ConditionWindow:
        return self.source.window(start, stop)

    def close(self) -> None:
        self.source.close()


class WanAnimateGenerator:
    """Fulfils `base.Generator`. Made by `load`; the constructor takes what `load` found."""

    def __init__(
        self,
        pipeline: AnimatePipeline,
        recipe: Recipe,
        preprocessor: Any,
        *,
        costs: Costs,
        identity: Mapping[str, str],
        description: Mapping[str, Any],
    ) -> None:
        self.pipeline: AnimatePipeline | None = pipeline
        self.recipe = recipe
        self.preprocessor = preprocessor
        self.costs = costs
        self.identity = dict(identity)
        self.description = dict(description)
        self.probe = make_probe(pipeline.compute_device)

    @classmethod
    def load(cls, store: ModelStore, recipe: Recipe, *, device: str = "auto") -> WanAnimateGenerator:
        """Check the store, load every model onto the device, say what was chosen and why.

        Raises WeightsMissing, WeightsCorrupt, ConfigInvalid (a device that is not there) or OutOfMemory.
        """
        from runner.preprocess.pipeline import Preprocessor

        picked, why = pick_device(device)
        store.check(recipe)
        preprocessor = Preprocessor.load(store.detector, store.pose, device=picked.type)
        pipeline, placement = load_pipeline(store, recipe, picked)
        description = {
            "model": "Wan2.2-Animate-14B",
            "recipe": recipe.as_dict(),
            "device": str(picked),
            "device_why": why,
            **placement,
            "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
            "preprocess": dict(preprocessor.description),
        }
        return cls(
            pipeline,
            recipe,
            preprocessor,
            costs=store.costs(recipe),
            identity=store.identities(recipe),
            description=description,
        )

    def plan(self, frames: int, size: tuple[int, int], options: JobOptions) -> SegmentPlan:
        return plan_job(frames, size, options, self.recipe, self.costs)

    def prepare(self, request: Request, timer: StageTimer) -> AnimateConditions:
        source = self.preprocessor.prepare(
            request.reference,
            request.video,
            request.options,
            mask=request.mask,
            face_size=self._loaded.transformer.config.motion_encoder_size,
            timer=timer,
        )
        return AnimateConditions(source, request.prompt, request.options)

    def generate(
        self, conditions: AnimateConditions, plan: SegmentPlan, timer: StageTimer, on_step: OnStep | None = None
    ) -> Iterator[Segment]:
        pipeline, recipe = self._loaded, self.recipe
        scheduler = make_scheduler(recipe.scheduler, grid=recipe.grid, shift=recipe.shift)  # its history is the job's
        try:
            yield from pipeline.render(
                conditions, conditions.prompt, conditions.options, plan, scheduler, timer, on_step
            )
        except RunnerError:
            raise
        except (RuntimeError, MemoryError) as err:
            exhausted = as_out_of_memory(
                err,
                pipeline.compute_device,
                doing=f"rendering {plan.segment_frames} frames of {plan.width}x{plan.height}",
            )
            if exhausted is None:
                raise
            raise exhausted from err

    def close(self) -> None:
        self.pipeline = None
        if self.probe is not None:
            import torch

            torch.cuda.empty_cache()

    @property
    def _loaded(self) -> AnimatePipeline:
        if self.pipeline is None:
            raise RuntimeError("the generator was closed")
        return self.pipeline


def load_pipeline(store: ModelStore, recipe: Recipe, device: torch.device) -> tuple[AnimatePipeline, dict[str, str]]:
    """The recipe's pipeline on `device`, in its precision, and where the encoders went and why. Reads local files only.

    Raises WeightsCorrupt where a file does not hold exactly the model's tensors: a missing one would be filled with
    noise by the library, with a mere warning.
    """
    import torch
    from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, UMT5EncoderModel
    from transformers.utils import logging as transformers_logging

    from runner.generation.pipeline import AnimatePipeline

    diffusers_logging.disable_progress_bar()  # the run has its own
    transformers_logging.disable_progress_bar()
    dtype, vae_dtype = getattr(torch, recipe.dtype), getattr(torch, recipe.vae_dtype)
    try:
        components = {
            "tokenizer": _load(AutoTokenizer, store, recipe, "tokenizer"),
            "image_processor": _load(CLIPImageProcessorPil, store, recipe, "image_processor"),
            "text_encoder": _load_whole(UMT5EncoderModel, store, recipe, "text_encoder", dtype=dtype),
            "image_encoder": _load_whole(CLIPVisionModel, store, recipe, "image_encoder", dtype=dtype),
            "transformer": _load_whole(WanAnimateTransformer3DModel, store, recipe, "transformer", torch_dtype=dtype),
            "vae": _load_whole(AutoencoderKLWan, store, recipe, "vae", torch_dtype=vae_dtype),
        }
        pipeline = AnimatePipeline(scheduler=make_scheduler(recipe.scheduler, grid=recipe.grid), **components)
        see_whole_reference(pipeline.image_processor)
        return pipeline, place(pipeline, device)
    except (RuntimeError, MemoryError) as err:
        exhausted = as_out_of_memory(err, device, doing="loading the models")
        if exhausted is None:
            raise
        raise exhausted from err


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
        needed = sum(p.numel() * p.element_size() for m in models for p in m.parameters()) + WORKSPACE_BYTES
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
