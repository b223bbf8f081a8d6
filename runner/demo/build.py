"""Build: the embedded default on disk: models small enough for a CPU, clips with known joints.

In:   a folder. Out: for models, the production store's layout (DESIGN: "Model store"); for media, references, dances,
      a mask and `joints.json`, the ground truth. Never: manifests, rendering.
A folder that is complete and was made by this very code is left as it is; a half-made one is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runner.demo.dancers import DANCERS, backdrop, dancer_silhouette, draw_dancer
from runner.demo.dances import BEAT_S, PLAIN, Stage, dance
from runner.demo.drawing import CHARACTERS, box_of, draw, silhouette
from runner.demo.puppet import JOINTS
from runner.demo.scenes import FLOOR, scene
from runner.demo.trained import copy_trained, trained_digest
from runner.errors import ConfigInvalid

__all__ = [
    "CLIPS",
    "DANCER_PORTRAITS",
    "DETECTOR_FILE",
    "PORTRAITS",
    "POSE_FILE",
    "build_demo",
    "build_demo_media",
    "build_demo_models",
    "stage_for",
]

DETECTOR_FILE = "process_checkpoint/det/yolov10m.onnx"
SEGMENTER_FOLDER = "process_checkpoint/sam2"
POSE_FILE = "process_checkpoint/pose2d/vitpose_h_wholebody.onnx"
_MARKER = "demo.json"  # what was built, by which code, with every file's size; complete or not


@dataclass(frozen=True)
class Clip:
    """A driving video: one puppet that dances in front of one scene."""

    name: str
    dance: str
    scene: str
    width: int
    height: int
    character: str = "pip"
    seconds: int = 3
    fps: int = 24
    audio: bool = False
    mask: bool = False

    @property
    def frames(self) -> int:
        return self.seconds * self.fps


@dataclass(frozen=True)
class Portrait:
    """A reference image: one character at one moment of a dance. A dancer's `scene` is its own, whatever it says."""

    name: str
    character: str
    scene: str
    width: int
    height: int
    dance: str
    time_s: float


CLIPS = (
    Clip("wave", "wave", "studio", 320, 480, mask=True),
    Clip("jacks", "jacks", "stage", 320, 480, audio=True),
    Clip("step", "step", "street", 480, 320, mask=True),
    Clip("twist", "twist", "meadow", 360, 480, character="cato"),
)
PORTRAITS = (
    Portrait("anna", "anna", "meadow", 480, 720, "jacks", 0.32),
    Portrait("bela", "bela", "studio", 640, 960, "wave", 1.12),
    Portrait("cato", "cato", "street", 540, 720, "jacks", 0.3),
)
# The trained model's characters, in rooms of their own; what is danced in their pictures is no demo job's dance.
DANCER_PORTRAITS = (
    Portrait("mira", "mira", "", 480, 720, "jacks", 0.42),
    Portrait("otto", "otto", "", 480, 720, "jacks", 0.28),
    Portrait("juno", "juno", "", 480, 720, "step", 1.7),
)


def build_demo(models: Path, media: Path) -> None:
    """Both of the below."""
    build_demo_models(models)
    build_demo_media(media)


def build_demo_models(root: Path, weights: Literal["trained", "random"] = "trained") -> None:
    """The tiny store at `root`: every model of the default recipe, under its production name.

    `weights`: "trained" ones transfer motion; "random" ones are smaller, and render noise that obeys every input.
    Files appear only when all of them are made. Raises ConfigInvalid when `root` holds a store that is not the demo's:
    real weights are never overwritten.
    """

    def build(into: Path) -> None:
        from runner.demo.tiny_detector import build_tiny_detector
        from runner.demo.tiny_fp4 import build_tiny_fp4, quantize_with
        from runner.demo.tiny_model import build_tiny_store
        from runner.demo.tiny_pose import build_tiny_pose
        from runner.demo.tiny_segmenter import build_tiny_segmenter

        if weights == "trained":
            quantize_with(into, copy_trained(into))
        else:
            build_tiny_store(into)
            build_tiny_fp4(into)
        build_tiny_detector(into / DETECTOR_FILE)
        build_tiny_pose(into / POSE_FILE)
        build_tiny_segmenter(into / SEGMENTER_FOLDER)

    modules = ("build", "tiny_model", "tiny_fp4", "tiny_detector", "tiny_pose", "tiny_segmenter", "graph", "puppet")
    version = _version(*modules, "trained")
    _install(root, version if weights == "random" else f"{version}-{trained_digest()[:16]}", build)


def build_demo_media(root: Path) -> None:
    """References, dances and their masks at `root`; `joints.json` knows every joint and box of every frame.

    references/NAME.png, dances/NAME.mp4 (H.264; one with AAC sound), masks/NAME.mp4 (white where the puppet is).
    """

    def build(into: Path) -> None:
        for folder in ("references", "dances", "masks"):
            (into / folder).mkdir(parents=True)
        truth = {
            "joint_names": list(JOINTS),
            "clips": {clip.name: _write_clip(clip, into) for clip in CLIPS},
            "references": {
                portrait.name: _write_portrait(portrait, into) for portrait in (*PORTRAITS, *DANCER_PORTRAITS)
            },
        }
        (into / "joints.json").write_text(json.dumps(truth, separators=(",", ":")) + "\n", encoding="utf-8")

    _install(root, _version("build", "dancers", "dances", "drawing", "puppet", "scenes"), build)


def stage_for(width: int, height: int, character: str) -> Stage:
    """A puppet on the scene's floor, tall enough to be seen well, low enough for its raised hands to stay in frame."""
    tall = min(0.70 * height, 1.02 * width)
    build = CHARACTERS[character].build if character in CHARACTERS else PLAIN
    return Stage(width / 2, height * (FLOOR + 0.11), tall, build)


def _truth(joints: np.ndarray, box: tuple[int, int, int, int]) -> dict[str, Any]:
    return {"joints": joints.round(2).tolist(), "box": list(box)}


def _write_portrait(portrait: Portrait, root: Path) -> dict[str, Any]:
    from PIL import Image

    width, height = portrait.width, portrait.height
    stage = stage_for(width, height, portrait.character)
    joints = dance(portrait.dance, portrait.time_s, stage)
    if portrait.character in DANCERS:
        dancer = DANCERS[portrait.character]
        picture = draw_dancer(backdrop(dancer, width, height), joints, stage.height, dancer)
        box = box_of(dancer_silhouette((height, width), joints, stage.height, dancer))
    else:
        character = CHARACTERS[portrait.character]
        picture = draw(scene(portrait.scene, width, height, seed=2), joints, stage.height, character)
        box = box_of(silhouette((height, width), joints, stage.height, character))
    Image.fromarray(picture).save(root / "references" / f"{portrait.name}.png")
    return {"width": width, "height": height, **_truth(joints, box)}


def _write_clip(clip: Clip, root: Path) -> dict[str, Any]:
    """Render and encode one clip, and its mask if asked. Returns its ground truth."""
    from runner.video import AudioSpan, Mp4Writer

    stage, character = stage_for(clip.width, clip.height, clip.character), CHARACTERS[clip.character]
    ground = scene(clip.scene, clip.width, clip.height, seed=1)
    dancing = [dance(clip.dance, i / clip.fps, stage) for i in range(clip.frames)]
    covered = np.stack([silhouette(ground.shape[:2], joints, stage.height, character) for joints in dancing])
    pictures = np.stack([draw(ground.copy(), joints, stage.height, character) for joints in dancing])

    fps = Fraction(clip.fps)
    sound = root / "sound.wav" if clip.audio else None
    if sound:
        _write_beat(sound, clip.seconds)
    span = AudioSpan(sound, 0.0, float(clip.seconds)) if sound else None
    with Mp4Writer(root / "dances" / f"{clip.name}.mp4", clip.width, clip.height, fps, audio=span) as writer:
        writer.write(pictures)
    if sound:
        sound.unlink()
    if clip.mask:
        # Near-lossless: a mask is thresholded when read, and must not move by a pixel at its edge.
        with Mp4Writer(root / "masks" / f"{clip.name}.mp4", clip.width, clip.height, fps, crf=1) as writer:
            writer.write(np.repeat(covered[..., None].astype(np.uint8) * 255, 3, axis=3))
    return {
        "width": clip.width,
        "height": clip.height,
        "fps": clip.fps,
        "frames": [_truth(joints, box_of(mask)) for joints, mask in zip(dancing, covered, strict=True)],
    }


def _write_beat(path: Path, seconds: int, rate: int = 48_000) -> None:
    """A plucked tone on every beat, every fourth an octave higher: 16-bit mono WAV."""
    time_s = np.arange(seconds * rate) / rate
    beat, since = np.divmod(time_s, BEAT_S)
    pitch_hz = np.where(beat % 4 == 0, 660.0, 330.0)
    wave_form = 0.4 * np.sin(2 * np.pi * pitch_hz * since) * np.exp(-9 * since) * np.minimum(1, since * 400)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((wave_form * 32767).astype("<i2").tobytes())


def _version(*modules: str) -> str:
    """Identity of the code that makes a folder's files: editing it makes them anew, with no number to remember."""
    digest = hashlib.sha256()
    for name in sorted({*modules, "build"}):
        digest.update(name.encode() + b"\0" + Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def _install(root: Path, version: str, build: Callable[[Path], None]) -> None:
    """Fill `root` by `build` unless that is done: made in a folder beside, moved in whole, the marker last."""
    if _is_complete(root, version):
        return
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        if _is_complete(root, version):  # another process was faster
            return
        staged = root / ".building"  # within root: the same file system, also when root is a mounted volume
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            build(staged)
            _replace(root, staged, version)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _replace(root: Path, staged: Path, version: str) -> None:
    made = sorted(piece.name for piece in staged.iterdir())
    files = {str(f.relative_to(staged)): f.stat().st_size for f in sorted(staged.rglob("*")) if f.is_file()}
    old = _read_marker(root)
    foreign = [name for name in made if (root / name).exists() and name not in old.get("pieces", [])]
    if foreign:
        raise ConfigInvalid(
            f"{', '.join(foreign)} is there already and was not made by the demo",
            where=root,
            todo="Give the demo a folder of its own",
        )
    # From here until the last line the marker says: ours, but unfinished.
    pieces = sorted({*made, *old.get("pieces", [])})
    _write_marker(root, {"version": version, "complete": False, "pieces": pieces, "files": files})
    for name in pieces:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
        else:
            (root / name).unlink(missing_ok=True)
    for name in made:
        (staged / name).rename(root / name)
    _write_marker(root, {"version": version, "complete": True, "pieces": made, "files": files})


def _is_complete(root: Path, version: str) -> bool:
    marker = _read_marker(root)
    if not marker.get("complete") or marker.get("version") != version:
        return False
    return all(
        (root / name).is_file() and (root / name).stat().st_size == size for name, size in marker["files"].items()
    )


def _read_marker(root: Path) -> dict[str, Any]:
    try:
        marker = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _write_marker(root: Path, marker: dict[str, Any]) -> None:
    fresh = root / f"{_MARKER}.tmp"
    fresh.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    fresh.replace(root / _MARKER)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(root / ".demo.lock"):
        yield
