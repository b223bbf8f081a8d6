"""Pipeline: Wan-Animate's segment loop, one window of frames at a time, on top of diffusers' WanAnimatePipeline.

In:   a source of conditions (uint8 windows on the host), a prompt, options, a plan, a fresh scheduler.
Out:  each segment's frames as soon as it is decoded. Never: files, manifests, where the weights came from.

The parent's `__call__` holds the whole clip on the device, yields nothing until the end and computes per job what many
jobs share. Its `encode_*` and `prepare_*` methods are right: they are called here in the same order with the same
values, so that with one schedule and one CLIP setting the frames are equal bit for bit; the tests compare them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import WanAnimatePipeline
from PIL import Image

from runner.generation.base import OnStep, Segment, SegmentPlan
from runner.generation.segments import output_span, reflect_indices
from runner.generation.switches import Switches
from runner.generation.transformer import Context, StepInvariants, denoise_step, embed_context, held_bytes
from runner.metrics import StageTimer
from runner.options import JobOptions

__all__ = ["AnimatePipeline", "ConditionSource", "ConditionWindow", "Memo", "Switches", "to_pixels", "to_uint8"]

TEXT_TOKENS = 512  # the attention splits image from text at the last 512; any other count mixes them up
MEMO_SIZES = {"prompt": 16, "clip": 16, "reference": 16, "blank": 4}  # 4, 0.7, 1 and 20 MB each at 720p

# (latents and scene [1, 36, T, H/8, W/8], timestep [1]) -> flow [1, 16, T, H/8, W/8], all else being fixed
Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ConditionWindow(Protocol):
    """Consecutive frames of what drives the model, on the host."""

    @property
    def pose(self) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB skeletons."""

    @property
    def face(self) -> np.ndarray:
        """uint8 [n, F, F, 3] RGB crops; F is the motion encoder's size."""

    @property
    def background(self) -> np.ndarray | None:
        """uint8 [n, H, W, 3] RGB; replace mode."""

    @property
    def mask(self) -> np.ndarray | None:
        """uint8 [n, H, W], 255 where the character goes; replace mode."""


class ConditionSource(Protocol):
    """A job's conditions, fetched a window at a time."""

    @property
    def frames(self) -> int:
        """How many there are."""

    @property
    def reference(self) -> Image.Image:
        """The character, RGB."""

    def window(self, start: int, stop: int) -> ConditionWindow:
        """Frames start..stop-1, within what there is."""


class Memo:
    """The last few results by content, so that jobs which share an input share the work. Counts hits and misses."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._held: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], torch.Tensor], timer: StageTimer) -> torch.Tensor:
        """What `make` returned for `key` last time, else what it returns now. A `make` that raises leaves no trace."""
        hit = key in self._held
        timer.count(f"{self.name}_cache_{'hits' if hit else 'misses'}")
        if not hit:
            self._held[key] = make()
            if len(self._held) > self.size:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True)
class _Job:
    """What stays the same over a job's windows."""

    plan: SegmentPlan
    scheduler: Any
    timer: StageTimer
    on_step: OnStep | None
    guidance_scale: float
    text: torch.Tensor  # [1, 512, text_dim]
    negative: torch.Tensor | None  # as text; None where unguided
    clip: torch.Tensor  # [1, image tokens, image_dim]
    reference: torch.Tensor  # [1, 20, 1, H/8, W/8], mask and latents
    contexts: list[Context] = field(default_factory=list)  # of text and negative, where steps share work


@dataclass(frozen=True)
class _Window:
    """What one window is denoised from. T latent frames, one of them the reference's."""

    noise: torch.Tensor  # float32 [1, 16, T, H/8, W/8]
    scene: torch.Tensor  # [1, 20, T, H/8, W/8], the reference in front
    pose: torch.Tensor  # [1, 16, T - 1, H/8, W/8]
    faces: torch.Tensor  # [1, 3, n, F, F] in [-1, 1]


class AnimatePipeline(WanAnimatePipeline):
    """WanAnimatePipeline with a segment loop that streams. Between jobs it keeps nothing but its memos.

    `compute_device`: where transformer and autoencoder are; the two encoders may be elsewhere.
    `switches`: which optimisations are on; read when a job starts.
    `kept_bytes`: the most that the steps of one window shared, in the last job. It is given back when the window ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        image_processor: Any,
        image_encoder: Any,
        transformer: Any,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, scheduler, image_processor, image_encoder, transformer)
        self.compute_device = torch.device("cpu")
        self.switches = Switches()
        self.kept_bytes = 0
        self.memos = {name: Memo(name, size) for name, size in MEMO_SIZES.items()}

    def render(
        self,
        source: ConditionSource,
        prompt: str,
        options: JobOptions,
        plan: SegmentPlan,
        scheduler: Any,
        timer: StageTimer,
        on_step: OnStep | None = None,
    ) -> Iterator[Segment]:
        """Each segment's new frames, uint8, with the skeletons that drove them; plan.frames in all."""
        for index, pixels, pose in self.decode_segments(source, prompt, options, plan, scheduler, timer, on_step):
            with timer.stage("vae_decode", on_device=True):
                frames = to_uint8(self.video_processor.postprocess_video(pixels, output_type="pt")[0])
            yield Segment(index, frames, pose)

    @torch.no_grad()  # as the parent; what the memos keep stays an ordinary tensor
    def decode_segments(
        self,
        source: ConditionSource,
        prompt: str,
        options: JobOptions,
        plan: SegmentPlan,
        scheduler: Any,
        timer: StageTimer,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, np.ndarray]]:
        """(index, frames [1, 3, n, H, W] in [-1, 1] on the device, skeletons uint8 [n, H, W, 3]) of each segment.

        `scheduler` is the job's own: its history must not outlive it. `on_step` may raise to abandon the job.
        """
        try:
            text, negative = self._texts(prompt, options, timer)
            clip, reference = self._reference(source.reference, plan, timer)
            contexts = self._contexts(text, negative, clip, timer)
            self.kept_bytes = 0
            job = _Job(
                plan, scheduler, timer, on_step, options.guidance_scale, text, negative, clip, reference, contexts
            )
            generator = torch.Generator("cpu").manual_seed(options.seed)  # one for all windows, alike on every device
            previous = None
            for index in range(plan.segments):
                start = index * (plan.segment_frames - plan.overlap_frames)
                drawn = padded_window(source, start, start + plan.segment_frames, options.mode)
                with timer.stage("encode_conditions", on_device=True):
                    window = self._encode(job, index, drawn, previous, generator)
                with timer.stage("denoise", on_device=True):
                    latents = self._denoise(job, index, window)
                with timer.stage("vae_decode", on_device=True):
                    pixels = self._decode(latents)
                del latents, window
                previous = pixels[:, :, -plan.overlap_frames :].clone()
                first, last = (
                    at - start for at in output_span(index, plan.segment_frames, plan.overlap_frames, plan.frames)
                )
                yield index, pixels[:, :, first:last], drawn.pose[first:last]
        finally:
            self.vae.clear_cache()  # an abandoned encode or decode leaves feature maps of full size behind

    def _texts(self, prompt: str, options: JobOptions, timer: StageTimer) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings [1, 512, text_dim] of the prompt and, where guided, of the negative prompt."""
        dtype = self.transformer.dtype

        def embed(text: str) -> torch.Tensor:
            return self.memos["prompt"].get((text, dtype), lambda: encode(text), timer)

        def encode(text: str) -> torch.Tensor:
            embeds, _negative = self.encode_prompt(
                text,
                do_classifier_free_guidance=False,
                max_sequence_length=TEXT_TOKENS,
                device=self.compute_device,
            )
            return embeds.to(dtype)

        with timer.stage("encode_prompt", on_device=True):
            guided = options.guidance_scale > 1
            return embed(prompt), embed(options.negative_prompt or "") if guided else None

    def _contexts(
        self, text: torch.Tensor, negative: torch.Tensor | None, clip: torch.Tensor, timer: StageTimer
    ) -> list[Context]:
        """What the transformer's embedders make of them, once a job; nothing where every step does it itself.

        Not kept between jobs: a job's LoRAs may change the embedders, and they take milliseconds.
        """
        if not self.switches.step_invariants:
            return []
        with timer.stage("encode_prompt", on_device=True):
            return embed_context(self.transformer, [text] if negative is None else [text, negative], clip)

    def _reference(self, image: Image.Image, plan: SegmentPlan, timer: StageTimer) -> tuple[torch.Tensor, torch.Tensor]:
        """What CLIP makes of the whole image, and its latents, scaled into width x height on black."""
        digest = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
        device, dtype = self.compute_device, self.transformer.dtype

        def encode() -> torch.Tensor:
            boxed = self.vae_image_processor.preprocess(image, height=plan.height, width=plan.width, resize_mode="fill")
            return self.prepare_reference_image_latents(boxed.to(device, torch.float32), device=device)

        with timer.stage("encode_image", on_device=True):
            clip = self.memos["clip"].get((digest, dtype), lambda: self.encode_image(image, device).to(dtype), timer)
        with timer.stage("encode_reference", on_device=True):
            key = (digest, plan.width, plan.height, self.vae.dtype)
            return clip, self.memos["reference"].get(key, encode, timer)

    def _encode(
        self, job: _Job, index: int, drawn: ConditionWindow, previous: torch.Tensor | None, generator: torch.Generator
    ) -> _Window:
        """Noise and conditions of window `index`, on the device. Takes from `generator` what one window needs."""
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
        return _Window(
            noise=noise,
            pose=self.prepare_pose_latents(to_pixels(drawn.pose, device), device=device).to(dtype),
            scene=torch.cat([job.reference, self._scene(job, index, drawn, previous)], dim=2),
            faces=to_pixels(drawn.face, device).to(dtype),
        )

    def _scene(self, job: _Job, index: int, drawn: ConditionWindow, previous: torch.Tensor | None) -> torch.Tensor:
        """Mask and latents of what stands in the window beforehand: the last one's end, then the scene or nothing.

        Without a scene the first window is blank, and the same for every job of its size.
        """
        plan, device = job.plan, self.compute_device

        def encode() -> torch.Tensor:
            return self.prepare_prev_segment_cond_latents(
                previous,
                background_video=None if drawn.background is None else to_pixels(drawn.background, device),
                mask_video=None if drawn.mask is None else to_unit(drawn.mask, device),
                segment_frame_length=plan.segment_frames,
                start_frame=index,  # only whether it is the first matters
                height=plan.height,
                width=plan.width,
                prev_segment_cond_frames=plan.overlap_frames,
                task="animate" if drawn.background is None else "replace",
                device=device,
            )

        if index or drawn.background is not None:
            return encode()
        key = (plan.width, plan.height, plan.segment_frames, plan.overlap_frames, self.vae.dtype)
        return self.memos["blank"].get(key, encode, job.timer)

    def _denoise(self, job: _Job, index: int, window: _Window) -> torch.Tensor:
        """The window's latents, float32 [1, 16, T, H/8, W/8], at the end of the whole schedule."""
        plan, timer = job.plan, job.timer
        job.scheduler.set_timesteps(plan.steps, device=self.compute_device)  # also forgets the last window's history
        latents = window.noise
        invariants = self._invariants(job, window)
        branches = self._branches(job, window, invariants)
        for i, timestep in enumerate(job.scheduler.timesteps):
            begin = timer.clock()
            hidden = torch.cat([latents, window.scene], dim=1).to(self.transformer.dtype)
            flow = guide([branch(hidden, timestep.expand(1)) for branch in branches], job.guidance_scale)
            latents = job.scheduler.step(flow, timestep, latents, return_dict=False)[0]
            if timer.probe:
                timer.probe.synchronize()
            timer.step(timer.clock() - begin)
            if job.on_step:
                job.on_step(index * plan.steps + i + 1, plan.segments * plan.steps)
        self.kept_bytes = max(self.kept_bytes, held_bytes(invariants))
        return latents

    def _invariants(self, job: _Job, window: _Window) -> list[StepInvariants]:
        """What this window's steps share, for each branch; nothing where every step does it itself."""
        if not job.contexts:
            return []
        invariants = StepInvariants(self.transformer, job.contexts[0], window.pose, window.faces)
        return [
            invariants,
            *(invariants.sharing(self.transformer, other, no_face(window.faces)) for other in job.contexts[1:]),
        ]

    def _branches(self, job: _Job, window: _Window, invariants: list[StepInvariants]) -> list[Branch]:
        """The transformer on this window; guided, a second time without prompt and face."""
        if invariants:
            return [partial(denoise_step, self.transformer, shared) for shared in invariants]
        branches: list[Branch] = [partial(self._whole_forward, job, window, job.text, window.faces)]
        if job.negative is not None:
            branches.append(partial(self._whole_forward, job, window, job.negative, no_face(window.faces)))
        return branches

    def _whole_forward(
        self,
        job: _Job,
        window: _Window,
        text: torch.Tensor,
        faces: torch.Tensor,
        hidden: torch.Tensor,
        timestep: torch.Tensor,
    ) -> torch.Tensor:
        """The model's own forward pass, which computes everything at every step."""
        return self.transformer(
            hidden_states=hidden,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_image=job.clip,
            pose_hidden_states=window.pose,
            face_pixel_values=faces,
            return_dict=False,
        )[0]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [1, 3, frames, H, W] in [-1, 1] of `latents`, without the reference frame in front of them."""
        latents, config = latents.to(self.vae.dtype), self.vae.config
        mean, deviation = (
            torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
            for values in (config.latents_mean, config.latents_std)
        )
        # The parent divides by the reciprocal; multiplying by the deviation would round otherwise.
        return self.vae.decode((latents / (1.0 / deviation) + mean)[:, :, 1:], return_dict=False)[0]


@dataclass(frozen=True)
class _Drawn:
    """A padded window; background and mask are there in replace mode only."""

    pose: np.ndarray
    face: np.ndarray
    background: np.ndarray | None
    mask: np.ndarray | None


def padded_window(source: ConditionSource, start: int, stop: int, mode: str) -> _Drawn:
    """Frames start..stop-1, reflected beyond the source's end. One fetch, never longer than the window itself."""
    indices = reflect_indices(start, stop, source.frames)
    low, high = int(indices.min()), int(indices.max()) + 1
    window = source.window(low, high)

    def take(name: str) -> np.ndarray:
        frames = getattr(window, name)
        if frames is None or len(frames) != high - low:
            came = "none" if frames is None else str(len(frames))
            raise ValueError(f"{name}: {high - low} frames were asked for, {came} came")
        return frames[indices - low]

    replace = mode == "replace"
    return _Drawn(
        take("pose"), take("face"), take("background") if replace else None, take("mask") if replace else None
    )


def no_face(faces: torch.Tensor) -> torch.Tensor:
    """Black crops of the shape of `faces`, as the library makes them."""
    return faces * 0 - 1


def guide(flows: list[torch.Tensor], scale: float) -> torch.Tensor:
    """The one flow, or, of one with and one without prompt and face, the first moved away from the second."""
    if len(flows) == 1:
        return flows[0]
    flow, without = flows
    return without + scale * (flow - without)


def to_unit(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n, H, W, 3] or [n, H, W] to float32 [1, channels, n, H, W] in [0, 1]; bytes cross to the device."""
    planes = torch.from_numpy(frames if frames.ndim == 4 else frames[..., None]).to(device)
    # Channels stay innermost in memory, as the library's own conversion leaves them: convolutions sum in another order
    # otherwise, and the last bits differ.
    values = planes.to(torch.float32)
    # By a tensor on the device: CUDA multiplies by a rounded reciprocal when the divisor is a number.
    values /= torch.tensor(255.0, device=device)
    return values.permute(3, 0, 1, 2).unsqueeze(0)


def to_pixels(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """As `to_unit`, in [-1, 1]."""
    return to_unit(frames, device).mul_(2.0).sub_(1.0)


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """[n, 3, H, W] in [0, 1] to uint8 [n, H, W, 3] on the host, rounded to even."""
    return (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
