"""The verb `preprocess`: writes the model's conditions as the files of the official preprocessing.

In:   `PreprocessSettings`. Out: files in a folder; a mapping that describes them. Never: generation; printing.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from runner.records.events import default_logging
from runner.spec.manifest import parse_manifest
from runner.storage import fetch_input
from runner.storage.roots import check_inside, parse_roots
from runner.verbs.run import local_models
from runner.verbs.settings import PreprocessSettings

__all__ = ["preprocess"]


@default_logging()
def preprocess(settings: PreprocessSettings) -> dict[str, Any]:
    """Write the files of the official preprocessing. Return a description of them as JSON-able values.

    Raises ManifestInvalid for invalid options, ConfigInvalid, weights.*, input.*, storage.*.
    """
    from runner.generation.runtime.device import pick_device
    from runner.preprocess.networks.providers import NetworkOptions
    from runner.preprocess.official_files import run_preprocess
    from runner.preprocess.pose_cache import POSES_FOLDER
    from runner.preprocess.prepare import Preprocessor
    from runner.storage.disk_cache import DiskCache
    from runner.weights.store import ModelStore

    words = {"id": "preprocess", "reference": settings.reference, "video": settings.video}
    words |= {"mask": settings.mask} if settings.mask else {}
    options = yaml.safe_load(settings.options) if isinstance(settings.options, str) else settings.options
    text = json.dumps({"version": 1, "jobs": [{**words, "options": options}]}, ensure_ascii=False, default=dict)
    (job,) = parse_manifest(text, base=os.getcwd(), source="the command line").jobs
    roots = parse_roots(settings.input_root)
    store = ModelStore(local_models(settings, lambda key: key.startswith("process_checkpoint/")))
    device, _ = pick_device(settings.device)
    preprocessor = Preprocessor.load(
        store.detector,
        store.pose,
        device=device.type,
        dwpose=store.dwpose,
        segmenter=store.segmenter,
        detector_note=store.detector_note,
        cache=DiskCache(settings.cache / POSES_FOLDER),
        networks=NetworkOptions(settings.pose_precision, settings.tensorrt, settings.cache),
    )
    settings.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.cache) as scratch:
        folder = Path(scratch)
        places = check_inside(job.reference, roots), check_inside(job.video, roots)
        mask_place = check_inside(job.mask, roots) if job.mask else None
        reference, video = (fetch_input(place, folder) for place in places)
        mask = fetch_input(mask_place, folder) if mask_place else None
        return run_preprocess(reference, video, settings.out, job.options, preprocessor, mask=mask)
