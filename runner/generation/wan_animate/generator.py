"""Generator: Wan2.2-Animate-14B as a `Generator`: loaded once, every job streams through it.

In:   a model store, a recipe, a device; then requests. Out: segments of frames.
Never: manifests, outputs, retries. A failed or abandoned job leaves nothing behind that another job could see.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from runner.errors import RunnerError
from runner.forecast.flops import PRODUCTION, Costs
from runner.forecast.seconds import find_device
from runner.generation.families import EngineSettings
from runner.generation.protocol import ClipInfo, OnStep, Request, ResumePoint, Segment, SegmentPlan
from runner.generation.runtime.device import (
    as_out_of_memory,
    device_name,
    grow_segments,
    hardware_model,
    make_probe,
    pick_device,
    release,
)
from runner.generation.runtime.eager_blocks import eager_cost, eager_words
from runner.generation.runtime.fast_choice import FastChoice, probe_choice
from runner.generation.runtime.memory_plan import (
    PREPROCESS_EXTRA,
    Load,
    MemoryPlan,
    forecast_memory,
    make_plan,
    next_lower_mode,
)
from runner.generation.sampling import make_sampler
from runner.generation.segments import plan_job, requested_steps
from runner.generation.wan_animate.loading import check_cudnn, hold_codes, load_pipeline, plan_memory
from runner.generation.wan_animate.loras import JobLoras
from runner.spec.options import JobOptions
from runner.spec.recipes import Recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import DEMO_MARKER

if TYPE_CHECKING:
    from runner.generation.wan_animate.pipeline import AnimatePipeline
    from runner.generation.wan_animate.windows import ConditionWindow, DrawnAhead
    from runner.quantization.lora.read import Lora
    from runner.records.people import People

__all__ = ["AnimateConditions", "WanAnimateGenerator"]


@dataclass
class AnimateConditions:
    """One prepared job: skeletons, faces and scene by the window, and what was asked of them."""

    source: Any  # preprocess.conditions.PoseConditions
    clip: ClipInfo
    prompt: str
    options: JobOptions
    ahead: DrawnAhead | None = None  # the same windows, drawn before they are asked for

    @property
    def report(self) -> Mapping[str, Any]:
        return self.source.report

    @property
    def people(self) -> People | None:
        return self.source.people

    @property
    def reference(self) -> Any:
        """The character, PIL RGB."""
        return self.source.reference

    def window(self, start: int, stop: int) -> ConditionWindow:
        return (self.ahead or self.source).window(start, stop)

    def skip_to(self, segment: int) -> None:
        """Draw no windows before that of `segment`, but for one that is being drawn."""
        if self.ahead is not None:
            self.ahead.skip_to(segment)

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        self.source.close()


class WanAnimateGenerator:
    """Fulfils `protocol.Generator`. Made by `load`; the constructor takes what `load` found."""

    def __init__(
        self,
        pipeline: AnimatePipeline,
        recipe: Recipe,
        preprocessor: Any,
        *,
        costs: Costs,
        identity: Mapping[str, str],
        description: Mapping[str, Any],
        loras: JobLoras | None = None,
        make: Callable[[MemoryPlan, Recipe], tuple[AnimatePipeline, JobLoras, dict[str, Any]]] | None = None,
        load_bytes: Load | None = None,
        choice: FastChoice | None = None,
    ) -> None:
        """`recipe`: as it was asked for. `choice`: what it left to the device, settled."""
        self.pipeline: AnimatePipeline | None = pipeline
        self.recipe = recipe
        self.choice = choice
        self.preprocessor = preprocessor
        self.costs = costs
        self.identity = dict(identity)
        self._description = dict(description)
        self.probe = make_probe(pipeline.compute_device)
        self.speed = find_device(device_name(pipeline.compute_device))
        self.loras = loras
        self.load_bytes = load_bytes
        self._make = make
        self._face_size = pipeline.transformer.config.motion_encoder_size  # `prepare` asks while the model is replaced

    @classmethod
    def load(cls, models: ResolvedRecipe, settings: EngineSettings) -> WanAnimateGenerator:
        """Load every model onto the device, and say what was chosen and why.

        Raises WeightsCorrupt, ConfigInvalid (a device that is not there) or OutOfMemory.
        """
        from runner.generation.runtime.text_cache import PromptCache
        from runner.generation.wan_animate.compiled import keep_code
        from runner.preprocess.networks.providers import NetworkOptions
        from runner.preprocess.pose_cache import POSES_FOLDER
        from runner.preprocess.prepare import Preprocessor
        from runner.storage.disk_cache import DiskCache

        store, recipe, cache = models.store, models.recipe, settings.cache
        picked, why = pick_device(settings.device)
        grow_segments(picked)
        choice = None
        if recipe.choice:
            shape = models.costs.transformer
            choice = probe_choice(recipe, picked, shape.num_attention_heads, shape.attention_head_dim)
            models = replace(models, recipe=choice.running)
        memory_plan, memory_said = plan_memory(models, picked, settings.memory, settings.demands())
        on_device = picked.type != "cpu" and memory_plan.preprocess == "device"
        preprocessor = Preprocessor.load(
            store.detector,
            store.pose,
            device=picked.type if on_device else "cpu",
            dwpose=store.dwpose,
            segmenter=store.segmenter,
            cache=DiskCache(cache / POSES_FOLDER) if cache is not None else None,
            networks=NetworkOptions(
                settings.pose_precision, settings.tensorrt, cache, arena_bytes=PREPROCESS_EXTRA if on_device else None
            ),
        )
        begin = time.monotonic()
        if cache is not None:
            keep_code(cache)

        def make(plan: MemoryPlan, running: Recipe) -> tuple[AnimatePipeline, JobLoras, dict[str, Any]]:
            pipeline, placement = load_pipeline(replace(models, recipe=running), picked, settings.assume, plan=plan)
            pipeline.divide_caches(settings.processes)
            if cache is not None:
                pipeline.prompts = PromptCache.open(cache / "prompts", models.text_digest, recipe.dtype, picked)
            loras = JobLoras(pipeline.transformer, models)
            beside = loras.use(JobOptions())  # those of every job, now: one that does not fit is no job's fault
            placement |= {"loras_beside": dict(beside)} if beside else {}
            return pipeline, loras, placement | hold_codes(pipeline, recipe)

        pipeline, loras, placement = make(memory_plan, models.recipe)
        if choice is not None:
            choice = choice.settle(placement.pop("choice"))
            structlog.get_logger().info("fast_chosen", device=str(picked), **choice.as_dict())
        description = {
            "model": _model_name(models),
            "recipe": recipe.as_dict(),
            "device": str(picked),
            "device_why": why,
            **memory_said,
            "memory": memory_said["memory"] | _placed(pipeline),
            **check_cudnn(picked, models.recipe, memory_plan),
            **placement,
            "load_s": round(time.monotonic() - begin, 3),
            "preprocess": dict(preprocessor.description),
        }
        return cls(
            pipeline,
            recipe,
            preprocessor,
            costs=models.costs,
            identity=models.digests,
            description=description,
            loras=loras,
            make=make,
            load_bytes=Load(**models.bytes),
            choice=choice,
        )

    @property
    def running(self) -> Recipe:
        """The recipe as it computes: what it leaves to the device is chosen. `recipe` is the one that was asked for."""
        return self.recipe if self.choice is None else self.choice.running

    @property
    def description(self) -> Mapping[str, Any]:
        """What was chosen at loading and why; of the blocks, what they run as by now, for compiling may have failed."""
        step = None if self.pipeline is None else self.pipeline.block_forward
        chosen = {} if self.choice is None else {"choice": self.choice.as_dict()}
        return self._description | chosen | ({} if step is None else step.description)

    @property
    def resume_identity(self) -> Mapping[str, str]:
        """See `Generator.resume_identity`; empty once the generator is closed.

        Of the preprocessing, the two networks of every job: a resumed job finds its people anew.
        """
        from runner.generation.wan_animate.low_memory import choose_eager_block, chunked_block

        pipeline, said = self.pipeline, self.description
        if pipeline is None:
            return {}
        memory = pipeline.memory
        tiles = pipeline.vae.use_tiling if memory is None else memory.vae_tiles  # as `render` sets it, of any size
        vae = [str(pipeline.vae.dtype).removeprefix("torch."), "in tiles where large" if tiles else "whole"]
        vae += ["channels_last"] if said.get("vae_channels_last") else []
        vae += ["norms by triton"] if said.get("vae_norms") == "triton" else []
        vae += ["convolutions chosen by stopwatch"] if said.get("vae_cudnn_benchmark") else []
        compute = [str(said[name]) for name in ("compute", "compute_product", "format", "kernel") if said.get(name)]
        step, chunked = pipeline.block_forward, memory is not None and memory.chunked
        by_rows = choose_eager_block(pipeline.compute_device, chunked) is chunked_block
        blocks = "eager" if step is None or step.broken else f"compiled by {step.backend}"
        return {
            "device": hardware_model(pipeline.compute_device),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "compute": ", ".join(compute),
            "attention": str(said.get("attention", "")),
            "blocks": f"{blocks}, a few rows at a time" if by_rows and blocks == "eager" else blocks,
            "autoencoder": ", ".join(vae),
            "memory": "" if memory is None else memory.mode,
            "encoders": "" if memory is None else memory.encoders,
            "preprocess": _preprocess_identity(said.get("preprocess") or {}),
        }

    @property
    def memory(self) -> MemoryPlan | None:
        """Where things are; None for a pipeline that was placed by hand."""
        return self._loaded.memory

    def fall_back_memory_mode(self) -> bool:
        """Let go of kept codes, if there are any; else load everything anew, one memory mode lower. Stay there.

        False where there is nothing below. Called between jobs, in the thread that generates. Codes change no bits: the
        resume identity stays. The preprocessing stays where it is: it may be at work. Raises what loading raises; the
        generator is closed then.
        """
        plan = self._loaded.memory
        if plan is not None and plan.keep_codes:
            self._drop_codes(plan)
            return True
        below = next_lower_mode(plan.mode) if plan is not None else None
        if plan is None or below is None or self._make is None:
            return False
        device = self._loaded.compute_device
        self.loras = None
        self.close()  # first, so that old and new are never there together
        gc.collect()  # the library's models hold references to themselves
        release(device)
        lowered = replace(make_plan(below, self.running), preprocess=plan.preprocess)
        self.pipeline, self.loras, placement = self._make(lowered, self.running)
        if self.choice is not None:
            self.choice = self.choice.settle(placement.pop("choice"))
        why = f"memory ran out in mode {plan.mode}"
        memory = self._description["memory"] | _placed(self.pipeline)
        self._description |= {**placement, "memory": memory, "memory_why": why}
        return True

    def _drop_codes(self, plan: MemoryPlan) -> None:
        from runner.quantization.kernels.kept_codes import drop_codes

        pipeline, memory = self._loaded, replace(plan, keep_codes=False)
        drop_codes(pipeline.transformer)
        release(pipeline.compute_device)
        pipeline.configure(pipeline.compute_device, memory, pipeline.blocks)
        self._description.pop("codes_kept", None)
        self._description |= {
            "memory": self._description["memory"] | memory.as_dict(),
            "memory_why": f"memory ran out in mode {plan.mode} with 8-bit codes kept: they are made at each use now",
        }

    @contextmanager
    def calibrating(self, loras: Sequence[Lora]) -> Iterator[Any]:
        """The transformer with `loras` attached and no others, while jobs are generated; for hooks on its linears.

        Its blocks run eagerly: compiled, they would be traced with the hooks in them, a graph for each, and warmed up
        on noise that the hooks see too. Afterwards all is as before.
        """
        from runner.quantization.lora.apply import attached

        pipeline = self._loaded
        before = pipeline.block_forward, self.loras
        pipeline.block_forward, self.loras = None, None
        try:
            with attached(pipeline.transformer, loras):
                yield pipeline.transformer
        finally:
            pipeline.block_forward, self.loras = before

    def forecast(self, plan: SegmentPlan, options: JobOptions) -> Mapping[str, int]:
        """Bytes on the device by stage for windows of `plan`; empty where nothing was planned."""
        memory = self._loaded.memory
        if memory is None:
            return {}
        size = plan.width, plan.height, plan.segment_frames
        cuda = self._loaded.compute_device.type == "cuda"
        return forecast_memory(
            memory,
            self.running,
            self.costs,
            *size,
            guided=options.guidance_scale > 1,
            interpolates=options.output.interpolate > 1,
            load=self.load_bytes,
            cuda=cuda,
        ).stages

    def job_warnings(self, plan: SegmentPlan, options: JobOptions) -> Sequence[str]:
        """Blocks that ran eagerly on a GPU, though they were to be compiled."""
        pipeline = self._loaded
        step = pipeline.block_forward
        if step is None or not step.broken or pipeline.compute_device.type != "cuda":
            return ()
        size, guided = (plan.width, plan.height), options.guidance_scale > 1
        return (eager_words(step.broken, eager_cost(self.costs, self.speed, size, plan.segment_frames, guided=guided)),)

    def plan(self, frames: int, size: tuple[int, int], options: JobOptions) -> SegmentPlan:
        memory = None if self.pipeline is None else self.pipeline.memory
        kept = memory is not None and memory.keep_codes
        return plan_job(frames, size, options, self.running, self.costs, self.speed, codes_kept=kept)

    def prepare(self, request: Request, timer: StageTimer) -> AnimateConditions:
        from runner.generation.wan_animate.windows import DrawnAhead, spans_of

        source = self._source(request, timer)
        clip = ClipInfo(source.frames, source.fps, source.width, source.height, source.start_s)
        plan = self.plan(clip.frames, clip.size, request.options)
        return AnimateConditions(source, clip, request.prompt, request.options, DrawnAhead(source, spans_of(plan)))

    def _source(self, request: Request, timer: StageTimer) -> Any:
        """What drives the model, by the window: from the official script's files, or of the video's own people."""
        if request.official is not None:
            from runner.preprocess.official_files import OfficialConditions

            return OfficialConditions.open(request.official, request.options, face_size=self._face_size, timer=timer)
        return self.preprocessor.prepare(
            request.reference,
            request.video,
            request.options,
            mask=request.mask,
            face_size=self._face_size,
            timer=timer,
        )

    def generate(
        self,
        conditions: AnimateConditions,
        plan: SegmentPlan,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        pipeline, recipe = self._loaded, self.recipe
        if start is not None:
            conditions.skip_to(start.segment)  # now: the window is drawn while LoRAs and texts are made ready
        timer.forecast.update(self.forecast(plan, conditions.options))
        steps = requested_steps(conditions.options, recipe)
        new_sampler = partial(make_sampler, recipe.scheduler, recipe.schedule, recipe.shift, steps)
        if self.loras is not None:
            with timer.stage("attach_loras", on_device=True):
                self.loras.use(conditions.options)
        try:
            if pipeline.memory is not None and pipeline.memory.keep_codes:
                with timer.stage("attach_loras", on_device=True):  # of the weights that LoRAs changed
                    timer.count("codes_made", hold_codes(pipeline, recipe)["codes_kept"]["made"])
            yield from pipeline.render(
                conditions, conditions.prompt, conditions.options, plan, new_sampler, timer, on_step, start
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


def _model_name(models: ResolvedRecipe) -> str:
    """For the record: the published model's name for a transformer of its shape, whatever the folder is called."""
    shape, published = models.costs.transformer, PRODUCTION.transformer
    width = shape.num_attention_heads * shape.attention_head_dim
    wide = published.num_attention_heads * published.attention_head_dim
    if (shape.num_layers, width, shape.ffn_dim) == (published.num_layers, wide, published.ffn_dim):
        return "Wan2.2-Animate-14B"
    name = "Wan2.2-Animate demo" if (models.store.root / DEMO_MARKER).is_file() else "Wan2.2-Animate"
    return f"{name} ({shape.num_layers} layers of width {width})"


def _placed(pipeline: AnimatePipeline) -> dict[str, Any]:
    """Where things are, as it came out: the plan's dtype of the autoencoder may stand for either of 16 bits."""
    return {} if pipeline.memory is None else pipeline.memory.as_dict()


def _preprocess_identity(description: Mapping[str, Any]) -> str:
    """Where the networks that every job uses run, and in which precision."""
    parts = [str(description.get("device", ""))]
    for name in ("detector", "pose"):
        network = description.get(name)
        if isinstance(network, Mapping):
            parts.append(f"{name} on {network.get('provider')} in {network.get('precision')}")
    return ", ".join(parts)
