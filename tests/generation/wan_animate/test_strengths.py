"""Strengths of face and pose, against the library's own model with hooks that scale what its modules return.

Every way of running blocks is held to the same bits: eager, chunked, compiled and streamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import WanAnimatePipeline
from torch.utils._python_dispatch import TorchDispatchMode

from runner.generation.runtime.streaming import BlockStream
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.generation.wan_animate.low_memory import chunked_block, chunked_face
from runner.generation.wan_animate.transformer import ConditioningCache, Strengths, embed_context
from runner.spec.recipes import get_recipe
from tests.generation.library_schedulers import library_scheduler
from tests.generation.stub_conditions import MemoryConditions
from tests.generation.wan_animate import test_pipeline as pipelines
from tests.generation.wan_animate.test_transformer import Inputs, load

CPU = torch.device("cpu")
PAIRS = [(1.0, 1.0), (0.5, 1.7), (1.7, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (2.0, 2.0)]
SOLVER = "euler"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The order of sums depends on the number of threads: it must be one number on both sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, tiny_store_dir):
    with torch.no_grad():
        return load(tiny_store_dir, getattr(torch, request.param))


@contextmanager
def scaled(model, face: float, pose: float) -> Iterator[None]:
    """The library's model whose face adapters return `face` times their residual, the pose's embedding `pose` times.

    0 is no product here but a module that is not asked: its place is taken by zeros.
    """

    def times(strength: float) -> Callable:
        return lambda _module, _given, out: torch.zeros_like(out) if strength == 0 else out * strength

    hooks = [adapter.register_forward_hook(times(face)) for adapter in model.face_adapter]
    hooks.append(model.pose_patch_embedding.register_forward_hook(times(pose)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def conditionings(model, inputs: Inputs, strengths: Strengths) -> list[ConditioningCache]:
    """One with the prompt and the faces, one without."""
    contexts = embed_context(model, inputs.texts, inputs.clip)
    first = ConditioningCache(model, contexts[0], inputs.pose, inputs.faces[0], strengths=strengths)
    return [first, first.sharing(model, contexts[1], inputs.faces[1])]


def ways(model, compiled: CompiledBlocks) -> dict[str, Callable[[], dict]]:
    """What `denoise_step` is given, by the kind of blocks; made anew for each step."""
    stream = BlockStream.of(model, CPU, buffers=1)
    chunked = {"block_forward": chunked_block, "face_forward": chunked_face}
    return {
        "eager": dict,
        "chunked": lambda: dict(chunked),
        "compiled": lambda: {"block_forward": compiled},
        "streamed": lambda: {"blocks": stream()},
        "streamed, chunked": lambda: {"blocks": stream(), **chunked},
    }


@torch.no_grad()
@pytest.mark.parametrize(("face", "pose"), PAIRS)
def test_strengths_in_every_kind_of_block_equal_scaled_library_outputs(model, face, pose):
    torch._dynamo.reset()
    inputs, compiled = Inputs(model, frames=9), CompiledBlocks(backend="eager")
    with scaled(model, face, pose):
        wanted = [inputs.forward(model, 0, cfg_index) for cfg_index in (0, 1)]
    before = [inputs.forward(model, 0, cfg_index) for cfg_index in (0, 1)]
    for kind, way in ways(model, compiled).items():
        for cfg_index, conditioning in enumerate(conditionings(model, inputs, Strengths(face, pose))):
            found = inputs.step(model, conditioning, 0, **way())
            assert torch.equal(found, wanted[cfg_index]), (kind, cfg_index)
            assert torch.equal(found, before[cfg_index]) == (face == pose == 1), (kind, cfg_index)
    assert compiled.broken == ""


@torch.no_grad()
def test_strength_0_removes_influence_of_face_or_pose(model):
    """At strength 0 the velocity does not depend on the driver; at other strengths it does."""
    inputs, other = Inputs(model, frames=9), Inputs(model, frames=9, seed=5)

    def velocity(strengths: Strengths, pose: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
        (context,) = embed_context(model, inputs.texts[:1], inputs.clip)
        return inputs.step(model, ConditioningCache(model, context, pose, faces, strengths=strengths), 0)

    for strengths, changed, same in [
        (Strengths(face=0), {"faces": other.faces[0]}, True),
        (Strengths(face=0), {"pose": other.pose}, False),
        (Strengths(pose=0), {"pose": other.pose}, True),
        (Strengths(pose=0), {"faces": other.faces[0]}, False),
    ]:
        given = {"pose": inputs.pose, "faces": inputs.faces[0]}
        assert torch.equal(velocity(strengths, **given), velocity(strengths, **(given | changed))) == same, (
            changed.keys()
        )


class Products(TorchDispatchMode):
    """Counts elementwise products."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in ("aten.mul.Tensor", "aten.mul_.Tensor"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_strength_1_adds_no_product(model):
    """Another strength adds one product per window for the pose, and one per step for each of the two face adapters."""
    inputs, counted = Inputs(model, frames=9), {}
    for strengths in (Strengths(), Strengths(1, 1), Strengths(face=0.5), Strengths(pose=0.5)):
        with Products() as products:
            (context,) = embed_context(model, inputs.texts[:1], inputs.clip)
            conditioning = ConditioningCache(model, context, inputs.pose, inputs.faces[0], strengths=strengths)
            for step in range(2):
                inputs.step(model, conditioning, step)
        counted[strengths] = products.counts.total()
    plain = counted[Strengths()]
    assert counted == {Strengths(): plain, Strengths(face=0.5): plain + 4, Strengths(pose=0.5): plain + 1}


@pytest.fixture(scope="module")
def upstream(tiny_store_dir):
    pipe = WanAnimatePipeline.from_pretrained(tiny_store_dir / get_recipe("fp32").weights, local_files_only=True)
    pipe.image_processor.size = {"height": 28, "width": 28}
    pipe.image_processor.do_center_crop = False
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["unguided", "guided"])
def test_consecutive_jobs_with_different_strengths_equal_library_frames(tiny_store_dir, upstream, guidance):
    """Latents are cached by content and shared by all jobs of one dance; no job uses another job's strength."""
    pipe, conditions = pipelines.load(tiny_store_dir), MemoryConditions(9, width=32, height=32)
    seen = []
    for face, pose in [(1.0, 1.0), (0.0, 1.7), (0.5, 0.0), (1.0, 1.0)]:
        options = pipelines.job_options(
            face_strength=face, pose_strength=pose, guidance_scale=guidance, max_segment_frames=5
        )
        with scaled(upstream.transformer, face, pose):
            theirs = pipelines.rendered_upstream(upstream, conditions, options, library_scheduler(SOLVER))
        here = pipelines.rendered_here(pipe, conditions, options, pipelines.sampling(SOLVER))
        assert np.array_equal(here, pipelines.as_bytes(theirs)), (face, pose)
        seen.append(here.tobytes())
    assert len(set(seen)) == 3
