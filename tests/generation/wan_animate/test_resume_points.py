"""A job of six segments, resumed in front of each of them by a generator that never saw it: the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runner.errors import InternalError
from runner.generation.protocol import Request, ResumePoint, SegmentPlan
from runner.generation.wan_animate.generator import WanAnimateGenerator
from runner.generation.wan_animate.loading import load_pipeline
from runner.generation.wan_animate.resume_points import make_resume_point, restore_state
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore
from tests.generation.stub_conditions import MemoryConditions
from tests.system_tests import system_test

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
SEGMENTS = 6
WAIT_S = 10.0
LONGEST = {1: 5, 5: 13}  # frames of a window, by overlap: the shortest that there are
# name: recipe, mode, overlap, and colour where it is not off
CASES: dict[str, tuple[Any, ...]] = {
    "animate": ("fp32", "animate", 1),
    "animate, overlap 5": ("fp32", "animate", 5),
    "replace": ("fp32", "replace", 1),
    "replace, overlap 5, bfloat16": ("bf16", "replace", 5),
    "animate, bfloat16": ("bf16", "animate", 1),
    "animate, bfloat16 autoencoder": ("bf16+bf16-vae", "animate", 1),
    "animate, float16 autoencoder": ("bf16+fp16-vae", "animate", 1),
    "animate, strengths": ("fp32", "animate", 1, {"face_strength": 1.7, "pose_strength": 0.5}),
    "animate, anchor": ("fp32", "animate", 1, {"colour": "anchor"}),
    "animate, overlap 5, seam, bfloat16 autoencoder": ("bf16+bf16-vae", "animate", 5, {"colour": "seam"}),
    "replace, overlap 5, anchor": ("fp32", "replace", 5, {"colour": "anchor"}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The order of sums depends on the number of threads: it must be one number in both processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_generator(store: Path, recipe_name: str, frames: int) -> WanAnimateGenerator:
    models = ResolvedRecipe(ModelStore(store), get_recipe(recipe_name))
    pipeline, placement = load_pipeline(models, CPU)
    preprocessor: Any = SimpleNamespace(prepare=lambda *_, **__: MemoryConditions(frames))
    return WanAnimateGenerator(
        pipeline, models.recipe, preprocessor, costs=models.costs, identity={}, description=placement
    )


def generated(store: Path, case: str, start: ResumePoint | None = None, on_step=None) -> list:
    """The segments of the job of `case`, by a new generator; the last one also when its window is padded."""
    recipe_name, mode, overlap, *more = CASES[case]
    longest = LONGEST[overlap]
    frames = overlap + SEGMENTS * (longest - overlap) - 1
    generator = new_generator(store, recipe_name, frames)
    options = JobOptions(
        steps=2, seed=7, mode=mode, overlap_frames=overlap, max_segment_frames=longest, **(more[0] if more else {})
    )
    conditions = generator.prepare(Request(Path("a.png"), Path("b.mp4"), "a dance", options), StageTimer())
    plan = generator.plan(conditions.clip.frames, conditions.clip.size, options)
    assert plan.segments == SEGMENTS
    try:
        return list(generator.generate(conditions, plan, StageTimer(), on_step, start))
    finally:
        conditions.close()


@pytest.fixture(scope="module")
def undisturbed(tiny_store_dir):
    """The segments of a case, generated once without a stop."""
    return cache(lambda case: generated(tiny_store_dir, case))


def assert_equal(found: list, expected: list) -> None:
    assert [segment.index for segment in found] == [segment.index for segment in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.frames, other.frames), f"segment {one.index}"
        assert np.array_equal(one.pose, other.pose), f"segment {one.index}"
        assert one.resume.values == other.resume.values
        assert one.drift == other.drift == one.resume.drift
        for name, array in other.resume.arrays.items():
            assert np.array_equal(one.resume.arrays[name], array), f"{name} after segment {one.index}"


def through_json(point: ResumePoint) -> ResumePoint:
    """As a checkpoint keeps it: values as JSON, arrays that cannot be written to."""
    arrays = {name: array.copy() for name, array in point.arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return replace(point, arrays=arrays, values=json.loads(json.dumps(dict(point.values))))


@pytest.mark.parametrize(
    ("case", "cut"),
    [(case, cut) for case in CASES for cut in (range(1, SEGMENTS + 1) if case == "animate" else (1, 4))],
)
def test_resumed_job_has_same_bits(case, cut, undisturbed, tiny_store_dir):
    whole, told = undisturbed(case), []
    point = through_json(whole[cut - 1].resume)
    assert point.segment == cut
    rest = generated(tiny_store_dir, case, point, lambda *step: told.append(step))
    assert_equal(rest, whole[cut:])
    assert told == [(done, 2 * SEGMENTS) for done in range(2 * cut + 1, 2 * SEGMENTS + 1)]
    assert np.std([segment.frames.std() for segment in whole]) > 0  # equal segments would hide a wrong index


def test_segments_with_other_strengths_differ(undisturbed):
    for one, other in zip(undisturbed("animate"), undisturbed("animate, strengths"), strict=True):
        assert not np.array_equal(one.frames, other.frames)


def test_resume_point_after_last_segment_holds_no_arrays(undisturbed):
    last = undisturbed("animate")[-1].resume
    assert (last.segment, dict(last.arrays), set(last.values)) == (SEGMENTS, {}, {"drift"})
    assert [one.segment for one in last.drift.segments] == list(range(1, SEGMENTS + 1))


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from runner.generation.protocol import ResumePoint
from tests.generation.wan_animate.test_resume_points import generated

store, folder, case, cut = sys.argv[1:]
with np.load(Path(folder, "arrays.npz")) as kept:
    arrays = {name: kept[name] for name in kept.files}
values = json.loads(Path(folder, "values.json").read_text())
rest = generated(Path(store), case, ResumePoint(int(cut), arrays, values))
np.save(Path(folder, "frames.npy"), np.concatenate([segment.frames for segment in rest]))
"""


@system_test
def test_resume_point_read_from_files_in_other_process_gives_same_frames(undisturbed, tiny_store_dir, tmp_path):
    case, cut = "replace", 3
    whole = undisturbed(case)
    point = whole[cut - 1].resume
    np.savez(tmp_path / "arrays.npz", **point.arrays)
    (tmp_path / "values.json").write_text(json.dumps(point.values))
    words = [str(tiny_store_dir), str(tmp_path), case, str(cut)]
    subprocess.run([sys.executable, "-c", SCRIPT, *words], cwd=ROOT, check=True)
    frames = np.load(tmp_path / "frames.npy")
    assert np.array_equal(frames, np.concatenate([segment.frames for segment in whole[cut:]]))


def test_resumed_job_draws_windows_ahead_from_its_first_segment(undisturbed, tiny_store_dir):
    generator = new_generator(tiny_store_dir, "fp32", 24)
    options = JobOptions(steps=2, seed=7, max_segment_frames=5)
    conditions = generator.prepare(Request(Path("a.png"), Path("b.mp4"), "a dance", options), StageTimer())
    plan = generator.plan(24, conditions.clip.size, options)
    segments = generator.generate(conditions, plan, StageTimer(), start=undisturbed("animate")[3].resume)
    assert next(segments).index == 4
    end = time.monotonic() + WAIT_S
    while conditions.source.asked[-1] != (20, 24) and time.monotonic() < end:
        time.sleep(0.001)
    # The first had begun when the job was prepared; the last one has begun before segment 5 asks for it.
    assert conditions.source.asked in ([(0, 5), (16, 21), (20, 24)], [(16, 21), (20, 24)])
    assert [segment.index for segment in segments] == [5]
    conditions.close()


# -- a point alone ----------------------------------------------------------------------------------------------------

PLAN = SegmentPlan(24, 5, 2, 6, 16, 8, steps=2, evaluations=2, tflop=0.0)
SHAPE = (1, 3, 2, 8, 16)
LAYOUTS = {
    "row-major": lambda: torch.randn(SHAPE),
    "channels innermost": lambda: torch.randn(SHAPE).contiguous(memory_format=torch.channels_last_3d),
    "a permuted copy": lambda: torch.randn(8, 16, 3, 1, 2).permute(3, 2, 4, 0, 1),
    "any stride where the size is 1": lambda: torch.randn(3, 2, 8, 16).as_strided(SHAPE, (7, 256, 128, 16, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_restore_state_returns_frames_and_random_state_with_layout(layout, dtype):
    previous = LAYOUTS[layout]()
    previous = torch.empty_strided(SHAPE, previous.stride(), dtype=dtype).copy_(previous)
    previous[0, 0, 0, 0, :3] = torch.tensor([-0.0, 1e-40, 1.0], dtype=dtype)
    random = torch.Generator("cpu").manual_seed(3)
    torch.randn(5, generator=random)
    point = make_resume_point(2, PLAN, previous, random)
    assert {array.dtype.name for array in point.arrays.values()} == {"uint8"}
    expected = torch.randn(5, generator=random)

    again = torch.Generator("cpu").manual_seed(99)
    found = restore_state(through_json(point), PLAN, dtype, CPU, again)
    assert (found.dtype, found.shape, found.stride()) == (dtype, previous.shape, previous.stride())
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(found.contiguous().view(bits), previous.contiguous().view(bits))
    assert torch.equal(torch.randn(5, generator=again), expected)


def changed(**changes: Any) -> ResumePoint:
    good = make_resume_point(2, PLAN, torch.zeros(SHAPE), torch.Generator("cpu"))
    arrays, values = dict(good.arrays), dict(good.values)
    for name, value in changes.items():
        if name == "segment":
            good = replace(good, segment=value)
        elif name in arrays:
            arrays[name] = value
        else:
            values[name] = value
    return replace(good, arrays={name: array for name, array in arrays.items() if array is not None}, values=values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment": 0}, "before segment 0 of 6"),
        ({"segment": 7}, "before segment 7 of 6"),
        ({"previous": None}, "it has the arrays random"),
        ({"shape": [1, 3, 2, 16, 8]}, r"float32 \[1, 3, 2, 16, 8\], not float32 \[1, 3, 2, 8, 16\]"),
        ({"shape": None}, "its frames are float32 None"),
        ({"dtype": "bfloat16"}, "its frames are bfloat16"),
        ({"previous": np.zeros(3071, np.uint8)}, r"its frames are uint8 \[3071\]"),
        ({"previous": np.zeros(3072, np.float32)}, r"its frames are float32 \[3072\]"),
        ({"strides": [768, 256, 128, 16]}, "the strides"),
        ({"strides": [768, 256, 128, 16, 2]}, "the strides"),
        ({"strides": [768, 0, 128, 16, 1]}, "the strides"),
        ({"strides": [-1, 256, 128, 16, 1]}, "the strides"),
        ({"strides": None}, "the strides None"),
        ({"random": np.zeros(12, np.uint8)}, "its random state is not valid"),
        ({"random": np.zeros(5056, np.float64)}, "its random state is not valid"),
    ],
)
def test_restore_state_with_invalid_point_is_refused(changes, said):
    with pytest.raises(InternalError, match=said) as caught:
        restore_state(changed(**changes), PLAN, torch.float32, CPU, torch.Generator("cpu"))
    assert "--checkpoint off" in (caught.value.todo or "")
    assert restore_state(changed(), PLAN, torch.float32, CPU, torch.Generator("cpu")).shape == SHAPE


def test_resume_point_of_other_job_is_refused_before_encoding(tiny_store_dir):
    generator = new_generator(tiny_store_dir, "fp32", 9)
    options = JobOptions(steps=2, max_segment_frames=5)
    conditions = generator.prepare(Request(Path("a.png"), Path("b.mp4"), "a dance", options), StageTimer())
    plan, timer = generator.plan(9, conditions.clip.size, options), StageTimer()
    with pytest.raises(InternalError, match=r"float32 \[1, 3, 2, 8, 16\]"):
        next(generator.generate(conditions, plan, timer, start=replace(changed(), segment=1)))
    conditions.close()
    assert "encode_prompt" not in timer.seconds
