"""Options: the settings of one job, as frozen values that are validated once, when the manifest is read.

In:   a mapping from the manifest. Out: `JobOptions`. Never: paths, devices, recipes (those belong to the run).
The manifest, its JSON Schema and the fingerprint all read these fields. Defaults are defined only here.
A new field is marked with the default it was introduced with: `Annotated[float, Introduced(0.0)]`, see
`field_marks.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from runner.spec.field_marks import Introduced, NotHashed

__all__ = [
    "BACKGROUND",
    "DEFAULT_PROMPT",
    "FACE",
    "MASK",
    "POSE",
    "REFERENCE",
    "Frozen",
    "JobOptions",
    "LoraOption",
    "MaskOptions",
    "OutputOptions",
    "PreprocessOptions",
    "Size",
    "official_names",
    "whole_number",
]

DEFAULT_PROMPT = "视频中的人在做动作"  # the official default: "the person in the video is moving"

# The pattern is for the exported schema; `_size` below checks it, with a message that gives an example.
_SIZE = r"(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})"
Size = Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^{_SIZE}$"})]
MAX_SIDE = 4096
MIN_FPS = 0.01  # a frame in 100 s; rates are kept as fractions with denominators up to 1001
MAX_START_S = 1e9  # 32 years; frame numbers are exact up to there


def whole_number(value: Any) -> Any:
    """Return `value` if it is an int, else raise ValueError. For a Literal of numbers, which accepts 1.0 and true as
    1."""
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _as_tuple(value: Any) -> Any:
    """Convert a list from YAML or JSON: strict models accept no list for a tuple."""
    return tuple(value) if isinstance(value, list) else value


class Frozen(BaseModel):
    """Base of strict models: "5" is not a number, 1.5 not a count, 1 not a yes. A float may be written as 30."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True)


Corner = Annotated[float, Field(ge=0)]
PersonNumber = Annotated[int, Field(ge=1)]
Subject = Literal["largest", "centre"] | PersonNumber | tuple[Corner, Corner, Corner, Corner]
Colour = Literal["off", "seam", "anchor"]
Retarget = Literal["off", "robust", "official"]


def _retarget(value: Any) -> Any:
    """Convert true and false to their names. YAML reads `off` as false."""
    if isinstance(value, bool):
        return "robust" if value else "off"
    return value


def _colour(value: Any) -> Any:
    """Convert false to `off`: YAML reads `off` as false."""
    return "off" if value is False else value


class MaskOptions(Frozen):
    """How a mask made by SAM 2 is widened, at the output's size. A mask from the manifest is not widened."""

    iterations: int = Field(default=3, ge=0, le=50, description="number of dilations; 0: the raw mask, and no grid")
    kernel: int = Field(default=7, ge=1, le=99, description="side of the dilation's square, pixels")
    w_len: int | None = Field(default=None, ge=1, description="cells across the mask's box; null: no grid (parity: 1)")
    h_len: int | None = Field(default=None, ge=1, description="cells down the mask's box; null: no grid (parity: 1)")

    def grid(self, parity: bool) -> tuple[int, int] | None:
        """Return (w_len, h_len), or None if no grid is filled."""
        if self.w_len is None and self.h_len is None:
            return (1, 1) if parity else None
        return self.w_len or 1, self.h_len or 1


class PreprocessOptions(Frozen):
    """How the driving video becomes skeletons and faces."""

    parity: bool = Field(default=False, description="reproduce the official preprocessing, its known defects included")
    detect_every: int | None = Field(
        default=None,
        ge=1,
        le=60,
        description="run the person detector on every n-th frame, and track between; "
        "null: ten times a second (parity: on every frame)",
    )
    subject: Subject = Field(
        default="largest",
        description="the person to follow: largest or centre (over the whole clip), the person's number in video-lab "
        "inspect (from 1), or a box [x1, y1, x2, y2] around the person in the first frame with people, pixels of the "
        "driving video",
    )
    pose: Literal["vitpose", "dwpose"] = Field(
        default="vitpose", description="networks: YOLOv10 and ViTPose, or YOLOX and RTMPose (process_checkpoint/dwpose)"
    )
    mask: MaskOptions = MaskOptions()
    official: Annotated[str | None, NotHashed()] = Field(  # a path; the files in it are hashed among the inputs
        default=None,
        alias="from",
        min_length=1,
        description="render from the official script's files in this folder (src_pose.mp4, …)",
    )
    smooth: bool = Field(default=False, description="smooth every joint over time (one-euro filter, without lag)")
    retarget: Annotated[
        Retarget, BeforeValidator(_retarget), WithJsonSchema({"enum": ["off", "robust", "official", True, False]})
    ] = Field(
        default="off",
        description="give the skeleton the reference's proportions: off, robust (true means this), official",
    )

    @field_validator("subject", mode="wrap")
    @classmethod
    def _subject(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        corners = tuple(value) if isinstance(value, list) else value
        try:
            chosen = handler(corners)
        except ValidationError as err:  # one message, where a union gives one for each of its members
            raise ValueError(
                "must be largest, centre, a person's number from 1, or a box [x1, y1, x2, y2] in pixels"
            ) from err
        if isinstance(chosen, tuple) and not (chosen[0] < chosen[2] and chosen[1] < chosen[3]):
            raise ValueError("a box is [left, top, right, bottom]: left < right and top < bottom")
        return chosen


class OutputOptions(Frozen):
    format: Literal["mp4", "png"] = Field(
        default="mp4", description="mp4 (H.264), or png: frames/<token>/%06d.png, lossless"
    )
    crf: int = Field(default=18, ge=0, le=51, description="x264 constant rate factor: lower is better and larger")
    interpolate: Annotated[Literal[1, 2], Introduced(1)] = Field(
        default=1, description="2: twice the frame rate; a network makes one frame between each two"
    )
    pad_last: Annotated[bool, Introduced(False)] = Field(
        default=False, description="with interpolate: repeat the last frame, so that n frames become 2n, not 2n-1"
    )

    @field_validator("interpolate", mode="before")
    @classmethod
    def _interpolate(cls, value: Any) -> Any:
        return whole_number(value)


class LoraOption(Frozen):
    """A LoRA in the model store's folder `loras/`, for one job."""

    name: str = Field(min_length=1, pattern=r"^[^/\\]+$", description="file name in loras/, without .safetensors")
    strength: float = Field(default=1.0, ge=-4, le=4)


class JobOptions(Frozen):
    """The options of one job. Sizes in pixels, times in seconds, counts in frames."""

    mode: Literal["animate", "replace"] = Field(
        default="animate",
        description="animate: the reference's scene; replace: put the character into the driving video",
    )
    size: Size = Field(
        default="auto", description="WIDTHxHEIGHT, multiples of 16; auto: 480p area in the input's aspect"
    )
    fps: Annotated[float, Field(ge=MIN_FPS, le=120)] | Literal["source"] = Field(
        default=16.0, description="frames a second to sample and to write; source: as the driving video"
    )
    start_s: float = Field(
        default=0.0, ge=0, le=MAX_START_S, description="where in the driving video to begin, seconds"
    )
    max_frames: int | None = Field(default=None, ge=2, description="at most this many output frames; null: all")
    seed: int = Field(default=42, ge=0, lt=2**63, description="random seed of the noise; same seed, same frames")
    steps: int | None = Field(default=None, ge=1, le=100, description="denoising steps; null: the recipe's")
    guidance_scale: float = Field(default=1.0, ge=0, le=20, description="CFG scale; above 1 takes twice the time")
    negative_prompt: str | None = Field(default=None, description="used only when guidance_scale > 1")
    max_segment_frames: int = Field(
        default=81, ge=5, le=241, description="longest segment denoised at once, 4k+1 frames"
    )
    overlap_frames: Literal[1, 5] = Field(
        default=1, description="last frames of a segment that the next segment starts from"
    )
    loras: Annotated[tuple[LoraOption, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="LoRAs for this job only"
    )
    keep_audio: bool = Field(default=False, description="copy the driving video's sound, cut to the rendered part")
    face_strength: Annotated[float, Introduced(1.0)] = Field(
        default=1.0, ge=0, le=2, description="how much the driver's face moves the character's: scales its residual"
    )
    pose_strength: Annotated[float, Introduced(1.0)] = Field(
        default=1.0, ge=0, le=2, description="how strictly the skeleton is followed: scales its latents"
    )
    colour: Annotated[
        Colour, Introduced("off"), BeforeValidator(_colour), WithJsonSchema({"enum": ["off", "seam", "anchor", False]})
    ] = Field(default="off", description="correct colours that drift from segment to segment: off, seam or anchor")
    output: OutputOptions = OutputOptions()
    preprocess: PreprocessOptions = PreprocessOptions()

    @field_validator("size")
    @classmethod
    def _size(cls, value: str) -> str:
        if not re.fullmatch(_SIZE, value):
            raise ValueError("must be WIDTHxHEIGHT in pixels, for example 480x832, or auto")
        if value == "auto":
            return value
        width, height = (int(n) for n in value.split("x"))
        if width % 16 or height % 16:
            near = f"{max(16, round(width / 16) * 16)}x{max(16, round(height / 16) * 16)}"
            raise ValueError(f"width and height must be multiples of 16; the nearest is {near}")
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"no side may be longer than {MAX_SIDE} pixels")
        return value

    @field_validator("fps", mode="wrap")
    @classmethod
    def _fps(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as err:  # one message, where a union gives one for each of its members
            raise ValueError(f"must be frames a second, at least {MIN_FPS} and at most 120, or source") from err

    @field_validator("loras")
    @classmethod
    def _loras(cls, value: tuple[LoraOption, ...]) -> tuple[LoraOption, ...]:
        names = [lora.name for lora in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"names {twice!r} twice; name it once, with one strength")
        return value

    @field_validator("overlap_frames", mode="before")
    @classmethod
    def _overlap(cls, value: Any) -> Any:
        return whole_number(value)

    @field_validator("max_segment_frames")
    @classmethod
    def _segment(cls, value: int) -> int:
        if value % 4 != 1:
            below = value - (value - 1) % 4
            raise ValueError(f"must be 4k+1 (the video autoencoder packs 4 frames); try {below} or {below + 4}")
        return value

    @model_validator(mode="after")
    def _fits_overlap(self) -> JobOptions:
        if self.max_segment_frames <= 2 * self.overlap_frames:
            raise ValueError(f"max_segment_frames must be at least 13 when overlap_frames is {self.overlap_frames}")
        return self

    @property
    def size_pixels(self) -> tuple[int, int] | None:
        """(width, height), or None for `auto`."""
        match = re.fullmatch(r"(\d+)x(\d+)", self.size)
        return (int(match[1]), int(match[2])) if match else None


# File names of the official preprocessing script.
REFERENCE, POSE, FACE = "src_ref.png", "src_pose.mp4", "src_face.mp4"
BACKGROUND, MASK = "src_bg.mp4", "src_mask.mp4"


def official_names(mode: str) -> dict[str, str]:
    """Return kind of input → file name, for the inputs that `mode` needs."""
    names = {"reference": REFERENCE, "pose": POSE, "face": FACE}
    return names | ({"background": BACKGROUND, "mask": MASK} if mode == "replace" else {})
