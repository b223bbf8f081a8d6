"""Video: clips in (reader.py over decode.py) and out (writer.py), a window of frames at a time."""

from runner.video.reader import Sampled, VideoInfo, VideoReader, probe, sample_by_time, sample_indices
from runner.video.writer import AudioSpan, FrameHash, Mp4Writer, PngWriter, write_jpeg

__all__ = [
    "AudioSpan",
    "FrameHash",
    "Mp4Writer",
    "PngWriter",
    "Sampled",
    "VideoInfo",
    "VideoReader",
    "probe",
    "sample_by_time",
    "sample_indices",
    "write_jpeg",
]
