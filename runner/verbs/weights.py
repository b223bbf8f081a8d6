"""Weights: `weights fetch` and `weights verify` on the command line: call, print, exit by outcome."""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.errors import ConfigInvalid, WeightsMissing
from runner.spec.recipes import DEFAULT_RECIPE
from runner.verbs.tables import print_text

__all__ = ["fetch", "verify"]


def fetch(arguments: argparse.Namespace) -> int:
    """Download what a recipe needs. Raises storage.*, weights.*, ConfigInvalid."""
    from runner.weights.fetch import fetch_weights

    revisions = {}
    for text in arguments.revision:
        repo, equals, revision = text.partition("=")
        if not equals:
            raise ConfigInvalid(f"--revision {text}", todo="Write REPO=REVISION")
        revisions[repo] = revision
    fetched = fetch_weights(
        _folder(arguments),
        arguments.recipe or DEFAULT_RECIPE,
        parts=arguments.part,
        endpoint=arguments.endpoint,
        revisions=revisions,
        dry_run=arguments.dry_run,
        say=print_text,
    )
    done = "would be fetched" if arguments.dry_run else f"{fetched.downloaded_bytes / 1e9:.2f} GB fetched"
    print_text(f"{fetched.folder}: {fetched.files} files, {fetched.bytes / 1e9:.2f} GB, {done}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check files, print a plan, or settle how a published file is read. 2 where something is wrong."""
    from runner.weights.verify import plan_rows, settle_against, verify_weights

    folder = _folder(arguments)
    if arguments.plan:
        rows = plan_rows(folder, fmt=arguments.format, rule=arguments.rule)
        for row in rows:
            shape = "x".join(map(str, row.shape))
            print_text(f"{row.name:<60} {shape:>14} {row.packed_bytes:>13,} {row.other_bytes:>13,}")
        packed, other = sum(row.packed_bytes for row in rows), sum(row.other_bytes for row in rows)
        quantised = sum(bool(row.packed_bytes) for row in rows)
        print_text(f"{quantised} layers quantised: {packed / 1e9:.3f} GB; the rest {other / 1e9:.3f} GB")
        return 0
    if arguments.against:
        settled = settle_against(folder, arguments.against, layer=arguments.layer)
        print_text(f"{settled.file}, layer {settled.layer}: relative error of the weights, by how they are read")
        for comparison in settled.comparisons:
            print_text(f"  {comparison.error:8.4f}  {comparison.assumptions}")
        print_text(f"use: --assume {settled.assume}" if settled.assume else "no reading fits: not the same weights?")
        return 0 if settled.assume else 2
    bad = 0
    for file in verify_weights(folder, arguments.recipe or DEFAULT_RECIPE, cache=arguments.cache):
        bad += file.status in ("corrupt", "missing")
        print_text(f"{file.status:<8} {file.bytes or 0:>15,}  {file.path}  {file.note or ''}".rstrip())
    return 2 if bad else 0


def _folder(arguments: argparse.Namespace) -> Path:
    if not arguments.models:
        raise WeightsMissing("no model store was named", todo="Pass --models DIR or set VIDEO_LAB_MODELS")
    return Path(arguments.models)
