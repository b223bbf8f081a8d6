"""Our segment loop against the unmodified library: same weights, schedule, CLIP setting and seed, the same bits."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import Image

from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import find_device
from runner.generation.sampling import make_sampler
from runner.generation.segments import plan_job
from runner.generation.wan_animate.loading import load_pipeline
from runner.generation.wan_animate.pipeline import AnimatePipeline, to_pixels, to_uint8
from runner.spec.options import DEFAULT_PROMPT, JobOptions
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore
from tests.generation.library_schedulers import library_scheduler
from tests.generation.stub_conditions import MemoryConditions

RECIPE = get_recipe("fp32")
STEPS = 2

ONCE_A_WINDOW = (
    "motion_encoder",
    "face_encoder",
    "pose_patch_embedding",
    *("blocks.0.attn2.to_k", "blocks.0.attn2.add_k_proj", "face_adapter.0.to_v"),
)
ONCE_A_JOB = ("condition_embedder.text_embedder", "condition_embedder.image_embedder")
EVERY_STEP = ("patch_embedding", "blocks.0.attn1.to_k", "blocks.0.attn2.to_q", "proj_out")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The order of sums depends on the number of threads: it must be one number on both sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def upstream(tiny_store_dir):
    """The library's pipeline as the library loads it, told only to show CLIP the whole reference."""
    from diffusers import WanAnimatePipeline

    pipe = WanAnimatePipeline.from_pretrained(tiny_store_dir / RECIPE.weights, local_files_only=True)
    pipe.image_processor.size = {"height": 28, "width": 28}
    pipe.image_processor.do_center_crop = False
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(tiny_store_dir) -> AnimatePipeline:
    pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), RECIPE), torch.device("cpu"))
    return pipeline


@pytest.fixture(scope="module")
def ours(tiny_store_dir):
    return load(tiny_store_dir)


def job_options(**settings) -> JobOptions:
    return JobOptions(**{"steps": STEPS, "seed": 7, "max_segment_frames": 13, **settings})


def make_plan(conditions, options):
    return plan_job(conditions.frames, (conditions.width, conditions.height), options, RECIPE)


def pictures(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def rendered_upstream(pipe, conditions, options, scheduler, prompt=DEFAULT_PROMPT) -> np.ndarray:
    """float32 [n, H, W, 3] in [0, 1], as WanAnimatePipeline.__call__ returns it."""
    pipe.scheduler = scheduler
    replace = options.mode == "replace"
    return pipe(
        image=conditions.reference,
        pose_video=pictures(conditions.pose),
        face_video=pictures(conditions.face),
        background_video=pictures(conditions.background) if replace else None,
        mask_video=pictures(conditions.mask) if replace else None,
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        height=conditions.height,
        width=conditions.width,
        segment_frame_length=make_plan(conditions, options).segment_frames,
        num_inference_steps=options.steps,
        mode=options.mode,
        prev_segment_conditioning_frames=options.overlap_frames,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).frames[0]


def sampling(name=RECIPE.scheduler, schedule="official", steps=STEPS):
    """What the pipeline makes a window's sampler with."""
    return partial(make_sampler, name, schedule, RECIPE.shift, steps)


def rendered_here(pipe, conditions, options, new_sampler=None, prompt=DEFAULT_PROMPT, timer=None, on_step=None):
    """uint8 [n, H, W, 3]: all segments of a job."""
    plan = make_plan(conditions, options)
    new_sampler = new_sampler or sampling(steps=options.steps)
    segments = pipe.render(conditions, prompt, options, plan, new_sampler, timer or StageTimer(), on_step)
    return np.concatenate([segment.frames for segment in segments])


def as_bytes(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().astype(np.uint8)


CASES = {
    # name: (frames, options, scheduler), windows
    "animate, one window": (13, {}, "unipc", 1),
    "animate, two windows with overlap 1, padded": (24, {}, "euler", 2),
    "animate, three windows with overlap 5": (28, {"overlap_frames": 5}, "unipc", 3),
    "animate, fewer frames than the window": (2, {}, "unipc", 1),
    "animate, guided, two windows": (9, {"max_segment_frames": 5, "guidance_scale": 2.0}, "unipc", 2),
    "replace, one window": (9, {"mode": "replace"}, "euler", 1),
    "replace, two windows with overlap 1": (12, {"mode": "replace", "max_segment_frames": 9}, "unipc", 2),
    "replace, two windows with overlap 5, guided": (
        17,
        {"mode": "replace", "overlap_frames": 5, "guidance_scale": 2.0, "negative_prompt": "blurry"},
        "euler",
        2,
    ),
}


@pytest.fixture(scope="module")
def upstreams(upstream):
    """The library's frames of a case, rendered once."""
    return cache(lambda case: rendered_upstream(upstream, *inputs_of(case), library_scheduler(CASES[case][2])))


def inputs_of(case: str):
    frames, settings, _, _ = CASES[case]
    return MemoryConditions(frames, seed=len(case)), job_options(**settings)


@pytest.mark.parametrize("case", CASES)
def test_pipeline_frames_equal_library_frames(case, upstreams, ours, monkeypatch):
    """Compare the float32 pixels before their conversion to bytes, and then the bytes."""
    frames, _, solver, windows = CASES[case]
    conditions, options = inputs_of(case)
    plan = make_plan(conditions, options)
    assert plan.segments == windows
    theirs = upstreams(case)
    exact: list[torch.Tensor] = []  # [n, 3, H, W] each

    def noted(pixels: torch.Tensor) -> np.ndarray:
        exact.append(pixels)
        return to_uint8(pixels)

    monkeypatch.setattr("runner.generation.wan_animate.pipeline.to_uint8", noted)
    segments = list(ours.render(conditions, DEFAULT_PROMPT, options, plan, sampling(solver), StageTimer()))
    floats = torch.cat(exact).permute(0, 2, 3, 1).numpy()
    assert floats.shape == (frames, conditions.height, conditions.width, 3)
    assert np.array_equal(floats, theirs)
    assert np.array_equal(np.concatenate([segment.pose for segment in segments]), conditions.pose)
    assert np.array_equal(np.concatenate([segment.frames for segment in segments]), as_bytes(theirs))
    assert floats.std() > 0.05  # a blank picture would prove nothing


def test_diffusers_schedule_reproduces_library_frames(upstream, ours):
    conditions, options = MemoryConditions(5), job_options(steps=3)
    theirs = rendered_upstream(upstream, conditions, options, library_scheduler("euler", "diffusers"))
    here = rendered_here(ours, conditions, options, sampling("euler", "diffusers", options.steps))
    assert np.array_equal(here, as_bytes(theirs))
    assert not np.array_equal(here, rendered_here(ours, conditions, options, sampling("euler", steps=options.steps)))


def test_pipeline_frames_change_with_every_input(ours):
    """Each input changed alone changes the frames: what the comparisons above compare depends on all of them."""
    options = job_options(mode="replace")
    base = rendered_here(ours, MemoryConditions(5), options)

    def differs(conditions=None, prompt=DEFAULT_PROMPT, **settings) -> bool:
        conditions = conditions or MemoryConditions(5)
        other = rendered_here(ours, conditions, job_options(**{"mode": "replace", **settings}), prompt=prompt)
        return not np.array_equal(base, other)

    for name in ("pose", "face", "background", "mask"):
        changed = MemoryConditions(5)
        setattr(changed, name, getattr(changed, name)[::-1].copy())
        assert differs(changed), name
    assert differs(MemoryConditions(5, reference_seed=9)), "reference"
    assert differs(prompt="a man dancing"), "prompt"
    assert differs(seed=8), "seed"
    assert differs(guidance_scale=2.0), "guidance"
    assert differs(mode="animate"), "mode"
    assert not differs(), "nothing"


def test_pipeline_frames_do_not_depend_on_job_order(tiny_store_dir):
    """The job runs in a fresh pipeline, after another job, after a failed job and after an abandoned one."""
    job, options = MemoryConditions(12), job_options(max_segment_frames=9)
    other, other_options = MemoryConditions(9, seed=5, reference_seed=6), job_options(mode="replace", seed=1)
    alone = rendered_here(load(tiny_store_dir), job, options)
    pipe = load(tiny_store_dir)
    rendered_here(pipe, other, other_options, prompt="a dance")
    assert np.array_equal(rendered_here(pipe, job, options), alone)

    def fail(done: int, total: int) -> None:
        if done == 3:
            raise KeyError("half-way")

    with pytest.raises(KeyError, match="half-way"):
        rendered_here(pipe, other, job_options(max_segment_frames=5), on_step=fail)
    assert np.array_equal(rendered_here(pipe, job, options), alone)
    given_up = pipe.render(
        other, "a dance", other_options, make_plan(other, other_options), sampling("unipc"), StageTimer()
    )
    next(given_up)
    given_up.close()
    assert np.array_equal(rendered_here(pipe, job, options), alone)


def test_pipeline_encodes_shared_inputs_of_jobs_once(tiny_store_dir):
    """Counted at the models themselves: text, CLIP, and the autoencoder's calls by number of frames."""
    pipe = load(tiny_store_dir)
    calls: list[str] = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
    pipe.image_encoder.register_forward_hook(lambda *_: calls.append("clip"))
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x: (calls.append(f"vae {x.shape[2]}"), encode(x))[1]
    options = job_options(max_segment_frames=5)

    timer = StageTimer()
    rendered_here(pipe, MemoryConditions(5, seed=1), options, timer=timer)
    # The reference, then the window's skeletons and its blank scene.
    assert sorted(calls) == ["clip", "text", "vae 1", "vae 5", "vae 5"]
    assert {k: v for k, v in timer.counters.items() if "hits" in k} == {}
    calls.clear()

    timer = StageTimer()
    rendered_here(pipe, MemoryConditions(5, seed=2), options, timer=timer)  # another dance, all else alike
    assert calls == ["vae 5"]
    assert timer.counters == dict.fromkeys(
        [f"{name}_cache_hits" for name in ("prompt", "clip", "reference", "blank")] + ["pose_latents_cache_misses"], 1
    )
    calls.clear()

    rendered_here(pipe, MemoryConditions(5, seed=2, reference_seed=3), options, prompt="a dance")
    assert sorted(calls) == ["clip", "text", "vae 1"]  # the last job's dance
    calls.clear()

    wide = MemoryConditions(5, width=64)  # another size: other latents, the same CLIP view
    rendered_here(pipe, wide, options)
    assert sorted(calls) == ["vae 1", "vae 5", "vae 5"]


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_pipeline_computes_shared_conditioning_once_per_window(tiny_store_dir, guided):
    pipe = load(tiny_store_dir)
    calls: Counter[str] = Counter()
    for name, part in pipe.transformer.named_modules():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    conditions = MemoryConditions(9)  # two windows of five frames: one batch of faces each
    options = job_options(max_segment_frames=5, steps=3, guidance_scale=2.0 if guided else 1.0)
    rendered_here(pipe, conditions, options)
    assert pipe.kept_bytes > 0
    cfg_calls = 1 + guided
    per_window = dict.fromkeys(ONCE_A_WINDOW, 2 * cfg_calls)
    if guided:
        per_window |= {"pose_patch_embedding": 2, "blocks.0.attn2.add_k_proj": 2}  # alike with and without a prompt
    per_job = {"condition_embedder.text_embedder": cfg_calls, "condition_embedder.image_embedder": 1}
    every_step = dict.fromkeys(EVERY_STEP, 2 * 3 * cfg_calls)
    counted = {name: calls[name] for name in ONCE_A_WINDOW + ONCE_A_JOB + EVERY_STEP}
    assert counted == {**per_window, **per_job, **every_step}


def test_conditioning_cache_is_freed_before_window_is_decoded(tiny_store_dir):
    pipe, conditions, options = load(tiny_store_dir), MemoryConditions(9), job_options(max_segment_frames=5)
    kept: list[weakref.ref] = []
    conditioning = pipe._cache_conditioning
    pipe._cache_conditioning = lambda *args: (made := conditioning(*args), kept.extend(map(weakref.ref, made)))[0]
    alive: list[int] = []
    decode = pipe.vae.decode_chunks
    pipe.vae.decode_chunks = lambda *z: (alive.append(sum(ref() is not None for ref in kept)), decode(*z))[1]
    gc.disable()  # what is freed is freed because nothing names it any more
    try:
        rendered_here(pipe, conditions, options)
    finally:
        gc.enable()
    assert len(kept) == 2
    assert alive == [0, 0]
    shape = ResolvedRecipe(ModelStore(tiny_store_dir), RECIPE).costs.transformer
    assert pipe.kept_bytes == shape.conditioning_bytes(conditions.width, conditions.height, 5, element=4)


def test_pipeline_fetches_conditions_of_window_when_needed(ours):
    conditions, options = MemoryConditions(10), job_options(max_segment_frames=5)
    plan = make_plan(conditions, options)
    segments = ours.render(conditions, "a dance", options, plan, sampling("unipc"), StageTimer())
    assert conditions.asked == []
    next(segments)
    assert conditions.asked == [(0, 5)]
    assert [len(segment.frames) for segment in segments] == [4, 1]
    assert conditions.asked == [(0, 5), (4, 9), (6, 10)]  # the last one holds 8 9 8 7 6


def test_pipeline_reports_stages_and_progress(ours):
    timer, told = StageTimer(), []
    conditions, options = MemoryConditions(9, reference_seed=21), job_options(max_segment_frames=5)  # new to CLIP
    rendered_here(ours, conditions, options, timer=timer, on_step=lambda done, total: told.append((done, total)))
    assert set(timer.seconds) - {"load_encoders"} == {  # another test may have had them loaded
        "encode_prompt",
        "encode_image",
        "encode_reference",
        "encode_conditions",
        "denoise",
        "vae_decode",
        "colour",
    }
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(timer.steps) == 4
    assert sum(timer.steps) <= timer.seconds["denoise"]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("name", "calls"), [("res_2s", 2), ("dpmpp", 1)])
def test_plan_job_counts_model_evaluations_of_sampler(ours, name, calls, guidance):
    """Two windows of three steps, of one or two evaluations each: progress, seconds, TFLOP and forecast count them."""
    conditions = MemoryConditions(9)
    options = job_options(max_segment_frames=5, steps=3, guidance_scale=guidance)
    size, gpu = (conditions.width, conditions.height), find_device("H200")

    def planned(name, schedule, steps):
        recipe = replace(RECIPE, scheduler=name, schedule=schedule)
        return plan_job(conditions.frames, size, options.model_copy(update={"steps": steps}), recipe, device=gpu)

    plan, euler = planned(name, "beta57", 3), planned("euler", "official", 3)
    assert (plan.segments, plan.steps, plan.evaluations, euler.evaluations) == (2, 3, 3 * calls, 3)
    cfg_calls = 1 if guidance == 1 else 2
    more = 2 * 3 * (calls - 1) * cfg_calls * PRODUCTION.step_tflop(*size, plan.segment_frames)
    assert plan.tflop - euler.tflop == pytest.approx(more, abs=1e-6)
    assert plan.seconds == pytest.approx(planned("euler", "official", 3 * calls).seconds)

    timer, told, forwards = StageTimer(), [], []
    hook = ours.transformer.patch_embedding.register_forward_hook(lambda *_: forwards.append(1))
    segments = ours.render(
        conditions,
        "a dance",
        options,
        plan,
        sampling(name, "beta57", 3),
        timer,
        lambda done, total: told.append((done, total)),
    )
    frames = np.concatenate([segment.frames for segment in segments])
    hook.remove()
    assert frames.shape == (9, conditions.height, conditions.width, 3)
    assert len(np.unique(frames)) > 50
    assert told == [(calls * n, 6 * calls) for n in range(1, 7)]
    assert len(forwards) == 6 * calls * cfg_calls and len(timer.steps) == 6 * calls
    assert min(timer.steps) > 0 and sum(timer.steps) <= timer.seconds["denoise"]


@pytest.mark.parametrize("name", ["res_2s", "dpmpp"])
def test_sampler_job_resumed_at_second_window_has_same_frames(ours, name):
    """These samplers keep nothing from one window to the next, so that a resumed window is bit-equal."""
    conditions, options = MemoryConditions(9), job_options(max_segment_frames=5)
    plan = make_plan(conditions, options)
    new_sampler = sampling(name, "beta57", options.steps)
    first, second = ours.render(conditions, "a dance", options, plan, new_sampler, StageTimer())
    (again,) = ours.render(conditions, "a dance", options, plan, new_sampler, StageTimer(), None, first.resume)
    assert np.array_equal(again.frames, second.frames)


def test_plan_job_with_shorter_schedule_counts_its_real_steps():
    """beta57 has 99 levels if 100 are requested, and res_2s makes no call for the last one."""
    size, options = (832, 480), job_options(steps=100)
    plans = [
        plan_job(13, size, options, replace(RECIPE, scheduler=name, schedule="beta57")) for name in ("euler", "res_2s")
    ]
    assert [(plan.steps, plan.evaluations) for plan in plans] == [(99, 99), (98, 196)]
    least, two = (plan.tflop for plan in plans)
    assert two - least == pytest.approx(97 * PRODUCTION.step_tflop(*size, plans[0].segment_frames))


def test_pipeline_with_window_of_wrong_length_raises(ours):
    conditions = MemoryConditions(9)
    conditions.face = conditions.face[:7]
    with pytest.raises(ValueError, match="face: 9 frames were requested, 7 came"):
        rendered_here(ours, conditions, job_options())


def test_pipeline_restores_gradient_mode_between_segments(ours):
    conditions, options = MemoryConditions(9), job_options(max_segment_frames=5)
    plan = make_plan(conditions, options)
    for segment in ours.render(conditions, "a dance", options, plan, sampling("unipc"), StageTimer()):
        assert torch.is_grad_enabled()
        assert segment.frames.dtype == np.uint8
        assert segment.frames.flags.c_contiguous


def test_to_pixels_and_to_uint8_equal_library_conversion(upstream):
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    theirs = upstream.video_processor.preprocess_video(pictures(frames), height=16, width=16)
    here = to_pixels(frames, torch.device("cpu"))
    assert here.shape == (1, 3, 1, 16, 16)
    assert torch.equal(here, theirs)
    assert np.array_equal(to_uint8(upstream.video_processor.postprocess_video(here, output_type="pt")[0]), frames)
