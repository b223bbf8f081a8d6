"""Build: write the demo's files: models small enough for a CPU, and clips with known joints.

In:   a folder. Out: for models, the production store's layout (DESIGN: "Model store"); for media, references, dances,
      a mask and `joints.json`, the ground truth. Never: manifests, rendering, training (tools/train_demo.py).
A complete folder that the same code made is not changed; an unfinished one is made again.
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
from runner.errors import ConfigInvalid

__all__ = [
    "CLIPS",
    "DANCER_PORTRAITS",
    "DETECTOR_FILE",
    "MEDIA_MODULES",
    "MODEL_MODULES",
    "PORTRAITS",
    "POSE_FILE",
    "TRAINED",
    "build_demo_media",
    "build_demo_models",
    "build_tiny_fp4",
    "build_tiny_lora",
    "copy_trained",
    "quantize_with",
    "stage_for",
    "trained_digest",
]

DETECTOR_FILE = "process_checkpoint/det/yolov10m.onnx"
SEGMENTER_FOLDER = "process_checkpoint/sam2"
POSE_FILE = "process_checkpoint/pose2d/vitpose_h_wholebody.onnx"
TRAINED = Path(__file__).with_name("weights")  # made by tools/train_demo.py
_TRAINED_FOLDERS = ("Wan2.2-Animate-14B-Diffusers", "distill_lora")
LORA_RANK = 4
LORA_SIZE = 0.02  # of a weight's norm, about as much as the published LoRA adds
# Modules of this folder whose code makes the files. If one of them changes, the files are made again.
MODEL_MODULES = ("build", "graph", "puppet", "tiny_detector", "tiny_model", "tiny_pose", "tiny_segmenter")
MEDIA_MODULES = ("build", "dancers", "dances", "drawing", "puppet", "scenes")
_MARKER = "demo.json"  # what was built, by which code, with every file's size; complete or not


@dataclass(frozen=True)
class Clip:
    """A driving video: one puppet dances in front of one scene."""

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
    """A reference image: one character at one time of a dance. A dancer has its own scene; `scene` has no effect."""

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
# The trained model's characters, each in its own room. Their pictures show dances that no demo job of theirs has.
DANCER_PORTRAITS = (
    Portrait("mira", "mira", "", 480, 720, "jacks", 0.42),
    Portrait("otto", "otto", "", 480, 720, "jacks", 0.28),
    Portrait("juno", "juno", "", 480, 720, "step", 1.7),
)


def build_demo_models(root: Path, weights: Literal["trained", "random"] = "trained") -> None:
    """Build the tiny store at `root`: every model of the default recipe, under its production name.

    weights: "trained" weights transfer motion; "random" ones are smaller and render noise that depends on every input.
    Files appear only when all of them are made. Raises ConfigInvalid if `root` has a store that is not the demo's: real
    weights are never overwritten.
    """

    def build(into: Path) -> None:
        from runner.demo.tiny_detector import build_tiny_detector
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

    version = _version(*MODEL_MODULES)
    _install(root, version if weights == "random" else f"{version}-{trained_digest()[:16]}", build)


def copy_trained(root: Path) -> Path:
    """Copy the trained models into `root`. Returns the LoRA's path. Raises ConfigInvalid if the package has none."""
    for name in _TRAINED_FOLDERS:
        if not (TRAINED / name).is_dir():
            raise ConfigInvalid(
                "the demo's trained weights are missing",
                where=TRAINED / name,
                todo="Install the package from its wheel or a complete checkout, or make them with tools/train_demo.py",
            )
        shutil.copytree(TRAINED / name, root / name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    (lora,) = (root / _TRAINED_FOLDERS[1]).glob("*.safetensors")
    return lora


def trained_digest() -> str:
    """Return the sha256 (hex) of the files that `copy_trained` copies."""
    digest = hashlib.sha256()
    for path in sorted(p for name in _TRAINED_FOLDERS for p in (TRAINED / name).rglob("*") if p.is_file()):
        digest.update(path.relative_to(TRAINED).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_tiny_lora(transformer: Path, path: Path, seed: int = 0) -> None:
    """Write `lora_down`/`lora_up` pairs and bias `diff_b`s for attention and feed-forward of every block, in bf16."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    ffn = config["ffn_dim"]
    shapes = {f"self_attn.{name}": (dim, dim) for name in "qkvo"} | {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for block in range(config["num_layers"]):
        for name, (out, wide) in shapes.items():
            key = f"diffusion_model.blocks.{block}.{name}"
            # A linear of width `wide` starts with deviation 1/sqrt(3 wide): up @ down gets LORA_SIZE times its norm.
            deviation = (LORA_SIZE**2 / (3 * wide * LORA_RANK)) ** 0.25
            tensors[f"{key}.lora_down.weight"] = torch.randn(LORA_RANK, wide, generator=generator) * deviation
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, LORA_RANK, generator=generator) * deviation
            tensors[f"{key}.diff_b"] = torch.randn(out, generator=generator) * LORA_SIZE / wide**0.5
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}, path)


def build_tiny_fp4(root: Path) -> None:
    """Write the random LoRA, and the FP4 file with it merged, into the store at `root`."""
    from runner.spec.recipes import SOURCE_WEIGHTS
    from runner.weights.variant import DISTILL_FOLDER

    lora = root / DISTILL_FOLDER / "tiny_distill_rank4.safetensors"
    build_tiny_lora(root / SOURCE_WEIGHTS / "transformer", lora)
    quantize_with(root, lora)


def quantize_with(root: Path, lora: Path) -> None:
    """Merge `lora` into the transformer of the store at `root`, and quantise it for `fp4-distill`."""
    from runner.quantization.files.checkpoint_write import quantize_store
    from runner.quantization.formats.e2m1 import FORMATS
    from runner.quantization.lora.apply import read_lora
    from runner.spec.recipes import SOURCE_WEIGHTS, get_recipe
    from runner.weights.variant import TRANSFORMER_FILE, quantized_folder

    target = root / quantized_folder(get_recipe("fp4-distill")) / TRANSFORMER_FILE
    source = root / SOURCE_WEIGHTS / "transformer"
    quantize_store(source, target, FORMATS["nvfp4"], loras=[read_lora(lora)], device="cpu")


def build_demo_media(root: Path) -> None:
    """Build references, dances, masks and `joints.json` (every joint and box of every frame) at `root`.

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

    _install(root, _version(*MEDIA_MODULES), build)


def stage_for(width: int, height: int, character: str) -> Stage:
    """Return the place of a puppet on the scene's floor. It is tall, but its raised hands stay inside the frame."""
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
    """Render and encode one clip, with its mask if `clip.mask`. Returns its ground truth."""
    from runner.video import AudioSpan, Mp4Writer, join_parts

    stage, character = stage_for(clip.width, clip.height, clip.character), CHARACTERS[clip.character]
    ground = scene(clip.scene, clip.width, clip.height, seed=1)
    dancing = [dance(clip.dance, i / clip.fps, stage) for i in range(clip.frames)]
    covered = np.stack([silhouette(ground.shape[:2], joints, stage.height, character) for joints in dancing])
    pictures = np.stack([draw(ground.copy(), joints, stage.height, character) for joints in dancing])

    fps, video = Fraction(clip.fps), root / "dances" / f"{clip.name}.mp4"
    with Mp4Writer(video, clip.width, clip.height, fps) as writer:
        writer.write(pictures)
    if clip.audio:
        silent, sound = video.rename(root / "silent.mp4"), root / "sound.wav"
        _write_beat(sound, clip.seconds)
        join_parts([silent], video, fps=fps, audio=AudioSpan(sound, 0.0, float(clip.seconds)))
        silent.unlink()
        sound.unlink()
    if clip.mask:
        # Nearly lossless: a mask is thresholded when it is read, and its edge must not move by a pixel.
        with Mp4Writer(root / "masks" / f"{clip.name}.mp4", clip.width, clip.height, fps, crf=1) as writer:
            writer.write(np.repeat(covered[..., None].astype(np.uint8) * 255, 3, axis=3))
    return {
        "width": clip.width,
        "height": clip.height,
        "fps": clip.fps,
        "frames": [_truth(joints, box_of(mask)) for joints, mask in zip(dancing, covered, strict=True)],
    }


def _write_beat(path: Path, seconds: int, rate: int = 48_000) -> None:
    """Write a plucked tone on every beat, every fourth an octave higher: 16-bit mono WAV."""
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
    """Return a hash of the code that makes a folder's files. So an edit of the code makes them again."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        digest.update(name.encode() + b"\0" + Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def _install(root: Path, version: str, build: Callable[[Path], None]) -> None:
    """Fill `root` with `build`, unless it is complete. Files are made in a folder inside and moved at the end."""
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
            todo="Give the demo an empty folder",
        )
    # Until the last line of this function the marker means: made by the demo, but unfinished.
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
