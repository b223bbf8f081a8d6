"""The verb `preprocess`: what drives the model, as the official script's files, and what was done as JSON.

In:   the parsed flags. Out: files in a folder, JSON on standard output, the exit code. Never: generation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import yaml

from runner.errors import ConfigInvalid
from runner.spec.manifest import parse_manifest
from runner.storage import fetch_input
from runner.storage.roots import check_inside, parse_roots
from runner.verbs.run import local_models, network_options
from runner.verbs.tables import print_json

__all__ = ["preprocess_one"]


def preprocess_one(arguments: argparse.Namespace) -> int:
    """The verb `preprocess`: what drives the model, as the official script's files, and what was done as JSON."""
    from runner.generation.runtime.device import pick_device
    from runner.preprocess.official_files import run_preprocess
    from runner.preprocess.prepare import Preprocessor
    from runner.storage.disk_cache import DiskCache
    from runner.weights.store import ModelStore

    words = {"id": "preprocess", "reference": arguments.reference, "video": arguments.video}
    words |= {"mask": arguments.mask} if arguments.mask else {}
    try:
        options = yaml.safe_load(arguments.options)
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"--options is no YAML ({error})", todo="Write e.g. '{fps: 30, size: 480x832}'") from error
    text = json.dumps({"version": 1, "jobs": [{**words, "options": options}]}, ensure_ascii=False)
    (job,) = parse_manifest(text, base=os.getcwd(), source="the command line").jobs
    roots = parse_roots(arguments.input_root)
    store = ModelStore(local_models(arguments, lambda key: key.startswith("process_checkpoint/")))
    device, _ = pick_device(arguments.device)
    preprocessor = Preprocessor.load(
        store.detector,
        store.pose,
        device=device.type,
        dwpose=store.dwpose,
        segmenter=store.segmenter,
        cache=DiskCache(arguments.cache / "poses"),
        networks=network_options(arguments),
    )
    arguments.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.cache) as scratch:
        places = [check_inside(uri, roots) if uri else None for uri in (job.reference, job.video, job.mask)]
        paths = [fetch_input(place, Path(scratch)) if place else None for place in places]
        assert paths[0] is not None and paths[1] is not None
        done = run_preprocess(paths[0], paths[1], arguments.out, job.options, preprocessor, mask=paths[2])
    print_json(done, indent=2)
    return 0
