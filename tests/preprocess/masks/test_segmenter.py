"""Segmenter: SAM 2 streamed against the unmodified library, over windows of any length, in bounded memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runner.errors import ConfigInvalid, InternalError, NoPerson, WeightsCorrupt, WeightsMissing
from runner.preprocess.masks import point_prompts
from runner.preprocess.masks.point_prompts import PromptPlan
from runner.preprocess.masks.segmenter import KEYS_KEPT, MEAN, Sam2Segmenter, load_segmenter, segment_clip
from tests.preprocess.tiny_sam2 import SIDE, build_sam2

WIDTH, HEIGHT, FRAMES = 72, 48, 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_sam2(tmp_path_factory.mktemp("weights") / "sam2")


@pytest.fixture(scope="module")
def sam2(folder) -> Sam2Segmenter:
    return load_segmenter(folder)


def pictures(count: int = FRAMES, seed: int = 0) -> np.ndarray:
    """uint8 [n, H, W, 3] of coarse noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 9, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def plan_of(count: int = FRAMES, absent: tuple[int, ...] = (), seed: int = 0) -> PromptPlan:
    points = np.random.default_rng(seed).uniform((20, 10, 0.9), (50, 40, 0.9), (count, 133, 3)).astype(np.float32)
    points[list(absent), :, 2] = 0
    return PromptPlan(points, (WIDTH, HEIGHT))


def masks_of(segmenter, frames: np.ndarray, plan: PromptPlan, window: int = 8) -> np.ndarray:
    cut = np.split(frames, range(window, len(frames), window))
    out = list(segmenter.segment(iter(cut), plan))
    assert [m.shape for m in out] == [w.shape[:3] for w in cut] and all(m.dtype == bool for m in out)
    return np.concatenate(out)


@pytest.fixture(scope="module")
def usual(sam2) -> np.ndarray:
    return masks_of(sam2, pictures(), plan_of(), FRAMES)


def library_masks(model, frames: np.ndarray, plan: PromptPlan) -> np.ndarray:
    """transformers alone: one streamed session that never forgets, prompts scaled to its square by hand."""
    import torch
    from transformers import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(video_height=HEIGHT, video_width=WIDTH, dtype=torch.float32)
    out = []
    for at, frame in enumerate(frames):
        if at in plan.keys:
            told = plan.at(at)
            coords = torch.tensor([[[[x * SIDE / WIDTH, y * SIDE / HEIGHT] for x, y in told.points.tolist()]]])
            labels = torch.tensor([[[int(i) for i in told.inside]]], dtype=torch.int32)
            session.add_point_inputs(session.obj_id_to_idx(1), at, {"point_coords": coords, "point_labels": labels})
            session.obj_with_new_inputs = [1]
        image = torch.tensor(frame).permute(2, 0, 1)[None] / 255
        image = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
        image = (image - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        logits = model(session, frame=image, frame_idx=at).pred_masks
        out.append(torch.nn.functional.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear")[0, 0] > 0)
    return torch.stack(out).numpy()


def test_segmenter_with_pruned_memory_gives_masks_of_library(sam2, usual):
    """24 frames are more than 16, how far back the model looks; what it needs of older ones must still be there."""
    oracle = library_masks(sam2._model, pictures(), plan_of())
    assert (usual != oracle).mean() < 1e-4  # a logit on the threshold may round to either side
    assert 0.1 < usual.mean() < 0.9


@pytest.mark.parametrize("window", [5, 8])
def test_masks_do_not_depend_on_window_length(sam2, usual, window):
    assert (masks_of(sam2, pictures(), plan_of(), window) == usual).all()


def test_segmenter_with_interleaved_clips_keeps_them_apart(sam2, usual):
    masks_of(sam2, pictures(6, seed=5), plan_of(6, seed=5))
    interleaved = sam2.segment(iter(np.split(pictures(), 3)), plan_of())
    first = next(interleaved)
    masks_of(sam2, pictures(4, seed=6), plan_of(4, seed=6))
    assert (np.concatenate([first, *interleaved]) == usual).all()


def test_segmenter_memory_reaches_into_next_window(sam2, usual):
    other = pictures()
    other[3] = 255 - other[3]
    masks = masks_of(sam2, other, plan_of(), window=4)
    assert (masks[:3] == usual[:3]).all()
    assert (masks[4:6] != usual[4:6]).any()  # another window, the same pictures, the same prompts


def test_masks_with_moved_prompts_differ(sam2, usual):
    moved = plan_of()
    moved.points[0, :, :2] += 15
    assert (masks_of(sam2, pictures(2), PromptPlan(moved.points[:2], moved.size))[0] != usual[0]).any()


def test_masks_before_person_appears_are_empty(sam2):
    plan = plan_of(absent=(0, 1, 2))
    masks = masks_of(sam2, pictures(), plan)
    assert min(plan.keys) == 3
    assert not masks[:3].any() and masks[3].any()
    assert (masks_of(sam2, pictures(), plan, window=2) == masks).all()


def test_segmenter_prompts_again_at_frame_where_person_is_lost(sam2):
    asked = []

    class Forgetful(Sam2Segmenter):
        """Loses the person while tracking frame 5."""

        def _mask(self, session, at, pixels, prompts, shape):
            asked.append((at, prompts is not None))
            mask = super()._mask(session, at, pixels, prompts, shape)
            return np.zeros_like(mask) if (at, prompts) == (5, None) else mask

    plan = plan_of(12)
    assert sorted(plan.keys) == [0, 3, 6, 9]
    masks = masks_of(Forgetful(sam2._model, "forgetful"), pictures(12), plan)
    assert asked[4:8] == [(4, False), (5, False), (5, True), (6, True)] and len(asked) == 13
    # Of all it remembers nothing is asked: the frame is a key frame now, as if the clip began there.
    fresh = masks_of(sam2, pictures(12)[5:6], PromptPlan(plan.points[5:6], plan.size))
    assert masks[5].any() and (masks[5] == fresh[0]).all()


class Watched:
    """Bytes of all tensors that a session holds, after each frame."""

    def __init__(self, monkeypatch):
        import torch
        import transformers

        sizes = self.sizes = []
        keys = self.keys = []

        def held(value) -> int:
            if isinstance(value, torch.Tensor):
                return value.numel() * value.element_size()
            if isinstance(value, dict):
                return sum(held(v) for v in value.values())
            return sum(held(v) for v in value) if isinstance(value, list | tuple) else 0

        class Session(transformers.Sam2VideoInferenceSession):
            def add_new_frame(self, pixel_values, frame_idx=None):
                parts = (self.processed_frames or {}, self.output_dict_per_obj, self.point_inputs_per_obj)
                sizes.append(sum(held(p) for p in (*parts, self.cache._vision_features)))
                outputs = self.output_dict_per_obj[0]
                keys.append(len(outputs["cond_frame_outputs"]))
                entries = (outputs["non_cond_frame_outputs"], self.frames_tracked_per_obj[0])
                assert all(len(e) <= 16 for e in entries)
                return super().add_new_frame(pixel_values, frame_idx)

        monkeypatch.setattr(transformers, "Sam2VideoInferenceSession", Session)


def test_segmenter_memory_does_not_grow_with_clip_length(sam2, monkeypatch):
    monkeypatch.setattr(point_prompts, "MOST_BETWEEN_KEYS", 5)
    watched = Watched(monkeypatch)
    plan = plan_of(70)
    assert len(plan.keys) == 14
    masks_of(sam2, pictures(70), plan)
    assert len(watched.sizes) == 70
    assert max(watched.keys) == KEYS_KEPT
    assert max(watched.sizes[45:]) <= max(watched.sizes[:45])


def test_segmenter_in_bfloat16_agrees_with_float32(folder, usual):
    """A GPU computes in bfloat16; here the CPU does. Random weights amplify rounding, so most pixels agree, not all.

    Frames 0 and 6 are prompted. Those between go through memory, which has its own arithmetic.
    """
    import torch
    from transformers import Sam2VideoModel

    model = Sam2VideoModel.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16).eval()
    halved = Sam2Segmenter(model, "halved")
    assert halved.description["dtype"] == "bfloat16"
    assert sorted(plan_of().keys)[:2] == [0, 6]
    masks = masks_of(halved, pictures()[:8], plan_of())
    assert ((masks == usual[:8]).mean((1, 2)) > 0.85).all()


@pytest.mark.gpu
def test_segmenter_on_gpu_runs_in_bfloat16_and_agrees_with_cpu(folder, usual):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there = load_segmenter(folder, "cuda")
    assert there.description == {"model": "sam2", "device": "cuda:0", "dtype": "bfloat16"}
    masks = masks_of(there, pictures()[:8], plan_of())
    assert ((masks == usual[:8]).mean((1, 2)) > 0.85).all()


def test_segmenter_description_names_model_device_and_dtype(sam2):
    assert sam2.description == {"model": "sam2", "device": "cpu", "dtype": "float32"}


class TestFolders:
    def test_load_segmenter_of_empty_folder_is_weights_missing(self, tmp_path):
        with pytest.raises(WeightsMissing, match=r"config\.json.*`mask:`"):
            load_segmenter(tmp_path)

    @pytest.mark.parametrize("text", ["{}", "[1]", '{"model_type": "sam2"}', '{"model_type": []}', "no json"])
    def test_load_segmenter_with_other_config_is_weights_corrupt(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsCorrupt, match="sam2_video, video-lab-puppet"):
            load_segmenter(tmp_path)

    def test_load_segmenter_with_pickled_weights_is_weights_missing(self, folder, tmp_path):
        shutil.copy(folder / "config.json", tmp_path)
        (tmp_path / "sam2_hiera_large.pt").write_bytes(b"\x80\x04.")
        with pytest.raises(WeightsMissing, match=r"no model\.safetensors"):
            load_segmenter(tmp_path)

    def test_load_segmenter_with_truncated_weights_is_weights_corrupt(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "sam2")
        file = tmp_path / "sam2" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(WeightsCorrupt, match="cannot be loaded"):
            load_segmenter(tmp_path / "sam2")

    def test_load_segmenter_with_missing_tensor_names_tensor(self, folder, tmp_path):
        from safetensors.torch import load_file, save_file

        shutil.copy(folder / "config.json", tmp_path)
        tensors = load_file(folder / "model.safetensors")
        del tensors["no_object_pointer"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsCorrupt, match=r"1 tensors are missing.*no_object_pointer"):
            load_segmenter(tmp_path)

    def test_load_segmenter_on_absent_device_is_config_invalid(self, folder):
        with pytest.raises(ConfigInvalid, match="cuda:63"):
            load_segmenter(folder, "cuda:63")

    def test_load_segmenter_with_demo_config_needs_no_weights(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "video-lab-puppet"}))
        assert load_segmenter(tmp_path, "cuda").description["model"] == "video-lab-puppet"


class Canned:
    """Gives the masks it was made with."""

    def __init__(self, masks: np.ndarray) -> None:
        self.masks = masks
        self.description = {"model": "canned"}

    def segment(self, windows, plan):
        at = 0
        for window in windows:
            yield self.masks[at : at + len(window)]
            at += len(window)


class TestClip:
    masks = np.random.default_rng(2).random((9, HEIGHT, WIDTH)) < 0.3
    numbers = np.arange(9) * 10

    def clip(self, masks: np.ndarray, plan: PromptPlan):
        windows = iter(np.split(pictures(9), [4]))
        return segment_clip(Canned(masks), windows, plan, numbers=self.numbers, where="dance.mp4")

    def test_segment_clip_keeps_masks_exactly(self):
        kept = self.clip(self.masks, plan_of(9))
        assert (np.stack(list(kept.frames(0, 9))) == self.masks).all()

    def test_segment_clip_with_empty_mask_of_person_names_frame(self):
        masks = self.masks.copy()
        masks[6] = False
        with pytest.raises(NoPerson, match=r"dance\.mp4: frame 60: the person is there, but the mask is empty"):
            self.clip(masks, plan_of(9))

    def test_segment_clip_with_empty_mask_of_absent_person_passes(self):
        masks = self.masks.copy()
        masks[6] = False
        kept = self.clip(masks, plan_of(9, absent=(6,)))
        assert [m.any() for m in kept.frames(0, 9)] == [i != 6 for i in range(9)]

    def test_segment_clip_without_any_person_is_no_person(self):
        with pytest.raises(NoPerson, match="no frame has enough"):
            self.clip(self.masks, plan_of(9, absent=tuple(range(9))))

    def test_segment_clip_with_other_count_of_poses_is_internal_error(self):
        with pytest.raises(InternalError, match="9 masks for 12 frames"):
            self.clip(self.masks, plan_of(12))
