"""Reference images of every kind, and the broken ones."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runner.errors import InputNotFound, InputTooLarge, InputUnreadable
from runner.preprocess.pictures.images import MAX_PIXELS, image_size, is_image, load_image, load_mask


def header_only_png(path, width: int, height: int):
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


def test_plain_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "贝拉 1.png")
    image = load_image(tmp_path / "贝拉 1.png")
    assert image.mode == "RGB"
    assert (np.asarray(image) == pixels).all()
    assert image_size(tmp_path / "贝拉 1.png") == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = 255  # top left is white
    turns = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 3),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "phone.png", exif=exif)
    assert (np.asarray(load_image(tmp_path / "phone.png")) == upright).all()
    assert image_size(tmp_path / "phone.png") == (64, 32)


def test_transparency_is_laid_on_white_or_dropped(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:2, :, 3], pixels[2, :, 3] = 255, 51  # opaque, a fifth, clear
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    laid = np.asarray(load_image(tmp_path / "cut.png"))
    assert laid[0, 0].tolist() == [200, 0, 0]
    assert laid[2, 0].tolist() == [244, 204, 204]  # 255 - .2 * 55, 255 - .2 * 255
    assert laid[3, 0].tolist() == [255, 255, 255]
    dropped = np.asarray(load_image(tmp_path / "cut.png", backdrop=None))
    assert (dropped == [200, 0, 0]).all()


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "p.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("L", 77, "png", (77, 77, 77)),
        ("LA", (77, 255), "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("I;16", 32896, "png", (128, 128, 128)),  # 32896 = 128 * 257
        ("I;16", 65535, "tiff", (255, 255, 255)),
        ("F", 0.5, "tiff", (128, 128, 128)),
    ],
)
def test_other_kinds_become_rgb_of_8_bits(tmp_path, mode, value, suffix, expected):
    Image.new(mode, (3, 2), value).save(tmp_path / f"x.{suffix}")
    image = load_image(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB"
    assert image.size == (3, 2)
    assert image.getpixel((1, 1)) == expected


def test_missing_folder_empty_and_text(tmp_path):
    with pytest.raises(InputNotFound, match=r"none\.png"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputUnreadable, match="folder"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputUnreadable, match="0 bytes"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(InputUnreadable, match="not an image"):
        load_image(tmp_path / "text.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_cut_short(tmp_path, suffix):
    pixels = np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputUnreadable):
        load_image(path)


def test_corrupt_png(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(InputUnreadable, match="damaged"):
        load_image(path)


@pytest.mark.parametrize(("width", "height"), [(16_000, 16_000), (8_001, 8_000), (30_000, 2), (60_000, 60_000)])
def test_too_large_is_refused_from_the_header_alone(tmp_path, width, height):
    path = header_only_png(tmp_path / "big.png", width, height)
    for read in (load_image, image_size):
        with pytest.raises(InputTooLarge, match="Scale it down"):
            read(path)


def test_the_limit_itself_is_allowed(tmp_path):
    assert MAX_PIXELS == 8_000 * 8_000
    assert image_size(header_only_png(tmp_path / "limit.png", 8_000, 8_000)) == (8_000, 8_000)


def test_masks_count_transparency_as_black(tmp_path):
    pixels = np.full((2, 2, 4), 255, np.uint8)
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png").tolist() == [[0, 255], [255, 255]]
    assert is_image(tmp_path / "m.png")
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    assert not is_image(tmp_path / "v.mp4")


@pytest.mark.parametrize("size", [(16000, 2), (2, 16000), (43, 2), (1, 21)])
def test_strips_are_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    for read in (load_image, image_size):
        with pytest.raises(InputUnreadable, match=f"strip of {size[0]}x{size[1]} pixels"):
            read(tmp_path / "a.png")
    Image.new("RGB", (40, 2)).save(tmp_path / "b.png")
    assert image_size(tmp_path / "b.png") == (40, 2)
