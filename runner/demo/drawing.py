"""Drawing: paint a dressed puppet into a picture, and compute its exact silhouette.

In:   joints in pixels, a character. Out: RGB uint8 pictures. Never: motion, backgrounds, files.
All painted pixels are white, tinted or a joint's disc: the tiny detector recognises a person by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from runner.demo.dances import PLAIN, Build
from runner.demo.puppet import BONES, PALETTE, TINTS, WHITE, joint, lift

__all__ = ["CHARACTERS", "Character", "box_of", "draw", "silhouette"]

Colour = tuple[int, int, int]
_SHIFT = 4  # fractional bits of cv2's fixed-point coordinates: a joint is drawn within 1/32 pixel of its place
_RING: Colour = (128, 128, 128)  # separates a disc from the pixels around: in H.264, 2x2 pixels share a colour
_LINE: Colour = (150, 150, 150)


@dataclass(frozen=True)
class Character:
    """A puppet's clothes and proportions. Parts without a tint are white."""

    name: str
    build: Build = PLAIN
    top: str | None = None
    sleeves: str | None = None
    trousers: str | None = None
    skirt: bool = False
    hat: str | None = None  # a tint
    hat_shape: str = "cap"  # cap | bun | cone


CHARACTERS: dict[str, Character] = {
    c.name: c
    for c in (
        Character("pip"),  # the plain puppet
        Character("anna", top="brick", sleeves="brick", skirt=True, trousers=None, hat="mustard", hat_shape="bun"),
        Character("bela", Build(head=1.15, torso=0.92, arms=0.95, legs=0.86), "teal", None, "indigo", hat="orchid"),
        Character(
            "cato",
            Build(head=0.9, torso=1.0, arms=1.06, legs=1.1),
            "mustard",
            "mustard",
            "grass",
            hat="indigo",
            hat_shape="cone",
        ),
    )
}


def draw(
    picture: np.ndarray,
    joints: np.ndarray,
    height: float,
    character: Character = CHARACTERS["pip"],
    hide: tuple[int, ...] = (),
) -> np.ndarray:
    """Paint one puppet into `picture` (RGB uint8 [H, W, 3], in place, also returned).

    `joints` [23, 2] and `height` are in pixels. The sizes of discs and limbs are relative to the height. hide: joints
    that are painted without their disc, as if covered.
    """
    _Brush(picture, np.asarray(joints, float), height / 10).puppet(character, hide)
    return picture


def silhouette(
    shape: tuple[int, int], joints: np.ndarray, height: float, character: Character = CHARACTERS["pip"]
) -> np.ndarray:
    """Return bool [H, W]: the pixels that `draw` covers at least by half.

    It paints on black and on white: the difference of the two pictures is the visible part of the background.
    """
    over_black = draw(np.zeros((*shape, 3), np.uint8), joints, height, character)
    over_white = draw(np.full((*shape, 3), 255, np.uint8), joints, height, character)
    shows = over_white[..., 0].astype(np.int16) - over_black[..., 0]  # the same in every channel
    return shows < 128


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box (x1, y1, x2, y2) of the true pixels of a bool [H, W]; x2 and y2 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _rgb(colour: tuple[float, float, float]) -> Colour:
    red, green, blue = (round(255 * v) for v in colour)
    return red, green, blue


def _tint(name: str | None) -> Colour:
    return _rgb(TINTS[name] if name else WHITE)


class _Brush:
    """Paints one puppet. `unit` is a tenth of its height, in pixels."""

    def __init__(self, picture: np.ndarray, joints: np.ndarray, unit: float) -> None:
        self.picture, self.joints, self.unit = picture, joints, unit
        self.points = lift(joints)
        self.thick = max(2, round(0.44 * unit))

    def at(self, name: str) -> np.ndarray:
        return self.joints[joint(name)]

    def puppet(self, character: Character, hide: tuple[int, ...]) -> None:
        trousers, sleeves = _tint(character.trousers), _tint(character.sleeves)
        for a, b in BONES:
            legs = min(a, b) >= joint("left_hip")
            self.line(self.joints[a], self.joints[b], trousers if legs else sleeves)
        self.hands()
        self.body(character)
        self.head(character)
        for k in range(len(PALETTE)):
            if k not in hide:
                self.disc(k)

    def body(self, character: Character) -> None:
        left, right = self.at("left_shoulder"), self.at("right_shoulder")
        left_hip, right_hip = self.at("left_hip"), self.at("right_hip")
        self.line((left + right) / 2, self.at("nose"), _tint(None))
        outline = [left, right, right_hip, left_hip]
        self.polygon(outline, _tint(character.top))
        for a, b in zip(outline, [*outline[1:], outline[0]], strict=True):
            self.line(a, b, _tint(character.top))
        if character.skirt:
            down = np.array([0.0, 1.15 * self.unit])
            hem = [(0.75, 0.2), (1.25, 1.0), (-1.25, 1.0), (-0.75, 0.2)]
            middle = (left_hip + right_hip) / 2
            self.polygon(
                [middle + [x * self.unit, 0] + y * down - [0, 0.3 * self.unit] for x, y in hem], _tint(character.top)
            )

    def hands(self) -> None:
        finger = max(1, self.thick // 3)
        for wrist in (91, 112):
            for first in range(wrist + 1, wrist + 21, 4):
                chain = self.points[[wrist, *range(first, first + 4)]]
                for a, b in pairwise(chain):
                    self.line(a, b, _tint(None), finger)

    def head(self, character: Character) -> None:
        import cv2

        left, right = self.at("left_eye"), self.at("right_eye")
        across = left - right
        down = np.array([-across[1], across[0]])
        centre = (left + right) / 2 + 0.42 * down
        size = float(np.linalg.norm(across))
        tilt = float(np.degrees(np.arctan2(across[1], across[0])))
        hat = _tint(character.hat)

        def place(x: float, y: float) -> np.ndarray:
            return centre + x * across + y * down

        if character.hat and character.hat_shape == "bun":
            self.circle(place(0, -1.75), 0.62 * size, hat)
            self.ellipse(place(0, -0.2), (1.62 * size, 1.55 * size), tilt, hat)
        self.ellipse(centre, (1.5 * size, 1.55 * size), tilt, _tint(None))
        if character.hat and character.hat_shape == "bun":
            self.ellipse(centre, (1.5 * size, 1.55 * size), tilt, hat, start=197, end=343)
        if character.hat and character.hat_shape == "cap":
            self.ellipse(centre, (1.56 * size, 1.62 * size), tilt, hat, start=205, end=335)
            self.line(place(-1.4, -0.72), place(1.75, -0.72), hat)
        if character.hat and character.hat_shape == "cone":
            self.polygon([place(-1.25, -0.85), place(0, -3.0), place(1.25, -0.85)], hat)
            self.circle(place(0, -3.0), 0.28 * size, _tint(None))
        mouth = np.round(self.points[23 + 48 : 23 + 60] * 2**_SHIFT).astype(np.int32)
        cv2.polylines(self.picture, [mouth], True, _LINE, max(1, self.thick // 6), cv2.LINE_AA, _SHIFT)

    def disc(self, k: int) -> None:
        radius = 0.26 * self.unit * (0.85 if k <= joint("right_ear") else 1.0)
        self.circle(self.joints[k], radius + max(1.0, 0.05 * self.unit), _RING)
        self.circle(self.joints[k], radius, _rgb(tuple(PALETTE[k])))

    def line(self, a: np.ndarray, b: np.ndarray, colour: Colour, thick: int | None = None) -> None:
        import cv2

        cv2.line(self.picture, _fixed(a), _fixed(b), colour, thick or self.thick, cv2.LINE_AA, _SHIFT)

    def polygon(self, corners: list[np.ndarray], colour: Colour) -> None:
        import cv2

        points = np.array([_fixed(c) for c in corners], np.int32)
        cv2.fillConvexPoly(self.picture, points, colour, cv2.LINE_AA, _SHIFT)

    def circle(self, centre: np.ndarray, radius: float, colour: Colour) -> None:
        import cv2

        cv2.circle(self.picture, _fixed(centre), int(radius * 2**_SHIFT), colour, -1, cv2.LINE_AA, _SHIFT)

    def ellipse(
        self,
        centre: np.ndarray,
        axes: tuple[float, float],
        tilt: float,
        colour: Colour,
        start: float = 0,
        end: float = 360,
    ) -> None:
        """Paint a filled ellipse. A part of it is filled up to its chord, like a cap on a head."""
        import cv2

        if end - start >= 360:
            cv2.ellipse(self.picture, _fixed(centre), _fixed(axes), tilt, 0, 360, colour, -1, cv2.LINE_AA, _SHIFT)
            return
        angle, turn = np.deg2rad(np.arange(start, end + 1)), np.deg2rad(tilt)
        x, y = axes[0] * np.cos(angle), axes[1] * np.sin(angle)
        rim = centre + np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1)
        self.polygon(list(rim), colour)


def _fixed(point: np.ndarray | tuple[float, float]) -> tuple[int, int]:
    return round(float(point[0]) * 2**_SHIFT), round(float(point[1]) * 2**_SHIFT)
