"""Identity: measures whether the person in two videos is the same, by networks that are independent of the renderer.

In:   two videos, the boxes of person and face in each, the networks of a model store, the frames to examine.
Out:  `findings.Identity`. A value that cannot be measured is null, and `why` has the reason. Never: limits.

cosine         the store's CLIP image encoder, on the person's box
lpips          of whole frames; file `metrics/lpips-alex.safetensors`
face_distance  dlib's face network, on the face's box; files `metrics/faces-*.dat` and the extra `faces`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runner.errors import WeightsCorrupt
from runner.records.output_layout import PEOPLE
from runner.regression.face_network import FACE_FILES, FaceNetwork
from runner.regression.findings import Identity
from runner.regression.lpips import LEAST_PICTURE, Lpips

if TYPE_CHECKING:
    from runner.records.people import People, PixelBox

__all__ = [
    "FACE_GATED",
    "FACE_MEASURED",
    "ComparedFrames",
    "ImageEncoder",
    "MetricNetworks",
    "face_is_gated",
    "frames_to_look_at",
    "measure_identity",
]

METRICS = "metrics"  # folder of a model store
LPIPS_FILE = "lpips-alex.safetensors"
MOST_FRAMES = 12  # a frame takes about 1 s of a CPU core without an image encoder; assumed to be enough for a mean
LEAST_PARAMETERS = 20_000_000  # OpenAI's smallest published image encoder has 86 million; a demo's random one 0.02
# Measured at 33 pixels: single frames of two people can be as close as those of one person, but their means are not.
# Below 32 pixels nothing was measured. A limit needs faces twice as large; assumed: there is no such overlap then.
FACE_MEASURED, FACE_GATED = 32, 64
WINDOW = 3  # examined frames that are averaged: single faces of one person differ by up to 0.66
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ComparedFrames(Protocol):
    """A rendered video that gives single frames."""

    @property
    def frames(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        ...

    @property
    def fps(self) -> Fraction | None: ...

    def frame(self, i: int) -> np.ndarray:
        """uint8 RGB [H, W, 3]"""
        ...


@dataclass(eq=False)
class ImageEncoder:
    """A CLIP image encoder of a model store; it is read from disk at its first use."""

    folder: Path
    side: int  # pixels; side of its square input picture
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    device: str = "cpu"
    _model: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> ImageEncoder | str:
        """Open a component's folder. Returns the reason as text if it is not a trained encoder.

        Raises WeightsCorrupt if its files cannot be read.
        """
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModel

        try:
            config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in CLIPVisionModel(config).parameters())
        except Exception as error:  # the library raises many different classes for wrong values
            raise WeightsCorrupt(
                f"its config.json is not that of a CLIP image encoder: {error}", where=folder
            ) from error
        if parameters < LEAST_PARAMETERS:
            return f"the image encoder has only {parameters:,} parameters: it is a random one for demos, not trained"
        statistics = _read_json(folder.parent / "image_processor" / "preprocessor_config.json")
        mean, std = (
            tuple(statistics.get(name, usual))
            for name, usual in (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))
        )
        return cls(folder, int(config.image_size), mean, std, device)

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, D] embeddings of length 1. Pictures: uint8 RGB [side, side, 3]."""
        import torch

        if self._model is None:
            self._model = self._load()
        dtype = next(self._model.parameters()).dtype
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255
            mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (self.mean, self.std))
            pooled = self._model(pixel_values=((pixels - mean) / std).to(dtype)).pooler_output.float()
            unit = torch.nn.functional.normalize(pooled, dim=-1)
        return np.asarray(unit.cpu().numpy(), np.float32)

    def cut(self, picture: np.ndarray, box: PixelBox) -> np.ndarray:
        """Return uint8 [side, side, 3]: the box in the middle of a square of the mean colour, resized."""
        import cv2

        x1, y1, x2, y2 = box
        size = max(x2 - x1, y2 - y1)
        square = np.empty((size, size, 3), np.uint8)
        square[:] = np.round(np.array(self.mean) * 255).astype(np.uint8)
        left, top = (size - (x2 - x1)) // 2, (size - (y2 - y1)) // 2
        square[top : top + y2 - y1, left : left + x2 - x1] = picture[y1:y2, x1:x2]
        how = cv2.INTER_AREA if size > self.side else cv2.INTER_CUBIC
        return cv2.resize(square, (self.side, self.side), interpolation=how)

    def _load(self) -> Any:
        import torch
        from transformers import CLIPVisionModel
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # `compare` shows its own progress
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        try:
            model, told = CLIPVisionModel.from_pretrained(
                self.folder, local_files_only=True, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsCorrupt(f"the image encoder cannot be read: {error}", where=self.folder) from error
        for what in ("missing", "mismatched"):
            if names := sorted(map(str, told.get(f"{what}_keys") or ())):
                raise WeightsCorrupt(
                    f"{len(names)} {what} tensors, {names[0]} among them",
                    where=self.folder,
                    todo="Download this folder again",
                )
        return model.eval().requires_grad_(False).to(self.device)


@dataclass(frozen=True, eq=False)
class MetricNetworks:
    """The optional networks of a model store."""

    encoder: ImageEncoder | None = None
    lpips: Lpips | None = None
    faces: FaceNetwork | None = None
    why: dict[str, str] = field(default_factory=dict)  # cosine, lpips, face_distance → why it is missing

    @staticmethod
    def wanted(key: str) -> bool:
        """Return whether the file with this key is needed when a model store is synced from an object store."""
        return key.startswith(f"{METRICS}/") or key.split("/")[1:2] in (["image_encoder"], ["image_processor"])

    @classmethod
    def open(cls, models: Path | None, device: str = "cpu") -> MetricNetworks:
        """Open the networks of a local model store, or of none. Raises WeightsCorrupt for damaged files."""
        names = ("cosine", "lpips", "face_distance")
        if models is None:
            return cls(why=dict.fromkeys(names, "no model store was given: --models"))
        folder, why = models / METRICS, {}
        encoder: ImageEncoder | str = f"there is no image encoder in {models.name}/"
        found = sorted(path.parent for path in models.glob("*/image_encoder/config.json"))
        if found:
            encoder = ImageEncoder.open(found[0], device)
        if isinstance(encoder, str):
            why["cosine"] = encoder
        lpips = Lpips.open(folder / LPIPS_FILE) if (folder / LPIPS_FILE).is_file() else None
        if lpips is None:
            why["lpips"] = f"{METRICS}/{LPIPS_FILE} is not in the model store: tools/convert_lpips.py makes it"
        faces = None
        missing = [name for name in FACE_FILES if not (folder / name).is_file()]
        if missing:
            why["face_distance"] = f"{METRICS}/{missing[0]} is not in the model store: tools/convert_faces.py makes it"
        else:
            try:
                faces = FaceNetwork.open(folder)
            except ImportError:
                why["face_distance"] = "dlib is not installed: pip install 'video-lab-runner[faces]'"
        return cls(None if isinstance(encoder, str) else encoder, lpips, faces, why)


def frames_to_look_at(
    frames: int, joints: Iterable[int] = (), worst: Iterable[int] = (), most: int = MOST_FRAMES
) -> list[int]:
    """Return at most `most` indices of 0…frames-1, ascending: the worst frames, both sides of joints, others spread.

    joints: the first frame of each segment after the first. If there are many joints, some of them, spread evenly.
    """
    most = min(most, frames)
    chosen = [i for i in dict.fromkeys(worst) if 0 <= i < frames][: max(1, most // 4)]
    sides = [joint for joint in joints if 0 < joint < frames]
    pairs = max(1, most // 6)
    for joint in [sides[i] for i in _spread(len(sides), pairs)]:
        chosen += [joint - 1, joint]
    found = set(chosen[:most])
    for i in [*_spread(frames, most - len(found)), *_spread(frames, most)]:
        if len(found) < most:
            found.add(i)
    return sorted(found)


def measure_identity(
    new: ComparedFrames,
    baseline: ComparedFrames,
    people_new: People | None,
    people_baseline: People | None,
    *,
    networks: MetricNetworks,
    at: Sequence[int],
    fps: tuple[Fraction | None, Fraction | None] = (None, None),
) -> Identity:
    """Measure with all `networks` on those frames `at` that both videos have.

    `fps`: rates of both videos, new first, for videos without a rate, such as PNG frames.
    """
    examined = sorted({i for i in at if 0 <= i < min(new.frames, baseline.frames)})
    sides = [
        _Side.of(video, people, video.fps or rate)
        for video, people, rate in zip((new, baseline), (people_new, people_baseline), fps, strict=True)
    ]
    why = dict(networks.why)
    meters: list[_Meter] = []
    unknown = _explain_missing_people(people_new, people_baseline)
    if networks.lpips is not None:
        meters.append(_LpipsMeter(networks.lpips))
    if networks.encoder is not None and not unknown:
        meters.append(_CosineMeter(networks.encoder))
    if networks.faces is not None and not unknown:
        meters.append(_FaceMeter(networks.faces))
    if unknown:
        why = {"cosine": unknown, "face_distance": unknown} | why
    for index in examined:
        one, other = (side.look(index) for side in sides)
        for meter in meters:
            meter.add(index, one, other)
    found: dict[str, Any] = {"frames": len(examined)}
    for meter in meters:
        values, reasons = meter.result()
        found |= values
        why |= reasons
    return Identity(**found, why=why)


def face_is_gated(identity: Identity) -> bool:
    """Return whether the faces are large enough for a limit on `face_distance`."""
    return identity.face_distance is not None and (identity.face_pixels or 0) >= FACE_GATED


MeterResult = tuple[dict[str, Any], dict[str, str]]  # fields of Identity; name → why it has no value


@dataclass(frozen=True, eq=False)
class _Look:
    """One frame of one video, with the boxes of person and face."""

    picture: np.ndarray
    person: PixelBox | None
    face: PixelBox | None


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two videos."""

    video: ComparedFrames
    people: People | None  # at the video's size
    fps: Fraction | None

    @classmethod
    def of(cls, video: ComparedFrames, people: People | None, fps: Fraction | None) -> _Side:
        return cls(video, None if people is None else people.resized(*video.size), fps)

    def look(self, index: int) -> _Look:
        picture = self.video.frame(index)
        if self.people is None:
            return _Look(picture, None, None)
        return _Look(picture, self.people.person(index, self.fps), self.people.face(index, self.fps))


class _Meter(Protocol):
    """One metric, measured frame by frame. It keeps no frames."""

    def add(self, index: int, new: _Look, baseline: _Look) -> None: ...

    def result(self) -> MeterResult: ...


def _explain_missing_people(new: People | None, baseline: People | None) -> str:
    """Return which outputs have no boxes of people; empty if both have them."""
    unknown = [name for name, people in (("new", new), ("baseline", baseline)) if people is None or not people.people]
    if not unknown:
        return ""
    whose = "neither output has" if len(unknown) == 2 else f"the {unknown[0]} output does not have"
    return f"{whose} boxes of people ({PEOPLE}): older runs and official files do not write them"


class _CosineMeter:
    def __init__(self, encoder: ImageEncoder) -> None:
        self._encoder = encoder
        self._values: dict[int, float] = {}

    def add(self, index: int, new: _Look, baseline: _Look) -> None:
        if new.person is None or baseline.person is None:
            return
        one, other = self._encoder.embed(
            [self._encoder.cut(new.picture, new.person), self._encoder.cut(baseline.picture, baseline.person)]
        )
        self._values[index] = float(np.clip(one @ other, -1, 1))

    def result(self) -> MeterResult:
        if not self._values:
            return {}, {"cosine": "no examined frame shows the person in both outputs"}
        worst = min(self._values, key=lambda index: self._values[index])
        return {"cosine": self._values[worst], "cosine_frame": worst}, {}


class _LpipsMeter:
    def __init__(self, network: Lpips) -> None:
        self._network = network
        self._values: dict[int, float] = {}
        self._why = "no frame was examined"

    def add(self, index: int, new: _Look, baseline: _Look) -> None:
        if new.picture.shape != baseline.picture.shape:
            self._why = "the sizes of the two outputs differ"
        elif min(new.picture.shape[:2]) < LEAST_PICTURE:
            self._why = f"frames with fewer than {LEAST_PICTURE} pixels per side are too small for the network"
        else:
            self._values[index] = self._network.distance(new.picture, baseline.picture)

    def result(self) -> MeterResult:
        if not self._values:
            return {}, {"lpips": self._why}
        worst = max(self._values, key=lambda index: self._values[index])
        return {"lpips": self._values[worst], "lpips_frame": worst}, {}


class _FaceMeter:
    def __init__(self, network: FaceNetwork) -> None:
        self._network = network
        self._sides: list[int] = []  # pixels; side of the smaller face of both videos
        self._frames: list[int] = []  # frames that have embeddings
        self._embeddings: list[tuple[np.ndarray, np.ndarray]] = []  # new, baseline

    def add(self, index: int, new: _Look, baseline: _Look) -> None:
        if new.face is None or baseline.face is None:
            return
        self._sides.append(min(_side(new.face), _side(baseline.face)))
        if self._sides[-1] >= FACE_MEASURED:
            self._frames.append(index)
            one = self._network.embed(new.picture, new.face)
            self._embeddings.append((one, self._network.embed(baseline.picture, baseline.face)))

    def result(self) -> MeterResult:
        if not self._sides:
            return {}, {"face_distance": "no examined frame shows a face with high confidence in both outputs"}
        pixels = float(np.median(self._sides))
        size = f"faces are {pixels:g} pixels large (median)"
        if pixels < FACE_MEASURED:
            why = f"{size}: below {FACE_MEASURED} people cannot be distinguished"
            return {"face_pixels": pixels}, {"face_distance": why}
        new, baseline = (np.stack(side) for side in zip(*self._embeddings, strict=True))
        width = min(WINDOW, len(new))
        windows = [slice(i, i + width) for i in range(len(new) - width + 1)]
        smooth = [_distance(new[window], baseline[window]) for window in windows]
        worst = int(np.argmax(smooth))
        found = {
            "face_distance": _distance(new, baseline),
            "face_worst": smooth[worst],
            "face_frame": self._frames[worst + width // 2],
            "face_pixels": pixels,
        }
        if pixels >= FACE_GATED:
            return found, {}
        return found, {"face_gate": f"{size}: below {FACE_GATED} the distance is reported, but no limit applies to it"}


def _distance(new: np.ndarray, baseline: np.ndarray) -> float:
    """Return the distance of the means of embeddings [n, 128]."""
    return float(np.linalg.norm(new.mean(0) - baseline.mean(0)))


def _side(box: PixelBox) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _spread(length: int, count: int) -> list[int]:
    """Return `count` evenly spread indices of 0…length-1 (or all): the middles of equal parts."""
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it does not exist. Raises WeightsCorrupt."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WeightsCorrupt(f"not JSON: {error}", where=path) from error
    return found if isinstance(found, dict) else {}
