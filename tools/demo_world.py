"""World: unlimited training examples for the demo model: a dancer, a dance of another figure, and the correct video.

In:   a random generator and a size. Out: an `Example`: the reference, the driving skeletons and faces (drawn by the
project's preprocessing) and the correct video. Never: tensors, networks, files.

The driver is the puppet that the tiny detector and pose model find. Here its joints are known; small noise imitates the
estimates of those models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from demo_choreography import random_choreography

from runner.demo.dancers import Dancer, backdrop, dancer_silhouette, draw_dancer, random_dancer
from runner.demo.dances import BEAT_S, DANCES, Build, Stage, Stance, joints_of
from runner.demo.drawing import CHARACTERS, Character, draw, silhouette
from runner.demo.puppet import lift
from runner.demo.scenes import FLOOR, SCENES, scene
from runner.preprocess.body.face import crop_face, face_box
from runner.preprocess.body.keypoints import FACE, Pose
from runner.preprocess.body.skeleton import draw_skeleton
from runner.preprocess.masks.widen import ITERATIONS, augment, blacken

__all__ = ["Example", "Take", "example", "random_portrait", "random_take", "skeletons"]

NATIVE_HEIGHT = 480  # pixels of a driving clip, from which faces are cropped
TREMBLE = 0.35  # native pixels: error of the tiny pose model's joints


@dataclass(frozen=True)
class Take:
    """A filmed dance: one stance function, a stage in pixels of the picture, times in seconds."""

    moves: Callable[[float], Stance]
    stage: Stage
    times_s: np.ndarray  # float64 [n]

    def joints(self) -> np.ndarray:
        """float64 [n, 23, 2], pixels."""
        return np.stack([joints_of(self.moves(t / BEAT_S), self.stage) for t in self.times_s])


@dataclass(frozen=True, eq=False)
class Example:
    """One job and its correct result; uint8 RGB."""

    reference: np.ndarray  # [H, W, 3]
    pose: np.ndarray  # [n, H, W, 3]
    face: np.ndarray  # [n, F, F, 3]
    truth: np.ndarray  # [n, H, W, 3]
    silhouette: np.ndarray  # bool [n, H, W], of the dancer in the truth
    background: np.ndarray | None  # [n, H, W, 3], black in the mask: replace mode
    mask: np.ndarray | None  # [n, H, W], 255 where the dancer goes: replace mode
    dancer: Dancer
    take: Take


def _stage(rng: np.random.Generator, width: int, height: int) -> Stage:
    tall = min(0.70 * height, 1.02 * width) * rng.uniform(0.86, 1.06)
    build = Build(*rng.uniform((0.88, 0.92, 0.93, 0.86), (1.18, 1.06, 1.08, 1.1)))
    return Stage(width * rng.uniform(0.46, 0.54), height * (FLOOR + rng.uniform(0.05, 0.13)), tall, build)


def random_take(rng: np.random.Generator, width: int, height: int, frames: int) -> Take:
    """Return a named dance or a new one (equally often), from a random time on, at 12 to 24 frames per second."""
    moves = DANCES[rng.choice(sorted(DANCES))] if rng.uniform() < 0.4 else random_choreography(rng)
    times = rng.uniform(0, 6) + np.arange(frames) / rng.uniform(12, 24)
    return Take(moves, _stage(rng, width, height), times)


def random_portrait(rng: np.random.Generator, dancer: Dancer, width: int, height: int) -> np.ndarray:
    """Return uint8 [height, width, 3]: the dancer in its room, at a random time of a random dance."""
    take = random_take(rng, width, height, 1)
    return draw_dancer(backdrop(dancer, width, height), take.joints()[0], take.stage.height, dancer)


def skeletons(joints: np.ndarray, width: int, height: int) -> np.ndarray:
    """[n, 23, 2] pixels -> uint8 [n, height, width, 3]: the pose pictures for the model."""
    drawn = []
    for frame in joints:
        points = np.concatenate([lift(frame), np.ones((133, 1), np.float32)], axis=1)
        drawn.append(draw_skeleton(Pose.from_points(points), width, height))
    return np.stack(drawn)


def example(
    rng: np.random.Generator,
    width: int,
    height: int,
    frames: int,
    face_size: int,
    *,
    replace: bool = False,
    dancer: Dancer | None = None,
    take: Take | None = None,
) -> Example:
    """Return one job and its correct result, with a new dancer and a new dance unless they are given."""
    dancer = dancer or random_dancer(rng)
    take = take or random_take(rng, width, height, frames)
    driver = CHARACTERS[str(rng.choice(sorted(CHARACTERS)))]
    joints, tall = take.joints(), take.stage.height
    native = NATIVE_HEIGHT / height
    seen = joints + rng.normal(0, TREMBLE / native, joints.shape)
    ground, background, mask = backdrop(dancer, width, height), None, None
    if replace:
        ground = scene(str(rng.choice(sorted(SCENES))), width, height, seed=int(rng.integers(1 << 30)))
        iterations = ITERATIONS if rng.uniform() < 0.5 else 0  # of a mask that was found, of one that was given
        shapes = (silhouette((height, width), j, tall, driver) for j in joints)
        mask = np.stack([augment(shape, iterations=iterations) for shape in shapes])
        background = np.stack([blacken(ground, m) for m in mask])
    return Example(
        random_portrait(rng, dancer, width, height),
        skeletons(seen, width, height),
        _faces(rng, seen * native, tall * native, face_size, driver),
        np.stack([draw_dancer(ground.copy(), j, tall, dancer) for j in joints]),
        np.stack([dancer_silhouette((height, width), j, tall, dancer) for j in joints]),
        background,
        mask,
        dancer,
        take,
    )


def _faces(rng: np.random.Generator, joints: np.ndarray, tall: float, size: int, character: Character) -> np.ndarray:
    """[n, 23, 2] native pixels -> uint8 [n, size, size, 3]: the driver's face in every frame.

    Only the face is drawn: the puppet is moved so that its face box fills the canvas.
    """
    grey = int(rng.integers(40, 170))
    crops = []
    for frame in joints:
        points = np.concatenate([lift(frame), np.ones((133, 1), np.float32)], axis=1)[FACE]
        corner = np.floor(points[:, :2].min(0)) - 40
        points[:, :2] -= corner
        side = int(points[:, :2].max()) + 40
        box = face_box(points, side, side)
        assert box is not None  # all 68 face points have full confidence and are inside the canvas
        canvas = np.full((side, side, 3), grey, np.uint8)
        crops.append(crop_face(draw(canvas, frame - corner, tall, character), box, size))
    return np.stack(crops)
