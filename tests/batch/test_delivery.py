"""Delivery: what is published depends on the parts alone, however each of them came about."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tracemalloc
import wave
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.batch.delivery import Delivery, Published
from runner.batch.ledger import Ledger, output_identity
from runner.batch.part_archive import pack_files, unpack_files
from runner.errors import InputUnreadable, InternalError, StorageFull
from runner.generation.protocol import ClipInfo, Segment
from runner.records.people import People, make_people
from runner.spec.options import JobOptions
from runner.storage import LocalStorage, ObjectInfo
from runner.timing import StageTimer
from runner.video import AudioSpan, digest_frames
from tests.regression.night_stores import make_record
from tests.video_files import indexed_frame, indexed_frames, make_clip, overwrite_middle, read_index, tone

FPS, POSE_FPS = Fraction(30000, 1001), Fraction(15)
PNG = JobOptions.model_validate({"output": {"format": "png"}})


def segments(lengths: list[int]) -> list[Segment]:
    """Frames numbered through; every segment has one frame of poses for each two of its own."""
    found, begin = [], 0
    for index, length in enumerate(lengths):
        frames = indexed_frames(begin, begin + length) if length else np.zeros((0, 64, 96, 3), np.uint8)
        found.append(Segment(index, frames, pose=frames[::2, ::-1].copy()))
        begin += length
    return found


PEOPLE = make_people(np.array([[1.0, 2, 30, 60]] * 3), np.full((3, 4), np.nan), 96, 64, POSE_FPS)


def deliver(folder: Path, frames: int, options: JobOptions | None = None, audio: AudioSpan | None = None) -> Delivery:
    options = options or JobOptions()
    more = {"width": 96, "height": 64, "fps": FPS, "frames": frames, "pose_fps": POSE_FPS, "timer": StageTimer()}
    more["people"] = PEOPLE
    return Delivery(folder / "scratch", options, audio=audio, **more)


def publish(delivery: Delivery, folder: Path) -> tuple[Published, dict[str, bytes]]:
    """What it says, and all files by name; the name of a folder of frames is drawn, so that it reads `frames/*`."""
    storage = LocalStorage(folder / "out")
    published = delivery.publish(storage, "a", storage.publish)
    root = folder / "out/jobs/a"
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert published.keys == {f"jobs/a/{name}" for name in found}
    token = published.output.key.removeprefix("jobs/a/") if published.output.key.endswith("/") else "frames/*/"
    return published, {name.replace(token, "frames/*/"): data for name, data in found.items()}


def run(folder: Path, lengths: list[int], restored: set[int], options: JobOptions, audio: AudioSpan | None) -> dict:
    """One delivery that restores the parts in `restored` from what an undisturbed one packed; its files."""
    first, second = (deliver(folder / name, sum(lengths), options, audio) for name in ("undisturbed", "resumed"))
    for segment in segments(lengths):
        index = segment.index
        first.write(segment)
        first.pack_part(index, folder / f"{index}.tar")
        if index in restored:
            second.restore(index, folder / f"{index}.tar")
        else:
            second.write(segment)
        second.pack_part(index, folder / f"{index}.again.tar")
        assert (folder / f"{index}.tar").read_bytes() == (folder / f"{index}.again.tar").read_bytes()
    (told, files), (told_again, files_again) = (
        publish(first, folder / "undisturbed"),
        publish(second, folder / "resumed"),
    )
    assert files.keys() == files_again.keys()
    assert [name for name in files if files[name] != files_again[name]] == []
    assert (told.output.frames_sha256, told.sound) == (told_again.output.frames_sha256, told_again.sound)
    return files


@settings(max_examples=8, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), sound=st.booleans())
def test_delivery_of_written_and_restored_parts_gives_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, lengths: list[int], sound: bool
) -> None:
    folder = tmp_path_factory.mktemp("delivery")
    restored = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    source = make_clip(folder / "source.mp4", 3, audio=tone(2.0))
    audio = AudioSpan(source, 0.1, float(sum(lengths) / FPS)) if sound else None
    files = run(folder, lengths, restored, JobOptions(), audio)
    assert files.keys() == {"output.mp4", "pose.mp4", "poster.jpg", "frames.sha256", "people.json"}
    with av.open(str(folder / "resumed/out/jobs/a/output.mp4")) as container:
        assert bool(container.streams.audio) == sound
        shown = [read_index(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert shown == list(range(sum(lengths)))


def wav_files(found: dict[str, bytes]) -> list[bytes]:
    return [data for name, data in found.items() if name.endswith(".wav")]


@pytest.mark.parametrize("lengths", [[20, 25], [0, 7]], ids=str)
def test_png_output_with_sound_has_wav_beside_frames(tmp_path: Path, lengths: list[int]) -> None:
    """The sound is as long as the frames, to the sample. Identity, bytes and files in the record include the sound."""
    frames = sum(lengths)
    audio = AudioSpan(make_clip(tmp_path / "source.mp4", 3, audio=tone(2.0)), 0.1, float(frames / FPS))
    files = run(tmp_path, lengths, {0}, PNG, audio)
    pngs = {f"frames/*/{index:06d}.png" for index in range(frames)}
    assert files.keys() == {"pose.mp4", "poster.jpg", "frames.sha256", "people.json", "frames/*/audio.wav"} | pngs
    (sound,) = wav_files(files)
    with wave.open(io.BytesIO(sound)) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (round(frames / FPS * 44100), 44100, 2)
        assert np.abs(np.frombuffer(file.readframes(44100), "<i2")).max() > 10_000

    storage, delivery = LocalStorage(tmp_path / "again/out"), deliver(tmp_path / "again", frames, PNG, audio)
    for segment in segments(lengths):
        delivery.write(segment)
    published, files = publish(delivery, tmp_path / "again")
    output = published.output
    assert published.sound is not None
    assert "audio.wav as 16-bit PCM at 44100 Hz stereo" in published.sound.text
    assert (output.files, output.frames) == (frames + 1, frames)
    assert output_identity(storage, output.key) == (output.identity, output.bytes, output.files)
    storage.delete(output.key + "audio.wav")
    assert output_identity(storage, output.key) != (output.identity, output.bytes, output.files)


def test_png_output_of_silent_source_has_no_wav(tmp_path: Path) -> None:
    silent = AudioSpan(make_clip(tmp_path / "silent.mp4", 3), 0.0, 1.0)
    delivery = deliver(tmp_path, 5, PNG, silent)
    delivery.write(segments([5])[0])
    published, files = publish(delivery, tmp_path)
    assert published.sound is not None
    assert (published.sound.missing, published.sound.text) == (True, "the source has no sound")
    assert (wav_files(files), published.output.files) == ([], 5)


def test_tidy_after_newer_output_removes_wav_of_older_output(tmp_path: Path) -> None:
    """An older output keeps its WAV file until the newer output is published and the older one is removed."""
    source, ledger = make_clip(tmp_path / "source.mp4", 3, audio=tone(2.0)), Ledger(LocalStorage(tmp_path / "out"))
    job = partial(make_record, "a")

    def names() -> list[str]:
        return sorted(info.key for info in ledger.storage.list("jobs/a/") if "audio" in info.key)

    def deliver_once(options: JobOptions) -> tuple[Published, list[str]]:
        delivery = deliver(tmp_path, 5, options, AudioSpan(source, 0.1, float(5 / FPS)))
        delivery.write(segments([5])[0])
        published = delivery.publish(ledger.storage, "a", ledger.storage.publish)
        before = names()
        ledger.tidy("a", job(output=published.output), published.keys)
        return published, before

    first, there = deliver_once(PNG)
    assert there == names() == [f"{first.output.key}audio.wav"]
    ledger.tidy("a", job(output=first.output))  # by a run that only finds it done
    assert names() == there
    second, there = deliver_once(PNG)
    assert there == sorted(f"{published.output.key}audio.wav" for published in (first, second))
    assert names() == [f"{second.output.key}audio.wav"]
    third, there = deliver_once(JobOptions())
    assert there == [f"{second.output.key}audio.wav"]
    assert (names(), third.output.key) == ([], "jobs/a/output.mp4")


@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 1], [40, 1], [0, 3], [3, 0], [2, 0, 2]], ids=str)
@pytest.mark.parametrize("options", [JobOptions(), PNG], ids=["mp4", "png"])
def test_delivery_of_short_and_empty_parts_has_all_files(
    tmp_path: Path, lengths: list[int], options: JobOptions
) -> None:
    for number, restored in enumerate([set(range(len(lengths))), {0}, set(range(1, len(lengths)))]):
        files = run(tmp_path / str(number), lengths, restored, options, None)
    names = {"pose.mp4", "poster.jpg", "frames.sha256", "people.json"}
    if options is PNG:
        names |= {f"frames/*/{index:06d}.png" for index in range(sum(lengths))}
        images = [
            cv2.imdecode(np.frombuffer(files[n], np.uint8), cv2.IMREAD_COLOR) for n in sorted(files) if "png" in n
        ]
        assert np.array_equal(np.stack(images)[..., ::-1], indexed_frames(0, sum(lengths)))
    else:
        names |= {"output.mp4"}
    assert files.keys() == names


def test_output_record_has_hashes_and_count_of_frames(tmp_path: Path) -> None:
    delivery = deliver(tmp_path, 7)
    for segment in segments([3, 4]):
        delivery.write(segment)
    published, files = publish(delivery, tmp_path)
    by_hand = [
        hashlib.sha256(struct.pack("<3I", 64, 96, 3) + indexed_frame(index).tobytes()).hexdigest() for index in range(7)
    ]
    assert files["frames.sha256"].decode() == "".join(f"{digest}\n" for digest in by_hand)
    output = published.output
    assert output.frames_sha256 == hashlib.sha256(bytes.fromhex("".join(by_hand))).hexdigest()
    assert (output.frames_hash, output.frames, output.fps, output.files) == (2, 7, "30000/1001", 1)
    assert output.sha256 == hashlib.sha256(files["output.mp4"]).hexdigest()
    assert json.loads(output.to_json())["frames_hash"] == 2


def test_people_boxes_are_published_at_size_of_finished_clip(tmp_path: Path) -> None:
    clip = ClipInfo(3, POSE_FPS, 96, 64, 0.0)
    twice = ClipInfo(5, FPS, 192, 128, 0.0)
    delivery = Delivery.of(clip, twice, tmp_path / "scratch", JobOptions(), None, StageTimer(), PEOPLE)
    delivery.write(Segment(0, np.zeros((5, 128, 192, 3), np.uint8)))
    _, files = publish(delivery, tmp_path)
    boxes = People.parse(files["people.json"])
    assert (boxes.width, boxes.height, boxes.fps) == (192, 128, "15")
    assert boxes.person(0) == (2, 4, 60, 120)
    delivery.abort()
    assert not (tmp_path / "scratch/people.json").exists()


def test_previews_have_pose_rate_and_middle_frame(tmp_path: Path) -> None:
    delivery = deliver(tmp_path, 9)
    for segment in segments([4, 3, 2]):
        delivery.write(segment)
    _, files = publish(delivery, tmp_path)
    picture = cv2.imdecode(np.frombuffer(files["poster.jpg"], np.uint8), cv2.IMREAD_COLOR)
    assert read_index(picture) == 4
    with av.open(str(tmp_path / "out/jobs/a/pose.mp4")) as container:
        assert (container.streams.video[0].frames, container.streams.video[0].average_rate) == (5, POSE_FPS)
        shown = [read_index(frame.to_ndarray(format="rgb24")[::-1]) for frame in container.decode(video=0)]
    assert shown == [0, 2, 4, 6, 7]


def test_delivery_without_poses_has_no_pose_preview(tmp_path: Path) -> None:
    delivery = deliver(tmp_path, 3)
    delivery.write(Segment(0, indexed_frames(0, 3)))
    _, files = publish(delivery, tmp_path)
    assert "pose.mp4" not in files


def test_publish_stores_output_first(tmp_path: Path) -> None:
    storage, delivery = LocalStorage(tmp_path / "out"), deliver(tmp_path, 3)
    delivery.write(segments([3])[0])
    seen: list[tuple[str, list[str]]] = []

    def put(local: Path, key: str) -> ObjectInfo:
        seen.append((key, [info.key for info in storage.list("jobs/a/")]))
        return storage.publish(local, key)

    delivery.publish(storage, "a", put)
    assert seen[0] == ("jobs/a/output.mp4", [])


def test_delivery_with_wrong_segment_order_or_frame_count_raises(tmp_path: Path) -> None:
    delivery, [first, second] = deliver(tmp_path, 4), segments([2, 2])
    with pytest.raises(InternalError, match="segment 1 was delivered"):
        delivery.write(second)
    delivery.write(first)
    assert delivery.parts == 1
    delivery.pack_part(0, tmp_path / "0.tar")
    for wrong in (lambda: delivery.write(first), lambda: delivery.restore(0, tmp_path / "0.tar")):
        with pytest.raises(InternalError, match="segment 0 was delivered, but segment 1"):
            wrong()
    with pytest.raises(IndexError):
        delivery.pack_part(1, tmp_path / "1.tar")
    with pytest.raises(InternalError, match="2 frames were generated, but the job has 4"):
        publish(delivery, tmp_path)
    with pytest.raises(InternalError, match="float32"):
        delivery.write(Segment(1, second.frames.astype(np.float32)))


def test_part_that_failed_to_write_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery, [first, second] = deliver(tmp_path, 4), segments([2, 2])
    delivery.write(first)
    with monkeypatch.context() as patched:

        def full(path: Path, *args: object) -> None:
            raise OSError(28, "No space left on device", str(path))

        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageFull):
            delivery.write(second)
    assert delivery.parts == 1
    assert [p.name for p in (tmp_path / "scratch/parts").iterdir()] == ["00000"]
    delivery.write(second)
    published, _ = publish(delivery, tmp_path)
    assert published.output.frames == 4


@pytest.mark.parametrize(("options", "other"), [(JobOptions(), PNG), (PNG, JobOptions())], ids=["mp4", "png"])
def test_restore_of_wrong_packed_part_is_refused_and_changes_nothing(
    tmp_path: Path, options: JobOptions, other: JobOptions
) -> None:
    """The second of three segments has the poster. A refused part leaves the delivery unchanged."""
    made = segments([2, 3, 2])
    wrong = {"none": tmp_path / "none.tar"}
    for name, of in (("own", options), ("other format", other)):
        earlier = deliver(tmp_path / name, 7, of)
        for segment in made:
            earlier.write(segment)
            wrong[f"{name} {segment.index}"] = tmp_path / f"{name} {segment.index}.tar"
            earlier.pack_part(segment.index, wrong[f"{name} {segment.index}"])
    right = wrong.pop("own 1")
    wrong["damaged"] = tmp_path / "damaged.tar"
    wrong["damaged"].write_bytes(right.read_bytes()[:2000])
    for name, lines in {"without digests": None, "no digests": b"none\n", "too few": b"0" * 64 + b"\n"}.items():
        unpack_files(right, tmp_path / "unpacked")
        changed = {str(p.relative_to(tmp_path / "unpacked")): p for p in (tmp_path / "unpacked").rglob("*.*")}
        if lines is None:
            del changed["frames.sha256"]
        else:
            changed["frames.sha256"].write_bytes(lines)
        wrong[name] = tmp_path / f"{name}.tar"
        pack_files(changed, wrong[name])
    delivery = deliver(tmp_path / "resumed", 7, options)
    delivery.write(made[0])
    for name, path in wrong.items():
        with pytest.raises(InternalError):
            delivery.restore(1, path)
        assert delivery.parts == 1, name
        assert [p.name for p in (tmp_path / "resumed/scratch/parts").iterdir()] == ["00000"], name
    delivery.restore(1, right)
    delivery.write(made[2])
    assert publish(delivery, tmp_path / "resumed")[0].output.frames == 7


def test_delivery_with_damaged_sound_fails_before_first_segment(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "source.mp4", 2, audio=tone(2.0), options={"crf": "40"})
    bad = AudioSpan(overwrite_middle(source, tmp_path / "bad.mp4", 0.4, 0.95, 0xFF), 0.0, 2.0)
    with pytest.raises(InputUnreadable, match="keep_audio"):
        deliver(tmp_path, 60, audio=bad)
    with pytest.raises(InputUnreadable, match="keep_audio"):
        deliver(tmp_path, 60, PNG, audio=bad)


def test_delivery_abort_leaves_no_files(tmp_path: Path) -> None:
    delivery = deliver(tmp_path, 5)
    for segment in segments([2, 3]):
        delivery.write(segment)
    publish(delivery, tmp_path)
    delivery.abort()
    delivery.abort()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_delivery_parts_are_held_only_on_disk(tmp_path: Path) -> None:
    """Many segments take no more memory than one."""
    delivery = deliver(tmp_path, 120 * 20)
    clip = indexed_frames(0, 120)  # much more than what other threads of the process may take meanwhile
    delivery.write(Segment(0, clip))
    tracemalloc.start()
    try:
        for index in range(1, 20):
            delivery.write(Segment(index, clip))
        publish(delivery, tmp_path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < clip.nbytes / 2  # the digests
    assert peak < 3 * clip.nbytes
    assert delivery.parts == 20


def test_stage_timer_counts_seconds_of_encoding_and_joining(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    timer = StageTimer(clock=lambda: float(next(ticks)))
    options = JobOptions()
    delivery = Delivery(
        tmp_path, options, width=96, height=64, fps=FPS, frames=2, pose_fps=FPS, audio=None, timer=timer
    )
    delivery.write(segments([2])[0])
    assert timer.seconds == {"encode_video": 1.0}
    publish(delivery, tmp_path)
    assert timer.seconds == {"encode_video": 2.0, "publish": 1.0}
    assert digest_frames(indexed_frames(0, 2))[1] in (tmp_path / "out/jobs/a/frames.sha256").read_text()
