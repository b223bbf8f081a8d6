"""Twenty jobs of one prompt, two references and two dances: what they share is encoded once, and changes no frame."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from runner.generation.runtime.tensor_cache import HOST_BYTES, TensorCache
from runner.generation.sampling import make_sampler
from runner.generation.segments import plan_job
from runner.generation.wan_animate.loading import load_pipeline
from runner.generation.wan_animate.pipeline import AnimatePipeline, Switches
from runner.records.record import reuse_of
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore
from tests.generation.stub_conditions import MemoryConditions

RECIPE = get_recipe("fp32+euler")
REFERENCES, DANCES = (1, 2), (5, 6)
SIZE = {"width": 32, "height": 32}


def load(tiny_store_dir) -> AnimatePipeline:
    return load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), RECIPE), torch.device("cpu"))[0]


def rendered(pipe, reference: int, dance: int, seed: int, *, timer=None, frames=5, **settings) -> np.ndarray:
    conditions = MemoryConditions(frames, seed=dance, reference_seed=reference, **SIZE)
    options = JobOptions(steps=1, seed=seed, max_segment_frames=5, **settings)
    plan = plan_job(frames, (conditions.width, conditions.height), options, RECIPE)
    new_sampler = partial(make_sampler, RECIPE.scheduler, RECIPE.schedule, RECIPE.shift, options.steps)
    segments = pipe.render(conditions, "a dance", options, plan, new_sampler, timer or StageTimer())
    return np.concatenate([segment.frames for segment in segments])


def watched(pipe) -> Counter[str]:
    """Calls of the models themselves; the autoencoder's by number of frames."""
    calls: Counter[str] = Counter()
    pipe.text_encoder.register_forward_hook(lambda *_: calls.update(["text"]))
    pipe.image_encoder.register_forward_hook(lambda *_: calls.update(["clip"]))
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x: (calls.update([f"vae {x.shape[2]}"]), encode(x))[1]
    return calls


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_pipeline_with_twenty_jobs_encodes_each_input_once(tiny_store_dir):
    pipe = load(tiny_store_dir)
    calls = watched(pipe)
    jobs = [(reference, dance, seed) for seed in range(5) for reference, dance in product(REFERENCES, DANCES)]
    assert len(jobs) == 20
    counters: Counter[str] = Counter()
    frames = {}
    for job in jobs:
        timer = StageTimer()
        frames[job] = rendered(pipe, *job, timer=timer)
        counters.update(timer.counters)
    # Both references, and of five frames: two dances and the blank scene.
    assert calls == {"text": 1, "clip": 2, "vae 1": 2, "vae 5": 3}
    made = {"prompt": 1, "clip": 2, "reference": 2, "blank": 1, "pose_latents": 2}
    assert counters == {
        **{f"{name}_cache_misses": once for name, once in made.items()},
        **{f"{name}_cache_hits": 20 - once for name, once in made.items()},
        "text_encoder_loads": 1,
        "image_encoder_loads": 1,
    }
    reuse = reuse_of(timer.counters, timer.gauges)
    assert {name: (use.hits, use.hit_rate) for name, use in reuse.items()} == dict.fromkeys(made, (1, 1.0))
    # Float32: 4 bytes of [1, 512, 32], of two [1, 5, 32]; latents of 4x4 in 20 channels, and in 16 of two dances.
    assert reuse["prompt"].bytes == 4 * 512 * 32
    assert reuse["reference"].bytes == 2 * 4 * 20 * 4 * 4
    assert reuse["blank"].bytes == 4 * 20 * 2 * 4 * 4
    assert reuse["pose_latents"].bytes == 2 * 4 * 16 * 2 * 4 * 4
    assert sum(use.bytes for use in reuse.values() if use.bytes) == pipe.tensor_cache.host_bytes

    pipe.switches = Switches(tensor_cache=False)
    for job in jobs[-4:]:
        assert np.array_equal(rendered(pipe, *job), frames[job]), job
    assert len({value.tobytes() for value in frames.values()}) == 20
    assert calls == {"text": 1 + 4, "clip": 2 + 4, "vae 1": 2 + 4, "vae 5": 3 + 8}


def test_replace_jobs_share_scene_of_first_window(tiny_store_dir):
    pipe = load(tiny_store_dir)
    calls = watched(pipe)
    timer = StageTimer()
    first = rendered(pipe, 1, 5, 0, frames=9, timer=timer, mode="replace")
    assert calls["vae 5"] == 4  # two windows of skeletons and scene
    second = rendered(pipe, 2, 5, 0, frames=9, timer=timer, mode="replace")
    assert calls["vae 5"] == 5  # the second window's scene begins with this job's own frames
    assert timer.counters["scene_cache_hits"] == timer.counters["scene_cache_misses"] == 1
    assert not np.array_equal(first, second)
    pipe.switches = Switches(tensor_cache=False)
    assert np.array_equal(rendered(pipe, 2, 5, 0, frames=9, mode="replace"), second)


def test_tensor_cache_content_does_not_depend_on_transformer(tiny_store_dir):
    """A LoRA may change any weight between two jobs: the second job's frames are those without a cache."""
    pipe = load(tiny_store_dir)
    before = rendered(pipe, 1, 5, 0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    timer = StageTimer()
    after = rendered(pipe, 1, 5, 0, timer=timer)
    assert not [name for name in timer.counters if "misses" in name]
    pipe.switches = Switches(tensor_cache=False)
    assert np.array_equal(rendered(pipe, 1, 5, 0), after)
    assert not np.array_equal(before, after)


def test_tensor_cache_with_other_autoencoder_setting_encodes_again(tiny_store_dir):
    pipe = load(tiny_store_dir)
    calls = watched(pipe)
    rendered(pipe, 1, 5, 0)
    pipe.vae.enable_slicing()
    rendered(pipe, 1, 5, 0)
    assert calls == {"text": 1, "clip": 1, "vae 1": 2, "vae 5": 4}


def test_pipeline_with_empty_cache_budget_renders_same_frames(tiny_store_dir):
    pipe = load(tiny_store_dir)
    shared = rendered(pipe, 1, 5, 0)
    pipe.tensor_cache = TensorCache(0)
    timer = StageTimer()
    assert np.array_equal(rendered(pipe, 1, 5, 0, timer=timer), shared)
    assert pipe.tensor_cache.host_bytes == 0
    assert not [name for name in timer.counters if "hits" in name]


def test_divide_caches_gives_each_process_part_of_memory(tiny_store_dir):
    """Each process keeps its part of HOST_BYTES; here there are so many processes that none keeps anything."""
    pipe = load(tiny_store_dir)
    shared = rendered(pipe, 1, 5, 0)
    assert pipe.tensor_cache.host_bytes > 1
    pipe.divide_caches(HOST_BYTES)
    timer = StageTimer()
    assert np.array_equal(rendered(pipe, 1, 5, 0, timer=timer), shared)
    assert pipe.tensor_cache.host_bytes <= 1
    assert not [name for name in timer.counters if "hits" in name]
