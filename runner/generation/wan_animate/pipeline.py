"""Pipeline: run Wan-Animate's segment loop, one window of frames at a time, on top of diffusers' WanAnimatePipeline.

In:   a source of conditions (uint8 windows on the host), a prompt, options, a plan, a function that makes a sampler.
Out:  each segment's frames as soon as it is decoded. Never: files, manifests, where the weights came from.

The parent's `__call__` keeps the whole clip on the device, yields nothing until the end, and computes for each job what
many jobs share. Its `encode_*` and `prepare_*` methods are called here in the same order with the same values. With the
same schedule and the same CLIP setting the frames are therefore equal bit for bit; the tests compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import WanAnimatePipeline
from PIL import Image

from runner.errors import NotFinite
from runner.generation.colour import SegmentColours, TrueBackground, without_colours
from runner.generation.protocol import OnStep, ResumePoint, Segment, SegmentPlan
from runner.generation.runtime.encoders import Encoder, Encoders
from runner.generation.runtime.finite import FiniteChecks
from runner.generation.runtime.memory_plan import MemoryPlan
from runner.generation.runtime.streaming import BlockStream
from runner.generation.runtime.tensor_cache import HOST_BYTES, TensorCache
from runner.generation.runtime.text_cache import PromptCache
from runner.generation.sampling import NewSampler, Predict, denoise
from runner.generation.segments import output_span
from runner.generation.wan_animate.autoencoder import decode_latents
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.generation.wan_animate.low_memory import choose_eager_block, chunked_face
from runner.generation.wan_animate.resume_points import make_resume_point, restore_state
from runner.generation.wan_animate.transformer import (
    ConditioningCache,
    Context,
    Strengths,
    Switches,
    denoise_step,
    embed_context,
    held_bytes,
)
from runner.generation.wan_animate.windows import (
    CfgCall,
    ConditionSource,
    ConditionWindow,
    JobTensors,
    WindowTensors,
    apply_cfg,
    digest_frames,
    digest_image,
    no_face,
    padded_window,
    to_pixels,
    to_uint8,
    to_unit,
)
from runner.spec.options import JobOptions
from runner.timing import CallTimer, StageTimer

__all__ = ["AnimatePipeline", "ConditionSource", "ConditionWindow", "Switches", "to_pixels", "to_uint8"]

TEXT_TOKENS = 512  # attention takes the last 512 tokens as text and the others as image; any other count would mix them
# The part of the cache above which values of one name evict their own oldest: a clip of an hour evicts no prompt.
CACHE_SHARES = {"pose_latents": 0.6, "scene": 0.2}


class AnimatePipeline(WanAnimatePipeline):
    """WanAnimatePipeline with a segment loop that streams. Between jobs it keeps its tensor cache and nothing else.

    The two encoders may be models, or `Encoder`s, which are loaded when the first job needs them.
    `compute_device`: the device of transformer and autoencoder, and of the encoders while they compute.
    `prompts`: the cache of embeddings on disk, if set.
    `switches`: feature flags for optimisations; read when a job starts.
    `block_forward`: runs blocks as compiled code, if set (`compiled.make_block_forward`).
    `memory`, `blocks`: the memory plan, and the streamed blocks if they are not on the device; set by `configure`.
    `kept_bytes`: the largest conditioning cache of a window in the last job. It is freed when the window ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        image_processor: Any,
        image_encoder: Any,
        transformer: Any,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, None, image_processor, image_encoder, transformer)
        self.compute_device = torch.device("cpu")
        self.switches = Switches()
        self.block_forward: CompiledBlocks | None = None
        self.kept_bytes = 0
        self.memory: MemoryPlan | None = None
        self.blocks: BlockStream | None = None
        self.tensor_cache = TensorCache(share=CACHE_SHARES)
        self.prompts: PromptCache | None = None

    def divide_caches(self, processes: int) -> None:
        """Replace the tensor cache by an empty one of at most HOST_BYTES / `processes`."""
        self.tensor_cache = TensorCache(HOST_BYTES // processes, share=CACHE_SHARES)

    def configure(self, device: torch.device, memory: MemoryPlan, blocks: BlockStream | None) -> None:
        """Set the device that computes, the memory plan, and the stream of blocks if they do not stay on the device."""
        self.compute_device, self.memory, self.blocks = device, memory, blocks

    # The parent reads and sets its encoders by these names. Reading loads the encoder.

    @property
    def encoders(self) -> Encoders:
        """Text and image encoder, loaded or not."""
        return Encoders(self._text_encoder, self._image_encoder)

    @property
    def text_encoder(self) -> Any:
        return self._text_encoder.model

    @text_encoder.setter
    def text_encoder(self, model: Any) -> None:
        self._text_encoder = model if isinstance(model, Encoder) else Encoder.of("text_encoder", model)

    @property
    def image_encoder(self) -> Any:
        return self._image_encoder.model

    @image_encoder.setter
    def image_encoder(self, model: Any) -> None:
        self._image_encoder = model if isinstance(model, Encoder) else Encoder.of("image_encoder", model)

    @torch.no_grad()  # as the parent; cached values stay ordinary tensors
    def render(
        self,
        source: ConditionSource,
        prompt: str,
        options: JobOptions,
        plan: SegmentPlan,
        new_sampler: NewSampler,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        """Yield each segment's new frames, uint8, with the skeletons that drove them; plan.frames in all.

        `new_sampler` is called for each window. `on_step` may raise to abandon the job. With `start`, yields the
        segments from there on. Raises NotFinite instead of yielding a segment made from NaN or infinity, and
        InternalError if `start` does not fit.
        """
        if start is not None and start.segment == plan.segments:
            return
        if self.memory is not None:
            self.vae.use_tiling = self.memory.tiled(plan.width, plan.height)
        try:
            generator = torch.Generator("cpu").manual_seed(options.seed)  # for all windows, equal on all devices
            first_index, previous = 0, None
            colours = SegmentColours(options.colour, plan.segments, replace=options.mode == "replace")
            if start is not None:  # before encoding: a point that does not fit fails early
                first_index = start.segment
                point = without_colours(start)
                previous = restore_state(point, plan, self.vae.dtype, self.compute_device, generator)
                colours.restore(start)
            text, negative = self._texts(prompt, options, timer)
            clip, reference = self._reference(source.reference, plan, timer)
            contexts = self._contexts(text, negative, clip, timer)
            self.kept_bytes = 0
            checks = FiniteChecks()
            job = JobTensors(
                plan,
                new_sampler,
                timer,
                on_step,
                options.guidance_scale,
                Strengths(options.face_strength, options.pose_strength),
                text,
                negative,
                clip,
                reference,
                checks,
                contexts,
            )
            _check_shared(job)
            for index in range(first_index, plan.segments):
                begin = index * (plan.segment_frames - plan.overlap_frames)
                drawn = padded_window(source, plan.frames, begin, begin + plan.segment_frames, options.mode)
                with timer.stage("encode_conditions", on_device=True):
                    window = self._encode(job, index, drawn, previous, generator)
                self._warm(job, window)
                self._make_room()
                with timer.stage("denoise", on_device=True):
                    latents = self._denoise(job, index, window)
                self._make_room()
                del window
                first, last = (
                    at - begin for at in output_span(index, plan.segment_frames, plan.overlap_frames, plan.frames)
                )
                frames, previous = self._decode(job, colours, latents, begin, (first, last), drawn, previous)
                del latents
                with timer.stage("vae_decode", on_device=True):
                    resume = colours.add_state(make_resume_point(index + 1, plan, previous, generator))
                yield Segment(index, frames, drawn.pose[first:last], resume, colours.drift)
        except NotFinite:
            self.tensor_cache.clear()  # cached values may have NaN or infinity too
            raise
        finally:
            self.vae.clear_cache()  # an abandoned encode or decode leaves feature maps of full size behind

    def _texts(self, prompt: str, options: JobOptions, timer: StageTimer) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return embeddings [1, 512, text_dim] of the prompt and, with CFG, of the negative prompt."""
        guided = options.guidance_scale > 1
        return self.embed(prompt, timer), self.embed(options.negative_prompt or "", timer) if guided else None

    @torch.no_grad()
    def embed(self, text: str, timer: StageTimer) -> torch.Tensor:
        """Return [1, 512, text_dim] of one text, from memory, disk or the encoder. May be called before any job."""
        dtype = self.transformer.dtype

        def encode() -> torch.Tensor:
            with self._text_encoder.loaded(timer), timer.stage("encode_prompt", on_device=True):
                embeds, _negative = self.encode_prompt(
                    text,
                    do_classifier_free_guidance=False,
                    max_sequence_length=TEXT_TOKENS,
                    device=self.compute_device,
                )
                return embeds.to(dtype)

        def find() -> torch.Tensor:
            if self.prompts is None:
                return encode()
            return self.prompts.get(text, TEXT_TOKENS, dtype, encode, timer).to(self.compute_device)

        return self._shared("prompt", lambda: (text, dtype), find, timer)

    def _shared(
        self, name: str, key: Callable[[], Hashable], make: Callable[[], torch.Tensor], timer: StageTimer
    ) -> torch.Tensor:
        """Return the cached value for `key`, else what `make` returns."""
        return self.tensor_cache.get(name, key(), make, timer) if self.switches.tensor_cache else make()

    def _vae_key(self) -> tuple[Hashable, ...]:
        """Return what the autoencoder's results depend on beside its input; its weights are those of this pipeline."""
        return self.vae.dtype, self.vae.use_tiling, self.vae.use_slicing

    def _contexts(
        self, text: torch.Tensor, negative: torch.Tensor | None, clip: torch.Tensor, timer: StageTimer
    ) -> list[Context]:
        """Embed text and image with the transformer's embedders, once per job.

        The result is not cached between jobs: a job's LoRAs may change the embedders, and they take milliseconds.
        """
        with timer.stage("encode_prompt", on_device=True):
            return embed_context(self.transformer, [text] if negative is None else [text, negative], clip)

    def _reference(self, image: Image.Image, plan: SegmentPlan, timer: StageTimer) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CLIP's features of the whole image, and its latents, scaled into width x height on black."""
        digest, device, dtype = digest_image(image), self.compute_device, self.transformer.dtype

        def look() -> torch.Tensor:
            with self._image_encoder.loaded(timer), timer.stage("encode_image", on_device=True):
                return self.encode_image(image, device).to(dtype)

        def encode() -> torch.Tensor:
            boxed = self.vae_image_processor.preprocess(image, height=plan.height, width=plan.width, resize_mode="fill")
            return self.prepare_reference_image_latents(boxed.to(device, torch.float32), device=device)

        clip = self._shared("clip", lambda: (digest, dtype), look, timer)
        with timer.stage("encode_reference", on_device=True):
            key = (digest, plan.width, plan.height, self._vae_key())
            return clip, self._shared("reference", lambda: key, encode, timer)

    def _encode(
        self,
        job: JobTensors,
        index: int,
        drawn: ConditionWindow,
        previous: torch.Tensor | None,
        generator: torch.Generator,
    ) -> WindowTensors:
        """Return noise and conditions of window `index` on the device. Draws one window's noise from `generator`."""
        plan, device, dtype = job.plan, self.compute_device, self.transformer.dtype
        noise = self.prepare_latents(
            1,
            num_channels_latents=self.vae.config.z_dim,
            height=plan.height,
            width=plan.width,
            num_frames=plan.segment_frames,
            dtype=torch.float32,
            device=device,
            generator=generator,
        )
        pose, scene = self._pose(job, drawn.pose), self._scene(job, index, drawn, previous)
        segment = f"segment {index + 1} of {plan.segments}"
        job.checks.add("encode_conditions", f"the skeletons' latents, {segment}", pose)
        job.checks.add("encode_conditions", f"the scene's latents, {segment}", scene)
        return WindowTensors(
            noise=noise,
            pose=pose,
            scene=torch.cat([job.reference, scene], dim=2),
            faces=to_pixels(drawn.face, device).to(dtype),
        )

    def _pose(self, job: JobTensors, skeletons: np.ndarray) -> torch.Tensor:
        """Return latents of a window's skeletons in the transformer's dtype, cached by the skeletons' content.

        Features of the faces are not cached: a job's LoRAs may change them, and they take 0.03 % of a job.
        """
        device, dtype = self.compute_device, self.transformer.dtype

        def encode() -> torch.Tensor:
            return self.prepare_pose_latents(to_pixels(skeletons, device), device=device).to(dtype)

        return self._shared(
            "pose_latents", lambda: (digest_frames(skeletons), dtype, self._vae_key()), encode, job.timer
        )

    def _scene(
        self, job: JobTensors, index: int, drawn: ConditionWindow, previous: torch.Tensor | None
    ) -> torch.Tensor:
        """Return mask and latents of the given content of the window: the last window's end, then the scene or nothing.

        Without a scene the first window is blank, and equal for all jobs of the same size.
        """
        plan, device = job.plan, self.compute_device

        def encode() -> torch.Tensor:
            return self.prepare_prev_segment_cond_latents(
                previous,
                background_video=None if drawn.background is None else to_pixels(drawn.background, device),
                mask_video=None if drawn.mask is None else to_unit(drawn.mask, device),
                segment_frame_length=plan.segment_frames,
                start_frame=index,  # the parent only tests whether it is 0
                height=plan.height,
                width=plan.width,
                prev_segment_cond_frames=plan.overlap_frames,
                task="animate" if drawn.background is None else "replace",
                device=device,
            )

        if index:
            return encode()
        key = (plan.width, plan.height, plan.segment_frames, plan.overlap_frames, self._vae_key())
        background, mask = drawn.background, drawn.mask
        if background is None or mask is None:
            return self._shared("blank", lambda: key, encode, job.timer)
        return self._shared("scene", lambda: (digest_frames(background), digest_frames(mask), *key), encode, job.timer)

    def _denoise(self, job: JobTensors, index: int, window: WindowTensors) -> torch.Tensor:
        """Denoise the window through the whole schedule: latents, float32 [1, 16, T, H/8, W/8]."""
        plan = job.plan
        sampler = job.new_sampler(self.compute_device)
        conditioning = self._cache_conditioning(job, window)
        calls = CallTimer(job.timer)

        def on_step(i: int, latents: torch.Tensor) -> None:
            place = f"the latents after step {i + 1} of {sampler.steps}, segment {index + 1} of {plan.segments}"
            job.checks.add("denoise", place, latents)
            calls.end_step()
            if job.on_step:
                done = index * plan.evaluations + sampler.evaluations_done(i)
                job.on_step(done, plan.segments * plan.evaluations)

        latents = denoise(self._predict(job, window, conditioning, calls), window.noise, sampler, on_step)
        self.kept_bytes = max(self.kept_bytes, held_bytes(conditioning))
        return latents

    def _predict(
        self, job: JobTensors, window: WindowTensors, conditioning: list[ConditioningCache], calls: CallTimer
    ) -> Predict:
        """Return a function for one model evaluation with CFG: (latents, timestep) -> velocity, both float32."""
        cfg_calls: list[CfgCall] = [partial(self._step, cached) for cached in conditioning]

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            calls.start()
            hidden = torch.cat([latents, window.scene], dim=1).to(self.transformer.dtype)
            return apply_cfg([call(hidden, timestep.expand(1)).float() for call in cfg_calls], job.guidance_scale)

        return predict

    def _decode(
        self,
        job: JobTensors,
        colours: SegmentColours,
        latents: torch.Tensor,
        begin: int,
        span: tuple[int, int],
        drawn: ConditionWindow,
        previous: torch.Tensor | None,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Decode the window's frames `span`, uint8 [n, H, W, 3], and the pixels from which the next window begins.

        `begin`: the window's first frame in the job. `previous`: the pixels from which this window began.
        """
        again: list[torch.Tensor] = []  # the overlap, as this window decodes it

        def to_bytes(pixels: torch.Tensor) -> np.ndarray:
            return to_uint8(self.video_processor.postprocess_video(pixels, output_type="pt")[0])

        def keep(pixels: torch.Tensor) -> None:
            again.append(pixels.clone())  # a view would keep all pixels of the decoder's chunk

        with job.timer.stage("vae_decode", on_device=True):
            parts, tail = decode_latents(
                self.vae, latents, *span, job.plan.overlap_frames, to_bytes, job.checks, begin, keep
            )
            job.checks.read()
        frames = np.concatenate(parts)
        if not colours.active:
            return frames, tail
        truth = None
        if drawn.background is not None and drawn.mask is not None:
            truth = TrueBackground(*(shown[slice(*span)] for shown in (drawn.background, drawn.mask)))
        with job.timer.stage("colour"):
            decoded = torch.cat(again, dim=2) if again else None
            return frames, colours.finish(frames, tail, previous, decoded, truth)

    def _warm(self, job: JobTensors, window: WindowTensors) -> None:
        """Compile the graphs that windows of these shapes still need, before the steps are timed."""
        step, (frames, height, width) = self.block_forward, window.noise.shape[2:]
        grid = (frames, height, width)
        if step is None or not step.warms(self.transformer, job.contexts, grid):
            return
        with job.timer.stage("warmup", on_device=True):
            blocks = None if self.blocks is None else self.blocks()
            made = step.warm(self.transformer, job.contexts, grid, blocks)
        job.timer.count("compiled_graphs", made)

    def _cache_conditioning(self, job: JobTensors, window: WindowTensors) -> list[ConditioningCache]:
        """Make what this window's steps share: for the cond call and, with CFG, for the uncond one."""
        keep_text = self.memory is None or self.memory.keep_text
        conditioning = ConditioningCache(
            self.transformer,
            job.contexts[0],
            window.pose,
            window.faces,
            keep_text=keep_text,
            strengths=job.strengths,
        )
        return [
            conditioning,
            *(conditioning.sharing(self.transformer, other, no_face(window.faces)) for other in job.contexts[1:]),
        ]

    def _step(self, conditioning: ConditioningCache, hidden: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Run the transformer once (cond or uncond) in one step. Blocks are on the device, or are copied one by one."""
        chunked = self.memory is not None and self.memory.chunked
        return denoise_step(
            self.transformer,
            conditioning,
            hidden,
            timestep,
            blocks=None if self.blocks is None else self.blocks(),
            block_forward=self.block_forward or choose_eager_block(self.compute_device, chunked),
            face_forward=chunked_face if chunked else None,
        )

    def _make_room(self) -> None:
        """Free the memory of the last stage before the next one, if blocks are streamed."""
        if self.blocks is None:
            return
        self.blocks.release()
        if self.compute_device.type == "cuda":
            torch.cuda.empty_cache()


def _check_shared(job: JobTensors) -> None:
    """Queue checks of the tensors that all windows of a job read."""
    job.checks.add("encode_prompt", "the prompt's embedding", job.text)
    if job.negative is not None:
        job.checks.add("encode_prompt", "the negative prompt's embedding", job.negative)
    job.checks.add("encode_image", "the reference's CLIP features", job.clip)
    job.checks.add("encode_reference", "the reference's latents", job.reference)
