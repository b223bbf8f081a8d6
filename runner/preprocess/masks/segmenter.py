"""Segmenter: find the person's pixels in each frame of a clip of any length.

In:   windows of frames and a `PromptPlan`. Out: windows of bool masks; `segment_clip` keeps them, packed.
Never: options, video files, the use of a mask.

SAM 2 runs frame by frame in one session of `transformers`. The session's memory is pruned as the clip goes on, so that
it does not grow. The official script keeps 400 frames on the GPU and starts anew after each 400. Prompts are given when
their frame comes, so that a key frame has an effect on the frames after it, not on those before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runner.errors import ConfigInvalid, InternalError, NoPerson, WeightsCorrupt, WeightsMissing
from runner.preprocess.masks.packed import ClipMasks
from runner.preprocess.masks.point_prompts import PromptPlan, Prompts

__all__ = ["Sam2Segmenter", "Segmenter", "load_segmenter", "segment_clip"]

# `model_type` of the folder's config.json -> class. The demo's is imported by name: this module may not import demo.
BACKENDS = {
    "sam2_video": "runner.preprocess.masks.segmenter:Sam2Segmenter",
    "video-lab-puppet": "runner.demo.tiny_segmenter:PuppetSegmenter",
}
HUB = "facebook/sam2.1-hiera-large on the Hugging Face hub"
OBJECT = 1  # the id of the only object
KEYS_KEPT = 5  # latest prompted frames in memory: as many as in an official chunk; each takes attention time
# ImageNet's, of pixels in 0..1: every published SAM 2 was trained on these.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter(Protocol):
    """A loaded segmentation model."""

    description: dict[str, Any]  # plain values for the record

    def segment(self, windows: Iterator[np.ndarray], plan: PromptPlan) -> Iterator[np.ndarray]:
        """Yield bool [n, H, W] for each window of frames uint8 RGB [n, H, W, 3].

        Windows follow each other: frame i of all windows together is frame i of `plan`. Masks do not depend on the
        size of windows. A mask is empty if no person is found.
        """


def load_segmenter(folder: Path, device: str = "cpu") -> Segmenter:
    """Load the segmenter in `folder` onto "cpu", "cuda" or "cuda:N".

    Raises WeightsMissing, WeightsCorrupt, or ConfigInvalid if the device is not available.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise WeightsMissing(
            "there is no segmenter here; mode replace needs one to make a mask",
            where=config,
            todo=f"Put {HUB} (safetensors) into this folder, or give the job a `mask:`",
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["model_type"]
        module, _, name = BACKENDS[kind].partition(":")
    except (ValueError, KeyError, TypeError) as err:
        raise WeightsCorrupt(
            f"not a segmenter's config: model_type must be one of {', '.join(BACKENDS)}",
            where=config,
            todo=f"Put {HUB} (safetensors) into this folder",
        ) from err
    segmenter: Segmenter = getattr(import_module(module), name).load(folder, device)
    return segmenter


def segment_clip(
    segmenter: Segmenter, windows: Iterator[np.ndarray], plan: PromptPlan, *, numbers: np.ndarray, where: object
) -> ClipMasks:
    """Return the masks of a whole clip, one for each frame of `plan`. Only one window of frames is in memory.

    numbers: int [n], the frames' numbers in the video `where`, for errors.
    A frame without the person has an empty mask. Raises NoPerson if no frame is usable, and if the mask of a usable
    frame is empty.
    """
    todo = "Give a video in which the person is well visible, or give the job a `mask:`"
    if not plan.keys:
        raise NoPerson("no frame has enough confident joints inside the picture to find a mask", where=where, todo=todo)
    width, height = plan.size

    def masks() -> Iterator[np.ndarray]:
        at = 0
        for window in segmenter.segment(windows, plan):
            for mask in window:
                if plan.usable[at] and not mask.any():
                    raise NoPerson(
                        f"frame {int(numbers[at])}: the person is there, but the mask is empty", where=where, todo=todo
                    )
                at += 1
                yield mask

    kept = ClipMasks.of(masks(), height, width)
    if len(kept) != len(plan):
        raise InternalError(f"{len(kept)} masks for {len(plan)} frames", where=where)
    return kept


class Sam2Segmenter:
    """SAM 2 for video: `Sam2VideoModel` of transformers, with one object, frame by frame."""

    def __init__(self, model: Any, name: str) -> None:
        """model: on its device, in its dtype, in eval mode."""
        import torch

        self._model = model
        self._device, self._dtype = model.device, model.dtype
        size = model.config.image_size
        self._side = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))  # height, width
        self._mean = torch.tensor(MEAN, device=self._device).view(3, 1, 1) * 255
        self._deviation = torch.tensor(DEVIATION, device=self._device).view(3, 1, 1) * 255
        self._horizon = max(model.config.num_maskmem, model.config.max_object_pointers_in_encoder)
        self.description: dict[str, Any] = {
            "model": name,
            "device": str(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Sam2Segmenter:
        """Load from a folder in transformers' layout, safetensors only: bfloat16 on a GPU, float32 on a CPU.

        Raises WeightsMissing, WeightsCorrupt; ConfigInvalid if the device is not available.
        """
        import torch
        from transformers import Sam2VideoModel
        from transformers.utils import logging as transformers_logging

        if device != "cpu" and (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise ConfigInvalid(
                f"device {device!r} was asked for, but torch finds {torch.cuda.device_count()} CUDA device(s)",
                todo="Check the driver (nvidia-smi), or use --device cpu",
            )
        names = ("model.safetensors", "model.safetensors.index.json")
        if not any((folder / name).is_file() for name in names):
            raise WeightsMissing(
                "no model.safetensors (pickled weights, .pt and .bin, can run code and are never read)",
                where=folder,
                todo=f"Put {HUB} into this folder",
            )
        transformers_logging.disable_progress_bar()  # the run shows its own progress
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            model, info = Sam2VideoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=dtype
            )
        except Exception as err:  # safetensors' error is a plain Exception; callers handle MemoryError
            if isinstance(err, MemoryError):
                raise
            raise WeightsCorrupt(
                f"cannot be loaded ({type(err).__name__}: {err})", where=folder, todo="Download this folder again"
            ) from err
        if missing := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
            raise WeightsCorrupt(
                f"{len(missing)} tensors are missing or of another shape ({missing[0]}, …)",
                where=folder,
                todo="These are not the weights that its config.json describes; download this folder again",
            )
        return cls(model.to(device).eval(), folder.name)

    def segment(self, windows: Iterator[np.ndarray], plan: PromptPlan) -> Iterator[np.ndarray]:
        """See `Segmenter`. Frames before the first key frame have empty masks: there is nothing to follow yet.

        A usable frame in which tracking has lost the person is prompted again.
        """
        from transformers import Sam2VideoInferenceSession

        session = Sam2VideoInferenceSession(
            inference_device=self._device,
            inference_state_device=self._device,
            video_storage_device=self._device,
            dtype=self._dtype,
        )
        at = 0
        for window in windows:
            masks = np.zeros(window.shape[:3], bool)
            for mask, frame in zip(masks, window, strict=True):
                prompts = plan.at(at) if at in plan.keys else None
                if prompts is not None or session.get_obj_num():
                    pixels = self._pixels(frame)
                    mask[:] = self._mask(session, at, pixels, prompts, frame.shape[:2])
                    if plan.usable[at] and prompts is None and not mask.any():
                        _forget(session, at)
                        mask[:] = self._mask(session, at, pixels, plan.at(at), frame.shape[:2])
                    self._prune(session, at)
                at += 1
            yield masks

    def _mask(self, session: Any, at: int, pixels: Any, prompts: Prompts | None, shape: tuple[int, int]) -> np.ndarray:
        """Return bool [H, W] for one frame and add it to the session. With prompts it becomes a key frame."""
        from torch.nn.functional import interpolate

        if prompts is not None:
            self._prompt(session, at, prompts, shape)
        low = self._model(session, frame_idx=at, frame=pixels).pred_masks
        logits = interpolate(low.float(), size=shape, mode="bilinear", align_corners=False)[0, 0]
        mask: np.ndarray = (logits > 0).cpu().numpy()
        return mask

    def _prompt(self, session: Any, at: int, prompts: Prompts, shape: tuple[int, int]) -> None:
        """Do the same as `Sam2VideoProcessor.add_inputs_to_inference_session`, which would need torchvision."""
        import torch

        scale = np.array([self._side[1] / shape[1], self._side[0] / shape[0]], np.float32)
        points = torch.from_numpy(prompts.points * scale)[None, None]  # [1 picture, 1 object, k, 2]
        labels = torch.from_numpy(prompts.inside.astype(np.int32))[None, None]
        index = session.obj_id_to_idx(OBJECT)
        session.add_point_inputs(index, at, {"point_coords": points, "point_labels": labels})
        session.obj_with_new_inputs = [OBJECT]

    def _pixels(self, frame: np.ndarray) -> Any:
        """Stretch and normalise uint8 [H, W, 3] on the device, to [1, 3, side, side]."""
        import torch
        from torch.nn.functional import interpolate

        image = torch.from_numpy(np.ascontiguousarray(frame)).to(self._device).permute(2, 0, 1).float()
        image = (image - self._mean) / self._deviation
        return interpolate(image[None], size=self._side, mode="bilinear", align_corners=False, antialias=True)

    def _prune(self, session: Any, at: int) -> None:
        """Drop what later frames do not read: the picture, full-size masks, memories out of range, old key frames."""
        session.processed_frames.pop(at)
        for index, outputs in session.output_dict_per_obj.items():
            session.point_inputs_per_obj[index].pop(at, None)
            tracked, keys = outputs["non_cond_frame_outputs"], outputs["cond_frame_outputs"]
            for memory in (tracked.get(at), keys.get(at)):
                if memory is not None:
                    memory.pop("high_res_masks", None)
                    memory.pop("pred_masks", None)
            tracked.pop(at - self._horizon, None)
            session.frames_tracked_per_obj[index].pop(at - self._horizon, None)
            while len(keys) > KEYS_KEPT:
                keys.pop(min(keys))


def _forget(session: Any, at: int) -> None:
    """Remove the tracking result of frame `at`, so that prompts make it a key frame."""
    for index, outputs in session.output_dict_per_obj.items():
        outputs["non_cond_frame_outputs"].pop(at, None)
        session.frames_tracked_per_obj[index].pop(at, None)
