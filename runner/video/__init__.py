"""Video: read clips (reader.py, over decode.py and decord_reader.py) and write them (writer.py, join.py)."""

from runner.video.frame_digests import FRAMES_HASH, combined_digest, digest_frames, format_digests, parse_digests
from runner.video.join import join_parts
from runner.video.reader import Sampled, VideoInfo, VideoReader, probe, readers_differ, sample_by_time, sample_indices
from runner.video.sound import AudioSpan, SoundNote, check_sound, write_wav
from runner.video.writer import Mp4Writer, PngWriter, png_name, write_jpeg

__all__ = [
    "FRAMES_HASH",
    "AudioSpan",
    "Mp4Writer",
    "PngWriter",
    "Sampled",
    "SoundNote",
    "VideoInfo",
    "VideoReader",
    "check_sound",
    "combined_digest",
    "digest_frames",
    "format_digests",
    "join_parts",
    "parse_digests",
    "png_name",
    "probe",
    "readers_differ",
    "sample_by_time",
    "sample_indices",
    "write_jpeg",
    "write_wav",
]
