"""Test clips made with PyAV: every frame carries its own index, so that frame exactness can be read off the pixels.

Twelve black or white blocks, six in each of two rows, are the bits of the index (least significant first); the rest is
a gradient. Blocks survive lossy coding, scaling of the range and chroma subsampling.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

__all__ = [
    "boxes",
    "indexed_frame",
    "indexed_frames",
    "make_clip",
    "make_vfr",
    "movie_without_samples",
    "ordinary_priority",
    "overwrite_middle",
    "read_index",
    "remux",
    "tone",
    "truncate",
]

COLUMNS, ROWS = 6, 2


def indexed_frame(index: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [H, W, 3] RGB, `index` (0..4095) in its bits."""
    across = np.linspace(60, 200, width).astype(np.uint8)
    frame = np.repeat(np.repeat(across[None, :, None], height, axis=0), 3, axis=2)
    block_w, block_h = width // COLUMNS, height // (2 * ROWS)
    for bit in range(COLUMNS * ROWS):
        row, column = divmod(bit, COLUMNS)
        rows = slice(row * block_h, (row + 1) * block_h)
        frame[rows, column * block_w : (column + 1) * block_w] = 255 if index >> bit & 1 else 0
    return frame


def indexed_frames(first: int, last: int) -> np.ndarray:
    """uint8 [last - first, 64, 96, 3]: `indexed_frame` of each index."""
    return np.stack([indexed_frame(index) for index in range(first, last)])


def read_index(frame: np.ndarray) -> int:
    """The index that `indexed_frame` wrote, from uint8 [H, W, 3]."""
    height, width = frame.shape[:2]
    block_w, block_h = width // COLUMNS, height // (2 * ROWS)
    index = 0
    for bit in range(COLUMNS * ROWS):
        row, column = divmod(bit, COLUMNS)
        block = frame[row * block_h : (row + 1) * block_h, column * block_w : (column + 1) * block_w]
        middle = block[block_h // 4 : -(block_h // 4), block_w // 4 : -(block_w // 4)]
        level = float(middle.mean())
        if 90 < level < 165:
            raise AssertionError(f"bit {bit} is neither black nor white: {level:.0f}")
        index |= (level > 127) << bit
    return index


def tone(seconds: float, rate: int = 44100, start_silence_s: float = 0.0) -> np.ndarray:
    """float32 [2, n] stereo: a 440 Hz tone, after `start_silence_s` of silence."""
    t = np.arange(round(seconds * rate)) / rate
    wave = np.where(t >= start_silence_s, 0.5 * np.sin(2 * np.pi * 440 * t), 0).astype(np.float32)
    return np.stack([wave, wave])


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Give the thread its scheduling back: SVT-AV1, run by root, makes its caller real-time, and all that it starts."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def make_clip(
    path: Path,
    frames: int,
    fps: Fraction | int = 30,
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    audio: np.ndarray | None = None,
    audio_codec: str = "aac",
    audio_rate: int = 44100,
    gop: int = 12,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: str | None = None,
    pixels: Iterable[np.ndarray] | None = None,
) -> Path:
    """Write `frames` indexed frames (or `pixels`). `pts` in `time_base` units makes variable frame rates."""
    width, height = size
    fps = Fraction(fps)
    layout = "mono" if audio is not None and len(audio) == 1 else "stereo"
    muxing = {} if container in {"matroska", "webm"} else {"movflags": "+faststart"}
    with ordinary_priority(), av.open(str(path), "w", format=container or "mp4", options=muxing) as out:
        chosen = dict(options if options is not None else DEFAULTS.get(codec, {}))
        if codec == "libx264":
            # x264's AVX-512 code for macroblock trees reads unwritten memory: the same clip would be other bytes.
            chosen["x264-params"] = ":".join([*filter(None, [chosen.get("x264-params")]), "mbtree=0"])
        stream = out.add_stream(codec, rate=fps, options=chosen)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = gop
        base = time_base or 1 / fps
        stream.time_base = stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream(audio_codec, rate=audio_rate, layout=layout) if audio is not None else None
        source: Iterator[np.ndarray] = iter(pixels or (indexed_frame(i, width, height) for i in range(frames)))
        for i, image in enumerate(source):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts is not None else i), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            size_ = sound.codec_context.frame_size or 1024
            for begin in range(0, audio.shape[1], size_):
                piece = np.ascontiguousarray(audio[:, begin : begin + size_])
                block = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
                block.sample_rate, block.pts, block.time_base = audio_rate, begin, Fraction(1, audio_rate)
                out.mux(sound.encode(block))
            out.mux(sound.encode(None))
    return path


DEFAULTS = {
    "libx264": {"crf": "14", "preset": "ultrafast"},
    "libx265": {"crf": "14", "preset": "ultrafast", "x265-params": "log-level=none:pools=none"},
    "libsvtav1": {"crf": "30", "preset": "12"},
    "libvpx-vp9": {"crf": "20", "b": "0", "cpu-used": "8", "deadline": "realtime"},
}


def make_vfr(path: Path, milliseconds: Sequence[int], **kwargs: object) -> Path:
    """A clip whose frame i appears at `milliseconds[i]`."""
    return make_clip(path, len(milliseconds), 30, pts=milliseconds, time_base=Fraction(1, 1000), **kwargs)  # type: ignore[arg-type]


def truncate(source: Path, path: Path, keep: float) -> Path:
    """The first `keep` (0..1) of a file's bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def overwrite_middle(source: Path, path: Path, begin: float, end: float, byte: int = 0xA5) -> Path:
    """A copy whose bytes between the fractions `begin` and `end` of the file are damaged."""
    data = bytearray(source.read_bytes())
    first, last = int(len(data) * begin), int(len(data) * end)
    data[first:last] = bytes([byte]) * (last - first)
    path.write_bytes(bytes(data))
    return path


def boxes(path: Path) -> list[str]:
    """Names of an MP4 file's top-level boxes, in order."""
    names, data, at = [], path.read_bytes(), 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode("latin1"))
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
        at += size or len(data)
    return names


def remux(source: Path, path: Path, container: str = "mp4", video_shift_s: float = 0.0) -> Path:
    """Copy packets into another container; in MP4 a negative shift of the pictures becomes an edit list (a trim)."""
    options = {"avoid_negative_ts": "disabled"} if container == "mp4" else {}
    with av.open(str(source)) as src, av.open(str(path), "w", format=container, options=options) as out:
        streams = {s.index: out.add_stream_from_template(s) for s in src.streams}
        for packet in src.demux():
            if packet.dts is None or packet.pts is None:
                continue
            shift = round(video_shift_s / packet.time_base) if packet.stream.type == "video" else 0
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
    return path


def movie_without_samples(path: Path) -> None:
    """An MP4 that announces a video track and holds no frame of it."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "empty_moov+frag_keyframe"}) as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        out.start_encoding()
