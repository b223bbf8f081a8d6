"""Prepare: make a job's conditions from its inputs, before generation.

In:   a reference, a video, perhaps a mask, options. Out: `PoseConditions`. Never: generation.
Pass 1 (`poses`) runs here; pass 2, drawing and cropping, in the result's `window`. Only poses and boxes are kept after
pass 1; at most a few windows of pixels exist at a time.
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
    """Prepares jobs with a detector and a pose network that are loaded once.

    The other pair of networks and the segmenter are opened for the first job that needs them.
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
        detector_note: str = "",
    ) -> None:
        self._detector_note = detector_note
        self._device, self._dwpose, self._segmenter_folder, self._cache = device, dwpose, segmenter, cache
        self._networks = networks or NetworkOptions()
        self._host: Preprocessor | None = None  # the same networks on the CPU, after a job did not fit on the device
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
        detector_note: str = "",
    ) -> Preprocessor:
        """Open both networks (files, or folders with `end2end.onnx`) on "cpu", "cuda" or "cuda:N".

        dwpose:        detector and pose network of the other backend.
        segmenter:     folder of a SAM 2, for replace jobs without a mask.
        networks:      precision and providers.
        detector_note: a sentence that ends the advice of NoPerson.
        If the networks do not fit on the device, they are opened on the CPU, with a warning in the log. Raises
        WeightsMissing, WeightsCorrupt, or ConfigInvalid if the device is not available.
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
            opened.detector,
            opened.pose,
            device,
            dwpose=dwpose,
            segmenter=segmenter,
            cache=cache,
            networks=networks,
            detector_note=detector_note,
        )

    @property
    def detector(self) -> PersonDetector:
        """The detector of the default pair."""
        return self._backends["vitpose"].detector

    @property
    def pose(self) -> PointFinder:
        """The pose network of the default pair."""
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
        """Run pass 1 over `video`. Pass 2 runs in the result's `window`. Stages: decode, detect, pose; then draw.

        A job for which the device has too little memory is prepared on the CPU, with a warning in its report: the job
        that is being rendered uses the memory, and the next job may have more.
        Raises InputNotFound, InputUnreadable, InputTooLarge, InputTooShort (fewer than two frames in the chosen part)
        and NoPerson (no person in any frame, one in too few frames, none at `subject`, or none in a reference to
        retarget to).
        """
        timer = timer or StageTimer()
        try:
            return self._prepare(reference, video, options, mask, face_size, timer)
        except NoPerson as error:
            if not self._detector_note:
                raise
            todo = f"{error.todo}. {self._detector_note}" if error.todo else self._detector_note
            raise NoPerson(error.what, where=error.where, todo=todo) from error
        except Exception as error:
            full = as_runner_error(error)
            if self._device == "cpu" or not isinstance(full, OutOfMemory):
                raise
            why = full.what  # only the text: the error refers to the frames that were in use
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
        text = f"The job was prepared on the CPU, because memory on {self._device} ran out: {why}. "
        text += "A lower --memory mode leaves more memory for the next jobs."
        warnings = [*made.report["warnings"], text]
        made.report = {**made.report, "prepared_on": "cpu", "warnings": warnings}
        return made

    def _prepare(
        self, reference: Path, video: Path, options: JobOptions, mask: Path | None, face_size: int, timer: StageTimer
    ) -> PoseConditions:
        """See `prepare`. Also raises OutOfMemory, or torch's error of that name."""
        preprocess = options.preprocess
        backend = self._backend(preprocess.pose)
        picture = load_image(reference, backdrop=None if preprocess.parity else (255, 255, 255))
        warnings: list[str] = []
        with VideoReader(video, parity=preprocess.parity) as reader:
            info = reader.info
            sampled = reader.sample(options.fps, options.start_s, options.max_frames, parity=preprocess.parity)
            if repeated := fps_warning(options, info, sampled):
                warnings.append(repeated)
            given = _mask(options, mask, info, sampled)
            try:
                size = output_size(options, picture.size, (info.width, info.height))
                geometry = _geometry(options, (info.width, info.height), size)
                model = None
                if preprocess.retarget != "off" and options.mode == "replace":
                    warnings.append("preprocess.retarget has no effect with mode: replace; the driver's body stays.")
                elif preprocess.retarget != "off":  # first, so that an unusable reference is reported early
                    with timer.stage("pose"):
                        model = self._pose_of(picture, reference, options, backend)
                networks = {} if self._cache is None else backend_parts(backend)
                everybody = None
                if isinstance(preprocess.subject, int) and not preprocess.parity:
                    # By the default detector, whatever networks the job uses: a number must mean the same person.
                    if self._cache is not None:
                        networks["numbering"] = network_parts(self.detector.network)
                    everybody = find_people_boxes(
                        reader, self.detector, cache=self._cache, timer=timer, parts=networks.get("numbering")
                    )
                    _check_number(preprocess.subject, everybody, Path(video))
                found = find_poses_once(
                    self._cache,
                    networks,
                    reader,
                    sampled,
                    preprocess,
                    geometry,
                    backend.detector,
                    backend.pose,
                    timer,
                    everybody,
                )
                masks: GivenMask | ClipMasks | None = given
                if options.mode == "replace" and given is None:
                    parts = {} if self._cache is None else clip_parts(reader, sampled, preprocess, geometry, networks)
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
        warnings += found.warnings + choice_warnings(preprocess, found.report)
        if model is not None:
            retarget = retarget_official if preprocess.retarget == "official" else retarget_robust
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
                "parity": preprocess.parity,
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
        """Return the reference's pose, one frame, in its pixels (parity: letterboxed to the output's size first)."""
        parity = options.preprocess.parity
        image = np.asarray(picture)
        if parity:
            image = resize_by_area(image, _area(options))
        height, width = image.shape[:2]
        choose = choose_person_parity if parity else choose_person
        box = choose(backend.detector.rows([image])[0], (width, height))
        if box is None and not parity:
            raise NoPerson(
                "no person was found in the reference, but preprocess.retarget needs the person's proportions",
                where=path,
                todo="Give a reference that shows a person, or set preprocess.retarget to off",
            )
        return PoseTrack(backend.pose.points(image[None], [box], bgr=parity), width, height)


def _host_options(networks: NetworkOptions | None) -> NetworkOptions:
    """Return the options for the same networks on the CPU."""
    return replace(networks or NetworkOptions(), tensorrt="off", arena_bytes=None)


def choice_warnings(options: PreprocessOptions, report: Mapping[str, Any]) -> list[str]:
    """Return a warning if there are several people and the job sets no `subject`. report: that of the poses."""
    count = report.get("people", 0)
    if count < 2 or "subject" in options.model_fields_set:
        return []
    return [
        f"{count} people are on screen and preprocess.subject is not given: the largest is followed. "
        "`video-lab inspect VIDEO` shows their numbers; `subject: 2` follows the second, `subject: largest` keeps the "
        "choice and removes this warning."
    ]


def foreseen_warnings(
    options: JobOptions, reader: VideoReader, sampled: Sampled, size: tuple[int, int], cache: DiskCache | None
) -> list[str]:
    """Return the warnings of `prepare` that are known without networks: nothing is decoded, no model is loaded.

    size: of the output. Warnings about poses come from poses in `cache` that were found before; a cache that does not
    exist or cannot be read is skipped.
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
    """Raise NoPerson if the video has fewer people."""
    count = len(everybody.people)
    if number <= count:
        return
    numbers = "1 and 2" if count == 2 else f"1 to {count}"
    have = f"{count} people: {numbers}" if count > 1 else "1 person" if count else "no people"
    raise NoPerson(
        f"preprocess.subject is {number}, but the video has {have}",
        where=video,
        todo="`video-lab inspect VIDEO` shows them with their numbers",
    )


def _mask(options: JobOptions, mask: Path | None, video: VideoInfo, sampled: Sampled) -> GivenMask | None:
    """Open and check the mask of a replace job; None for a job without a mask."""
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
    """Return the origin of a replace job's mask, for the record."""
    return None if masks is None else "made" if isinstance(masks, ClipMasks) else "given"


def _widening(options: JobOptions) -> Callable[[np.ndarray], np.ndarray]:
    mask, parity = options.preprocess.mask, options.preprocess.parity
    return partial(augment, iterations=mask.iterations, kernel=mask.kernel, grid=mask.grid(parity))


def _geometry(options: JobOptions, video: tuple[int, int], output: tuple[int, int]) -> Geometry:
    parity = options.preprocess.parity
    replace = options.mode == "replace"
    # A letterbox is invisible on a black skeleton; around a real background it would be rendered.
    placement = place(video, output, crop_up_to=GRID if replace else 0)
    return Geometry(*output, placement, parity=parity, resize_first=_area(options) if parity and replace else None)


def _area(options: JobOptions) -> int:
    """Return the area of the option `size`. The official code uses only the area."""
    size = options.size_pixels
    return size[0] * size[1] if size else AUTO_AREA


def segment_driver(
    segmenter: Segmenter, video: Path, sampled: Sampled, geometry: Geometry, found: FoundPoses, timer: StageTimer
) -> ClipMasks:
    """Return one mask per sampled frame, at the size of the networks' frames. It is a third decode: the person is known
    only after pass 1.

    In frames without the person, joints are guesses and give no prompts. Raises NoPerson.
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
