"""Images: read a reference or a still mask from an image file of any kind, as upright 8-bit pixels.

In:   a local file. Out: RGB PIL images, grey masks, sizes. Never: the content of the picture.
Sizes are checked in the header, before pixels are decoded: a 16k×16k PNG of one colour is a small file.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runner.errors import InputNotFound, InputTooLarge, InputUnreadable

__all__ = ["MAX_ASPECT", "MAX_PIXELS", "MAX_SIDE", "image_size", "is_image", "load_image", "load_mask"]

MAX_PIXELS = 64_000_000  # 256 MB as RGBA; more than a 480p render can use
MAX_SIDE = 16_383  # also refuses strips of 16k×1, which have no pixels left at a render's size
MAX_ASPECT = 20  # long side to short side; in a longer strip no person is visible at the encoders' sizes
UPRIGHT_SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations that turn by 90 degrees
ORIENTATION = 0x0112
# Pillow's exceptions for damaged data differ by format: zlib and struct errors, SyntaxError from the PNG reader, …
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def load_image(path: Path, *, backdrop: tuple[int, int, int] | None = (255, 255, 255)) -> Image.Image:
    """Read the image as 8-bit RGB, turned upright by its EXIF orientation; the first frame of an animation.

    Transparent parts show `backdrop`. It is white because cut-out characters are usually shown on white, and because
    the model renders the reference's background into the film: on black, dark hair and clothes would not be visible,
    and the background would join the black bars of the letterbox. With None the alpha channel is dropped and the colour
    under it shows, as in the official reader. Greys, palettes, CMYK and 16 bits per channel are converted.
    Raises InputNotFound, InputUnreadable or InputTooLarge.
    """
    with _open(path) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except DAMAGED as err:
            raise _damaged(path, err) from err
        return _to_rgb(upright, backdrop)


def load_mask(path: Path) -> np.ndarray:
    """Read a still mask as grey uint8 [H, W]. Transparent parts are black: they are not regenerated."""
    return np.asarray(load_image(path, backdrop=(0, 0, 0)).convert("L"))


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of the upright image, from the header only. Raises the errors of `load_image`."""
    with _open(path) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(ORIENTATION) in UPRIGHT_SWAPS_SIDES
        except DAMAGED:
            turned = False  # broken EXIF beside good pixels: load_image does not turn such an image either
        return (height, width) if turned else (width, height)


def is_image(path: Path) -> bool:
    """Return True if the file is a still image; an animation of several frames is not."""
    try:
        with _open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except InputUnreadable:
        return False


def _open(path: Path) -> Image.Image:
    """Open the image, read its header and check its size."""
    path = Path(path)
    if not path.exists():
        raise InputNotFound("no such file", where=path, todo="Check the path in the manifest")
    if not path.is_file():
        raise InputUnreadable("this is a folder, not an image file", where=path, todo="Name one image")
    if path.stat().st_size == 0:
        raise InputUnreadable("the file is empty (0 bytes)", where=path, todo="Copy or upload it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a lower limit is checked below
            image = Image.open(path)
    except Image.DecompressionBombError as err:
        raise _too_large(path, str(err)) from err
    except PermissionError:
        raise
    except UnidentifiedImageError as err:
        raise InputUnreadable(
            "this is not an image, or it is of a kind that cannot be read",
            where=path,
            todo="Give a PNG, JPEG, WebP, TIFF or BMP file",
        ) from err
    except DAMAGED as err:
        raise _damaged(path, err) from err
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        image.close()
        raise _too_large(path, f"{width}x{height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        image.close()
        raise InputUnreadable(
            f"the image is a strip of {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other",
            where=path,
            todo="Crop it to the character",
        )
    return image


def _too_large(path: Path, detail: str) -> InputTooLarge:
    limit = f"at most {MAX_PIXELS // 1_000_000} megapixels and {MAX_SIDE} pixels per side"
    return InputTooLarge(f"the image is too large ({detail}; {limit})", where=path, todo="Scale it down")


def _damaged(path: Path, err: Exception) -> InputUnreadable:
    return InputUnreadable(
        f"the image is damaged or cut short ({err})", where=path, todo="Export or copy it again; check that it opens"
    )


def _to_rgb(image: Image.Image, backdrop: tuple[int, int, int] | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bits(image)
    if backdrop is not None and image.has_transparency_data:
        layered = image.convert("RGBA")
        base = Image.new("RGBA", layered.size, (*backdrop, 255))
        image = Image.alpha_composite(base, layered)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 or 32 bits or floating point to 8 bits; Pillow's own conversion clips it to white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
