"""Prepare: what one job's inputs become before anything is generated.

In:   a reference, a video, perhaps a mask, options. Out: `PoseConditions`. Never: generation.
Pass 1 (`poses`) happens here; pass 2, drawing and cropping, in the result's `window`. Only poses and boxes outlive
pass 1: no more than a few windows of pixels exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from runner.errors import (
    JobWeightsMissing,
    NoPerson,
    OutOfMemory,
    RunnerError,
    as_runner_error,
    job_weight_errors,
)
from runner.preprocess.body.keypoints import PoseTrack
from runner.preprocess.body.people_found import PeopleFound
from runner.preprocess.body.retarget import retarget_robust
from runner.preprocess.body.retarget_official import retarget_official
from runner.preprocess.conditions import PoseConditions
from runner.preprocess.geometry import Geometry, frames_at_once
from runner.preprocess.masks.given import GivenMask
from runner.preprocess.masks.packed import ClipMasks
from runner.preprocess.masks.point_prompts import PromptPlan
from runner.preprocess.masks.segmenter import Segmenter, load_segmenter, segment_clip
from runner.preprocess.masks.widen import augment
from runner.preprocess.networks.backends import Backend, PersonDetector, PointFinder, open_backend
from runner.preprocess.networks.providers import NetworkOptions
from runner.preprocess.networks.yolov10 import choose_person, choose_person_parity
from runner.preprocess.people_search import find_people_boxes
from runner.preprocess.pictures.images import load_image
from runner.preprocess.pictures.sizing import AUTO_AREA, GRID, output_size, place, resize_by_area
from runner.preprocess.pose_cache import (
    backend_parts,
    cached_notes,
    clip_parts,
    find_poses_once,
    masks_once,
    network_parts,
    segmenter_parts,
)
from runner.preprocess.poses import FoundPoses
from runner.preprocess.rates import fps_warning
from runner.spec.options import JobOptions, PreprocessOptions
from runner.storage.disk_cache import DiskCache
from runner.timing import StageTimer
from runner.video import Sampled, VideoInfo, VideoReader

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Preprocessor", "choice_warnings", "foreseen_warnings", "segment_driver"]

FACE_SIZE = 512  # the face encoder's


class Preprocessor:
    """Detector and pose model, loaded once, and what they do to a job's inputs.

    The other pair of networks and the segmenter are opened when a job first asks for them.
    """

    def __init__(
        self,
        detector: PersonDetector,
        pose: PointFinder,
        device: str = "cpu",
        *,
        dwpose: tuple[Path, Path] | None = None,
        segmenter: Path | None = None,
        cache: DiskCache | None = None,
        networks: NetworkOptions | None = None,
    ) -> None:
        self._device, self._dwpose, self._segmenter_folder, self._cache = device, dwpose, segmenter, cache
        self._networks = networks or NetworkOptions()
        self._host: Preprocessor | None = None  # the same networks on the CPU, once a job did not fit on the device
        self._backends = {"vitpose": Backend("vitpose", detector, pose)}
        self._segmenter: Segmenter | None = None
        self.description: dict[str, Any] = {
            "device": device,
            "detector": detector.network.description,
            "pose": pose.network.description,
        }

    @classmethod
    def load(
        cls,
        detector: Path,
        pose: Path,
        *,
        device: str = "cpu",
        dwpose: tuple[Path, Path] | None = None,
        segmenter: Path | None = None,
        cache: DiskCache | None = None,
        networks: NetworkOptions | None = None,
    ) -> Preprocessor:
        """Open both networks (files, or folders with `end2end.onnx`) on "cpu", "cuda" or "cuda:N".

        `dwpose`: detector and pose network of the other backend; `segmenter`: folder of a SAM 2, for replace jobs
        without a mask; `networks`: precision and providers. Where the device has no room for both they are opened on
        the CPU, and the log says so. WeightsMissing, WeightsCorrupt, or ConfigInvalid where the device cannot be had.
        """
        try:
            opened = open_backend("vitpose", detector, pose, device, networks)
        except OutOfMemory as error:
            if device == "cpu":
                raise
            structlog.get_logger().warning("preprocessing_on_the_cpu", why=error.message)
            device, networks = "cpu", _host_options(networks)
            opened = open_backend("vitpose", detector, pose, device, networks)
        return cls(
            opened.detector, opened.pose, device, dwpose=dwpose, segmenter=segmenter, cache=cache, networks=networks
        )

    @property
    def detector(self) -> PersonDetector:
        """Of the default pair."""
        return self._backends["vitpose"].detector

    @property
    def pose(self) -> PointFinder:
        """Of the default pair."""
        return self._backends["vitpose"].pose

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            if self._dwpose is None:
                what = "no networks for preprocess.pose: dwpose"
                raise JobWeightsMissing(what, todo="Put them into the model store")
            with job_weight_errors():
                self._backends[name] = open_backend(name, *self._dwpose, self._device, self._networks)
            self.description[name] = self._backends[name].description
        return self._backends[name]

    def _segment(
        self,
        video: Path,
        sampled: Sampled,
        geometry: Geometry,
        found: FoundPoses,
        parts: Mapping[str, Any],
        timer: StageTimer,
    ) -> ClipMasks:
        if self._segmenter is None:
            if self._segmenter_folder is None:
                what = "no segmenter for a replace job without a mask"
                raise JobWeightsMissing(what, todo="Give the job a `mask:`")
            with job_weight_errors():
                self._segmenter = load_segmenter(self._segmenter_folder, self._device)
            self.description["segmenter"] = self._segmenter.description
        segmenter = self._segmenter
        assert self._segmenter_folder is not None
        key = {**parts, "segmenter": segmenter_parts(segmenter.description, self._segmenter_folder)}
        return masks_once(
            self._cache, key, lambda: segment_driver(segmenter, video, sampled, geometry, found, timer), timer
        )

    def prepare(
        self,
        reference: Path,
        video: Path,
        options: JobOptions,
        *,
        mask: Path | None = None,
        face_size: int = FACE_SIZE,
        timer: StageTimer | None = None,
    ) -> PoseConditions:
        """Pass 1 over `video`; pass 2 happens in the result's `window`. Stages: decode, detect, pose; then draw.

        A job for which the device's memory does not suffice is prepared on the CPU, which its report says: the job that
        is being rendered has the memory, and the next job may find more.
        Raises InputNotFound, InputUnreadable, InputTooLarge, InputTooShort (fewer than two frames in the span asked
        for) and NoPerson (nobody in any frame, too little of somebody, nobody where `subject` points, or nobody in a
        reference to retarget to).
        """
        timer = timer or StageTimer()
        try:
            return self._prepare(reference, video, options, mask, face_size, timer)
        except Exception as error:
            full = as_runner_error(error)
            if self._device == "cpu" or not isinstance(full, OutOfMemory):
                raise
            why = full.what  # alone: the error holds the frames that were in work
        structlog.get_logger().warning("preparing_on_the_cpu", video=Path(video).name, why=why)
        if self._host is None:
            default = self._backends["vitpose"]
            self._host = Preprocessor.load(
                default.detector.network.path,
                default.pose.network.path,
                dwpose=self._dwpose,
                segmenter=self._segmenter_folder,
                cache=self._cache,
                networks=_host_options(self._networks),
            )
        made = self._host._prepare(reference, video, options, mask, face_size, timer)
        text = f"The job was prepared on the CPU, as memory on {self._device} ran out: {why}. "
        text += "A lower --memory mode leaves more of it."
        warnings = [*made.report["warnings"], text]
        made.report = {**made.report, "prepared_on": "cpu", "warnings": warnings}
        return made

    def _prepare(
        self, reference: Path, video: Path, options: JobOptions, mask: Path | None, face_size: int, timer: StageTimer
    ) -> PoseConditions:
        """See `prepare`. Raises OutOfMemory, or torch's error of that name, too."""
        asked = options.preprocess
        backend = self._backend(asked.pose)
        picture = load_image(reference, backdrop=None if asked.parity else (255, 255, 255))
        warnings: list[str] = []
        with VideoReader(video, parity=asked.parity) as reader:
            info = reader.info
            sampled = reader.sample(options.fps, options.start_s, options.max_frames, parity=asked.parity)
            if repeated := fps_warning(options, info, sampled):
                warnings.append(repeated)
            given = _mask(options, mask, info, sampled)
            try:
                size = output_size(options, picture.size, (info.width, info.height))
                geometry = _geometry(options, (info.width, info.height), size)
                model = None
                if asked.retarget != "off" and options.mode == "replace":
                    warnings.append("preprocess.retarget has no effect with mode: replace; the driver's body stays.")
                elif asked.retarget != "off":  # before the video: a reference that cannot serve is known at once
                    with timer.stage("pose"):
                        model = self._pose_of(picture, reference, options, backend)
                networks = {} if self._cache is None else backend_parts(backend)
                everybody = None
                if isinstance(asked.subject, int) and not asked.parity:
                    # By the default detector, whatever networks the job asks for: a number means one person.
                    if self._cache is not None:
                        networks["numbering"] = network_parts(self.detector.network)
                    everybody = find_people_boxes(
                        reader, self.detector, cache=self._cache, timer=timer, parts=networks.get("numbering")
                    )
                    _check_number(asked.subject, everybody, Path(video))
                found = find_poses_once(
                    self._cache,
                    networks,
                    reader,
                    sampled,
                    asked,
                    geometry,
                    backend.detector,
                    backend.pose,
                    timer,
                    everybody,
                )
                masks: GivenMask | ClipMasks | None = given
                if options.mode == "replace" and given is None:
                    parts = {} if self._cache is None else clip_parts(reader, sampled, asked, geometry, networks)
                    masks = self._segment(Path(video), sampled, geometry, found, parts, timer)
            except BaseException:
                if given:
                    given.close()
                raise
        network = backend.pose.network
        if network.precision != self._networks.pose_precision:
            warnings.append(f"{network.path.name} runs in {network.precision}, not int8: {network.precision_why}.")
        retargeted = None
        report: dict[str, Any] = {"source_frames": info.frames, "sampled_frames": len(sampled.indices), **found.report}
        warnings += found.warnings + choice_warnings(asked, found.report)
        if model is not None:
            retarget = retarget_official if asked.retarget == "official" else retarget_robust
            moved = retarget(found.track, model, canvas=size)
            retargeted, report["retarget"] = moved.track, moved.report
            warnings += moved.warnings
        return PoseConditions(
            frames=len(sampled.indices),
            fps=sampled.fps,
            width=size[0],
            height=size[1],
            start_s=sampled.start_s,
            report={
                **report,
                "detector": backend.detector.network.path.name,
                "pose": network.path.name,
                "provider": network.provider,
                "pose_precision": network.precision,
                "mask": _mask_source(masks),
                "parity": asked.parity,
                "warnings": warnings,
            },
            reference=picture,
            video=Path(video),
            indices=np.asarray(sampled.indices, np.int64),
            track=found.track,
            faces=found.faces,
            face_size=face_size,
            geometry=geometry,
            mask=masks,
            widen=_widening(options) if isinstance(masks, ClipMasks) else None,
            retargeted=retargeted,
            timer=timer,
            reader=reader,
        )

    def _pose_of(self, picture: Image.Image, path: Path, options: JobOptions, backend: Backend) -> PoseTrack:
        """The pose of the reference, one frame, in its own pixels (parity: letterboxed to the output's size first)."""
        parity = options.preprocess.parity
        image = np.asarray(picture)
        if parity:
            image = resize_by_area(image, _area(options))
        height, width = image.shape[:2]
        choose = choose_person_parity if parity else choose_person
        box = choose(backend.detector.rows([image])[0], (width, height))
        if box is None and not parity:
            raise NoPerson(
                "no person was found in the reference, which preprocess.retarget takes the proportions from",
                where=path,
                todo="Give a reference that shows a person, or set preprocess.retarget to off",
            )
        return PoseTrack(backend.pose.points(image[None], [box], bgr=parity), width, height)


def _host_options(networks: NetworkOptions | None) -> NetworkOptions:
    """The same networks on the CPU."""
    return replace(networks or NetworkOptions(), tensorrt="off", arena_bytes=None)


def choice_warnings(options: PreprocessOptions, report: Mapping[str, Any]) -> list[str]:
    """A warning where there are several people and the job does not say whom to follow. `report`: that of the poses."""
    count = report.get("people", 0)
    if count < 2 or "subject" in options.model_fields_set:
        return []
    return [
        f"{count} people are on screen and preprocess.subject is not given: the largest is followed. "
        "`video-lab inspect VIDEO` numbers them; `subject: 2` follows the second, `subject: largest` is as now."
    ]


def foreseen_warnings(
    options: JobOptions, reader: VideoReader, sampled: Sampled, size: tuple[int, int], cache: DiskCache | None
) -> list[str]:
    """What `prepare` will warn of, as far as it is known without a network: nothing is decoded, no model is loaded.

    `size`: of the output. Warnings of the poses are those of poses that were found before and are in `cache`; its
    folder is asked only where it exists, and passed by where it cannot be read.
    """
    repeated = fps_warning(options, reader.info, sampled)
    warnings = [] if repeated is None else [repeated]
    if cache is None or not cache.root.is_dir():
        return warnings
    geometry = _geometry(options, (reader.info.width, reader.info.height), size)
    notes = None
    with suppress(RunnerError, OSError):
        notes = cached_notes(cache, reader, sampled, options.preprocess, geometry)
    if notes is not None:
        report, found = notes
        warnings += found + choice_warnings(options.preprocess, report)
    return warnings


def _check_number(number: int, everybody: PeopleFound, video: Path) -> None:
    """NoPerson where the video has fewer people."""
    count = len(everybody.people)
    if number <= count:
        return
    numbers = "1 and 2" if count == 2 else f"1 to {count}"
    have = f"{count} people: {numbers}" if count > 1 else "1 person" if count else "no people"
    raise NoPerson(
        f"preprocess.subject is {number}; the video has {have}",
        where=video,
        todo="`video-lab inspect VIDEO` shows them with their numbers",
    )


def _mask(options: JobOptions, mask: Path | None, video: VideoInfo, sampled: Sampled) -> GivenMask | None:
    """The mask that came with a replace job, known to belong to the video; None where it came without."""
    if options.mode != "replace" or mask is None:
        return None
    given = GivenMask(mask, video, sampled)
    try:
        given.check_not_empty()
    except BaseException:
        given.close()
        raise
    return given


def _mask_source(masks: GivenMask | ClipMasks | None) -> str | None:
    """For the record: where the mask of a replace job came from."""
    return None if masks is None else "made" if isinstance(masks, ClipMasks) else "given"


def _widening(options: JobOptions) -> Callable[[np.ndarray], np.ndarray]:
    asked, parity = options.preprocess.mask, options.preprocess.parity
    return partial(augment, iterations=asked.iterations, kernel=asked.kernel, grid=asked.grid(parity))


def _geometry(options: JobOptions, video: tuple[int, int], output: tuple[int, int]) -> Geometry:
    parity = options.preprocess.parity
    replace = options.mode == "replace"
    # A letterbox is invisible on a black skeleton; around a real background it would be rendered.
    placement = place(video, output, crop_up_to=GRID if replace else 0)
    return Geometry(*output, placement, parity=parity, resize_first=_area(options) if parity and replace else None)


def _area(options: JobOptions) -> int:
    """The official code reads nothing but this from the size asked for."""
    asked = options.size_pixels
    return asked[0] * asked[1] if asked else AUTO_AREA


def segment_driver(
    segmenter: Segmenter, video: Path, sampled: Sampled, geometry: Geometry, found: FoundPoses, timer: StageTimer
) -> ClipMasks:
    """One mask a sampled frame, at the size that the networks saw. A third decode: the person is known only now.

    In frames without a person the joints are guesses: they prompt nothing. Raises NoPerson.
    """
    indices = np.asarray(sampled.indices, np.int64)
    unique, first, back = np.unique(indices, return_index=True, return_inverse=True)
    points = found.track.points[first].copy()
    points[~found.present[first], :, 2] = 0
    plan = PromptPlan(points, (found.track.width, found.track.height))
    with timer.stage("segment"), VideoReader(video, parity=geometry.parity, plan=indices) as reader:
        windows = _network_frames(reader, unique, geometry)
        return segment_clip(segmenter, windows, plan, numbers=unique, where=video).taken(back)


def _network_frames(reader: VideoReader, indices: np.ndarray, geometry: Geometry) -> Iterator[np.ndarray]:
    for native in reader.windows(indices, frames_at_once(reader.info.width, reader.info.height)):
        yield native if geometry.resize_first is None else np.stack([geometry.frame(frame) for frame in native])
