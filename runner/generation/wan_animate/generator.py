"""Generator: run Wan2.2-Animate-14B as a `Generator`, loaded once for all jobs.

In:   a model store, a recipe, a device; then requests. Out: segments of frames.
Never: manifests, outputs, retries. A failed or abandoned job leaves no state that could change another job.
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
    """One prepared job: skeletons, faces and scene window by window, its prompt and its options."""

    source: Any  # preprocess.conditions.PoseConditions
    clip: ClipInfo
    prompt: str
    options: JobOptions
    ahead: DrawnAhead | None = None  # draws the same windows before they are requested

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
        """Draw no more windows before that of `segment`; one that is being drawn is finished."""
        if self.ahead is not None:
            self.ahead.skip_to(segment)

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        self.source.close()


class WanAnimateGenerator:
    """Implements `protocol.Generator`. Use `load`; the constructor takes already loaded parts."""

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
        """`recipe`: as requested. `choice`: what the recipe leaves to the device."""
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
        self._face_size = pipeline.transformer.config.motion_encoder_size  # for `prepare`, at any time

    @classmethod
    def load(cls, models: ResolvedRecipe, settings: EngineSettings) -> WanAnimateGenerator:
        """Load every model onto the device, and describe what was chosen and why.

        Raises WeightsCorrupt, ConfigInvalid (no such device) or OutOfMemory.
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
        memory_plan, memory_report = plan_memory(models, picked, settings.memory, settings.demands())
        on_device = picked.type != "cpu" and memory_plan.preprocess == "device"
        preprocessor = Preprocessor.load(
            store.detector,
            store.pose,
            device=picked.type if on_device else "cpu",
            dwpose=store.dwpose,
            segmenter=store.segmenter,
            detector_note=store.detector_note,
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
            beside = loras.use(JobOptions())  # now: if a LoRA of every job does not fit, no job is at fault
            placement |= {"loras_beside": dict(beside)} if beside else {}
            return pipeline, loras, placement | hold_codes(pipeline, recipe)

        pipeline, loras, placement = make(memory_plan, models.recipe)
        if choice is not None:
            choice = choice.with_loaded(placement.pop("choice"))
            structlog.get_logger().info("fast_chosen", device=str(picked), **choice.as_dict())
        description = {
            "model": _model_name(models),
            "recipe": recipe.as_dict(),
            "device": str(picked),
            "device_why": why,
            **memory_report,
            "memory": memory_report["memory"] | _placement(pipeline),
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
        """The recipe as it runs, with the device's choices. `recipe` is the requested one."""
        return self.recipe if self.choice is None else self.choice.running

    @property
    def description(self) -> Mapping[str, Any]:
        """What was chosen at loading and why; also how blocks run now, as compilation may have failed."""
        step = None if self.pipeline is None else self.pipeline.block_forward
        chosen = {} if self.choice is None else {"choice": self.choice.as_dict()}
        return self._description | chosen | ({} if step is None else step.description)

    @property
    def resume_identity(self) -> Mapping[str, str]:
        """See `Generator.resume_identity`; empty once the generator is closed.

        From the preprocessing it has the two networks of every job: a resumed job detects its people again.
        """
        from runner.generation.wan_animate.low_memory import choose_eager_block, chunked_block

        pipeline, description = self.pipeline, self.description
        if pipeline is None:
            return {}
        memory = pipeline.memory
        tiles = pipeline.vae.use_tiling if memory is None else memory.vae_tiles  # as `render` sets it for large sizes
        vae = [str(pipeline.vae.dtype).removeprefix("torch."), "in tiles where large" if tiles else "whole"]
        vae += ["channels_last"] if description.get("vae_channels_last") else []
        vae += ["norms by triton"] if description.get("vae_norms") == "triton" else []
        vae += ["convolutions chosen by stopwatch"] if description.get("vae_cudnn_benchmark") else []
        parts = ("compute", "compute_product", "format", "kernel")
        compute = [str(description[name]) for name in parts if description.get(name)]
        step, chunked = pipeline.block_forward, memory is not None and memory.chunked
        by_rows = choose_eager_block(pipeline.compute_device, chunked) is chunked_block
        blocks = "eager" if step is None or step.broken else f"compiled by {step.backend}"
        return {
            "device": hardware_model(pipeline.compute_device),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "compute": ", ".join(compute),
            "attention": str(description.get("attention", "")),
            "blocks": f"{blocks}, a few rows at a time" if by_rows and blocks == "eager" else blocks,
            "autoencoder": ", ".join(vae),
            "memory": "" if memory is None else memory.mode,
            "encoders": "" if memory is None else memory.encoders,
            "preprocess": _preprocess_identity(description.get("preprocess") or {}),
        }

    @property
    def memory(self) -> MemoryPlan | None:
        """The memory plan; None for a pipeline whose models were moved by hand."""
        return self._loaded.memory

    def fall_back_memory_mode(self) -> bool:
        """Drop kept codes if there are any; else load all models again, one memory mode lower, for the rest of the run.

        Returns False below the last mode. Call it between jobs, in the thread that generates. Codes change no bits, so
        the resume identity stays the same. The preprocessing stays on its device, as it may be running. Raises what
        loading raises; the generator is closed then.
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
        self.close()  # first, so that old and new models never exist together
        gc.collect()  # the library's models have reference cycles
        release(device)
        lowered = replace(make_plan(below, self.running), preprocess=plan.preprocess)
        self.pipeline, self.loras, placement = self._make(lowered, self.running)
        if self.choice is not None:
            self.choice = self.choice.with_loaded(placement.pop("choice"))
        why = f"memory ran out in mode {plan.mode}"
        memory = self._description["memory"] | _placement(self.pipeline)
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
            "memory_why": f"memory ran out in mode {plan.mode} with kept 8-bit codes, which are now made at each use",
        }

    @contextmanager
    def calibrating(self, loras: Sequence[Lora]) -> Iterator[Any]:
        """Yield the transformer with only `loras` attached, for hooks on its linears while jobs are generated.

        Blocks run eagerly: compilation would trace the hooks, one graph for each, and its warm-up on noise would call
        them too. Afterwards the former state is restored.
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
        """Forecast bytes on the device by stage for windows of `plan`; empty without a memory plan."""
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
        """Warn of blocks that ran eagerly on a GPU because compilation failed."""
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
        from runner.generation.wan_animate.windows import DrawnAhead, segment_spans

        source = self._source(request, timer)
        clip = ClipInfo(source.frames, source.fps, source.width, source.height, source.start_s)
        plan = self.plan(clip.frames, clip.size, request.options)
        return AnimateConditions(source, clip, request.prompt, request.options, DrawnAhead(source, segment_spans(plan)))

    def _source(self, request: Request, timer: StageTimer) -> Any:
        """Return the conditions, window by window: from the official script's files, or from the driving video."""
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
            conditions.skip_to(start.segment)  # now: the window is drawn while LoRAs are attached and texts encoded
        timer.forecast.update(self.forecast(plan, conditions.options))
        steps = requested_steps(conditions.options, recipe)
        new_sampler = partial(make_sampler, recipe.scheduler, recipe.schedule, recipe.shift, steps)
        if self.loras is not None:
            with timer.stage("attach_loras", on_device=True):
                self.loras.use(conditions.options)
        try:
            if pipeline.memory is not None and pipeline.memory.keep_codes:
                with timer.stage("attach_loras", on_device=True):  # for the weights that LoRAs changed
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
    """Return the model's name for the record: the published name for a transformer of that shape."""
    shape, published = models.costs.transformer, PRODUCTION.transformer
    width = shape.num_attention_heads * shape.attention_head_dim
    wide = published.num_attention_heads * published.attention_head_dim
    if (shape.num_layers, width, shape.ffn_dim) == (published.num_layers, wide, published.ffn_dim):
        return "Wan2.2-Animate-14B"
    name = "Wan2.2-Animate demo" if (models.store.root / DEMO_MARKER).is_file() else "Wan2.2-Animate"
    return f"{name} ({shape.num_layers} layers of width {width})"


def _placement(pipeline: AnimatePipeline) -> dict[str, Any]:
    """Return the plan as it was carried out: the autoencoder may have the other 16-bit dtype than planned."""
    return {} if pipeline.memory is None else pipeline.memory.as_dict()


def _preprocess_identity(description: Mapping[str, Any]) -> str:
    """Return where the networks of every job run, and in which precision."""
    parts = [str(description.get("device", ""))]
    for name in ("detector", "pose"):
        network = description.get(name)
        if isinstance(network, Mapping):
            parts.append(f"{name} on {network.get('provider')} in {network.get('precision')}")
    return ", ".join(parts)
