"""Build: media whose ground truth is true after the encoder, and folders that are whole or made again."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runner.demo import build
from runner.demo.build import (
    CLIPS,
    DETECTOR_FILE,
    MEDIA_MODULES,
    MODEL_MODULES,
    PORTRAITS,
    POSE_FILE,
    SEGMENTER_FOLDER,
    build_demo_media,
    build_demo_models,
)
from runner.demo.drawing import box_of
from runner.demo.puppet import PALETTE
from runner.errors import ConfigInvalid
from runner.spec.options import JobOptions
from runner.video import VideoReader, probe


def truth_of(media: Path) -> dict:
    return json.loads((media / "joints.json").read_text(encoding="utf-8"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def test_clips_are_what_they_say(media: Path) -> None:
    for clip in CLIPS:
        info = probe(media / "dances" / f"{clip.name}.mp4")
        assert (info.width, info.height, info.frames, info.fps) == (clip.width, clip.height, 72, 24)
        assert info.has_audio == clip.audio
        assert len(truth_of(media)["clips"][clip.name]["frames"]) == 72
    assert any(clip.audio for clip in CLIPS)
    assert any(clip.width > clip.height for clip in CLIPS)


def test_the_sound_beats(media: Path) -> None:
    import av

    with av.open(str(media / "dances" / "jacks.mp4")) as file:
        assert file.streams.audio[0].codec_context.name == "aac"
        rate = file.streams.audio[0].rate
        sound = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    assert sound.size == pytest.approx(3 * rate, rel=0.03)
    loudness = [np.abs(sound[int(t * rate) : int((t + 0.1) * rate)]).mean() for t in (0.75, 1.5, 2.25, 0.6, 1.35, 2.1)]
    assert min(loudness[:3]) > 5 * max(loudness[3:])  # just after a beat, just before the next


def test_discs_are_where_joints_json_says(media: Path) -> None:
    for clip in CLIPS:
        frames = truth_of(media)["clips"][clip.name]["frames"]
        with VideoReader(media / "dances" / f"{clip.name}.mp4") as reader:
            for index in (0, 31, 71):
                picture = reader.read(np.array([index]))[0] / 255
                x, y = np.array(frames[index]["joints"]).round().astype(int).T
                off = np.linalg.norm(picture[y, x] - PALETTE, axis=1)
                assert off.max() < 0.25  # nearer to its own colour than to any other
                assert (
                    np.linalg.norm(picture[y, x][:, None] - PALETTE[None], axis=2).argmin(axis=1) == range(23)
                ).all()


def test_references_show_their_joints(media: Path) -> None:
    from PIL import Image

    for portrait in PORTRAITS:
        truth = truth_of(media)["references"][portrait.name]
        picture = np.asarray(Image.open(media / "references" / f"{portrait.name}.png")) / 255
        assert picture.shape == (portrait.height, portrait.width, 3)
        x, y = np.array(truth["joints"]).round().astype(int).T
        np.testing.assert_allclose(picture[y, x], PALETTE, atol=0.01)


def test_mask_is_the_silhouette(media: Path) -> None:
    masked = [clip for clip in CLIPS if clip.mask]
    assert masked
    for clip in masked:
        frames = truth_of(media)["clips"][clip.name]["frames"]
        with VideoReader(media / "masks" / f"{clip.name}.mp4") as reader:
            assert reader.info.frames == clip.frames
            for index in (0, 40, 71):
                mask = reader.read(np.array([index]))[0].max(axis=2)
                assert ((mask < 40) | (mask > 215)).mean() > 0.999
                assert list(box_of(mask > 127)) == frames[index]["box"]


@pytest.mark.parametrize("parity", [False, True])
def test_the_preprocessor_sees_the_puppet(media: Path, tmp_path: Path, parity: bool) -> None:
    from runner.demo.tiny_detector import build_tiny_detector
    from runner.demo.tiny_pose import build_tiny_pose
    from runner.preprocess.networks.vitpose import PoseEstimator
    from runner.preprocess.networks.yolov10 import Detector, choose_person, choose_person_parity

    build_tiny_detector(tmp_path / "det.onnx")
    build_tiny_pose(tmp_path / "pose.onnx")
    detector, pose = Detector.load(tmp_path / "det.onnx"), PoseEstimator.load(tmp_path / "pose.onnx")
    choose = choose_person_parity if parity else choose_person
    for clip in CLIPS:
        truth = truth_of(media)["clips"][clip.name]["frames"]
        indices = np.array([0, 25, 50])
        with VideoReader(media / "dances" / f"{clip.name}.mp4") as reader:
            frames = reader.read(indices)
        boxes = [choose(rows, (clip.width, clip.height)) for frame in frames for rows in detector.rows([frame])]
        points = pose.points(frames, boxes)[:, :23]
        joints = np.array([truth[i]["joints"] for i in indices])
        error = np.linalg.norm(points[..., :2] - joints, axis=2)
        # The official decoding rounds the crop's corners and not its size: half a pixel of bias beside its own error.
        assert error.mean() < 1.0
        assert error.max() < 3.0
        assert points[..., 2].min() > 0.5


def test_references_and_clips_prepare_as_jobs(media: Path, tmp_path: Path) -> None:
    from runner.demo.tiny_detector import build_tiny_detector
    from runner.demo.tiny_pose import build_tiny_pose
    from runner.preprocess.prepare import Preprocessor
    from runner.timing import StageTimer

    build_tiny_detector(tmp_path / "det.onnx")
    build_tiny_pose(tmp_path / "pose.onnx")
    preprocessor = Preprocessor.load(tmp_path / "det.onnx", tmp_path / "pose.onnx")
    options = JobOptions(mode="replace", size="144x96", fps=8, max_frames=9)
    conditions = preprocessor.prepare(
        media / "references" / "anna.png",
        media / "dances" / "step.mp4",
        options,
        mask=media / "masks" / "step.mp4",
        face_size=32,
        timer=StageTimer(),
    )
    try:
        window = conditions.window(0, 9)
        assert window.pose.shape == (9, 96, 144, 3)
        assert (window.pose > 0).any(axis=(1, 2, 3)).all()  # a skeleton in every frame
        assert 0.02 < (window.mask > 127).mean() < 0.5
    finally:
        conditions.close()


def test_media_are_the_same_bytes_each_time(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CLIPS", CLIPS[1:3])  # one with sound, one with a mask
    monkeypatch.setattr(build, "PORTRAITS", PORTRAITS[:1])
    build_demo_media(tmp_path)
    whole, again = contents(media), contents(tmp_path)
    same = {"dances/jacks.mp4", "dances/step.mp4", "masks/step.mp4", "references/anna.png"}
    assert same <= again.keys()
    assert all(again[name] == whole[name] for name in same)


def demo_imports(module: str) -> set[str]:
    """`module` of runner/demo and all of that folder that it imports, inside functions too, and what those import."""
    found, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        tree = ast.parse(Path(build.__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
        imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        waiting |= {i.removeprefix("runner.demo.") for i in imports if i.startswith("runner.demo.")} - found
    return found


def test_the_hashed_modules_are_those_that_make_the_files() -> None:
    """A module that is missing from these lists could change, and old models or media would be taken for its work."""
    assert demo_imports("build") == {*MODEL_MODULES, *MEDIA_MODULES}
    tiny = {name for name in demo_imports("build") if name.startswith("tiny_")}
    assert len(tiny) == 4
    assert {*MODEL_MODULES} == {"build"}.union(*map(demo_imports, tiny))


@pytest.mark.parametrize("modules", [MODEL_MODULES, MEDIA_MODULES])
def test_every_hashed_module_changes_the_version(modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in modules:
        shutil.copy(Path(build.__file__).with_name(f"{name}.py"), tmp_path)
    before = build._version(*modules)
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    assert build._version(*modules) == before
    for name in modules:
        file = tmp_path / f"{name}.py"
        code = file.read_bytes()
        file.write_bytes(code + b"#")
        assert build._version(*modules) != before, name
        file.write_bytes(code)


@pytest.fixture
def stub_store(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The diffusers folder as two small files; counts how often it is made."""
    import types

    made: list[int] = []

    def build_tiny_store(root: Path, seed: int = 0) -> None:
        made.append(seed)
        (root / "Wan2.2-Animate-14B-Diffusers" / "vae").mkdir(parents=True)
        (root / "Wan2.2-Animate-14B-Diffusers" / "vae" / "config.json").write_text("{}")

    module = types.ModuleType("runner.demo.tiny_model")
    module.build_tiny_store = build_tiny_store  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "runner.demo.tiny_model", module)

    def build_tiny_fp4(root: Path) -> None:
        (root / "distill_lora").mkdir()
        (root / "distill_lora" / "tiny.safetensors").write_text("")

    monkeypatch.setattr("runner.demo.build.build_tiny_fp4", build_tiny_fp4)
    return made


class TestInstall:
    def test_production_names(self, tmp_path: Path, stub_store: list[int]) -> None:
        build_demo_models(tmp_path / "models", "random")
        names = {name for name in contents(tmp_path / "models") if "/" in name}
        assert names == {
            DETECTOR_FILE,
            POSE_FILE,
            f"{SEGMENTER_FOLDER}/config.json",
            "Wan2.2-Animate-14B-Diffusers/vae/config.json",
            "distill_lora/tiny.safetensors",
        }

    def test_complete_is_left_alone(self, tmp_path: Path, stub_store: list[int]) -> None:
        build_demo_models(tmp_path, "random")
        before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
        build_demo_models(tmp_path, "random")
        assert stub_store == [0]
        assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == before

    def damage_missing(root: Path) -> None:
        (root / DETECTOR_FILE).unlink()

    def damage_short(root: Path) -> None:
        (root / POSE_FILE).write_bytes((root / POSE_FILE).read_bytes()[:-1])

    def damage_other_code(root: Path) -> None:
        marker = json.loads((root / "demo.json").read_text())
        (root / "demo.json").write_text(json.dumps({**marker, "version": "earlier"}))

    def damage_interrupted(root: Path) -> None:
        marker = json.loads((root / "demo.json").read_text())
        (root / "demo.json").write_text(json.dumps({**marker, "complete": False}))
        (root / ".building" / "process_checkpoint").mkdir(parents=True)

    @pytest.mark.parametrize("damage", [damage_missing, damage_short, damage_other_code, damage_interrupted])
    def test_incomplete_or_old_is_made_again(
        self, tmp_path: Path, stub_store: list[int], damage: Callable[[Path], None]
    ) -> None:
        build_demo_models(tmp_path, "random")
        whole = contents(tmp_path)
        damage(tmp_path)
        build_demo_models(tmp_path, "random")
        assert contents(tmp_path) == whole
        assert len(stub_store) == 2

    def test_a_failed_build_leaves_nothing_in_place(
        self, tmp_path: Path, stub_store: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(path: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("runner.demo.tiny_pose.build_tiny_pose", fail)
        with pytest.raises(OSError, match="No space"):
            build_demo_models(tmp_path, "random")
        assert {f.name for f in tmp_path.iterdir()} <= {".demo.lock"}

    def test_foreign_weights_are_never_touched(self, tmp_path: Path, stub_store: list[int]) -> None:
        real = tmp_path / "process_checkpoint" / "det" / "yolov10m.onnx"
        real.parent.mkdir(parents=True)
        real.write_bytes(b"real weights")
        with pytest.raises(ConfigInvalid, match="not made by the demo"):
            build_demo_models(tmp_path, "random")
        assert real.read_bytes() == b"real weights"
        assert not (tmp_path / "Wan2.2-Animate-14B-Diffusers").exists()
