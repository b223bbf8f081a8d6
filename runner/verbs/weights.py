"""Weights: the verbs `weights fetch`, `weights verify` and `weights demo`.

In:   `FetchSettings`, `VerifySettings`, `DemoSettings`. Out: files in a local model store, and what is known of them.
Never: what is in the files; printing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import WeightsMissing
from runner.records.events import default_logging
from runner.verbs.settings import DemoSettings, FetchSettings, VerifySettings

if TYPE_CHECKING:
    from runner.quantization.rules import PlanRow
    from runner.weights.fetch import Fetched
    from runner.weights.verify import Row, Settled

__all__ = ["DemoFolders", "Verification", "demo", "fetch", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `weights verify` found; one of the three, by what it was asked for."""

    files: tuple[Row, ...] = ()
    plan: tuple[PlanRow, ...] = ()  # with `plan`: the layers of a quantised file
    settled: Settled | None = None  # with `against`: how a published file is read

    @property
    def sound(self) -> bool:
        """Whether no file is damaged or missing, and a published file was found to be readable."""
        if self.settled is not None:
            return self.settled.assume is not None
        return not any(file.status in ("corrupt", "missing") for file in self.files)


@dataclass(frozen=True)
class DemoFolders:
    models: Path
    media: Path


@default_logging()
def fetch(settings: FetchSettings, say: Callable[[str], None] = lambda line: None) -> Fetched:
    """Download what a recipe needs. `say` gets the lines to be read before: licences and sizes.

    Raises storage.*, weights.*, ConfigInvalid.
    """
    from runner.weights.fetch import fetch_weights

    pairs = (text.partition("=") for text in settings.revision)
    return fetch_weights(
        _folder(settings.models),
        settings.recipe,
        parts=settings.part,
        endpoint=settings.endpoint,
        revisions={repo: revision for repo, _, revision in pairs},
        dry_run=settings.dry_run,
        say=say,
    )


@default_logging()
def verify(settings: VerifySettings) -> Verification:
    """Check files, list the layers of a quantised file, or settle how a published file is read.

    Raises ConfigInvalid, WeightsMissing, WeightsCorrupt, StorageDenied; a damaged file is a row.
    """
    from runner.weights.verify import plan_rows, settle_against, verify_weights

    folder = _folder(settings.models)
    if settings.plan:
        return Verification(plan=tuple(plan_rows(folder, fmt=settings.format, rule=settings.rule, rank=settings.rank)))
    if settings.against:
        return Verification(settled=settle_against(folder, settings.against, layer=settings.layer))
    return Verification(files=tuple(verify_weights(folder, settings.recipe, cache=settings.cache)))


@default_logging()
def demo(settings: DemoSettings) -> DemoFolders:
    """Put the demo's tiny models and its media in place, where they are not. Raises storage.*."""
    from runner.demo.build import build_demo_media, build_demo_models

    folders = DemoFolders(Path(settings.models), settings.media)
    build_demo_models(folders.models)
    build_demo_media(folders.media)
    return folders


def _folder(models: str | None) -> Path:
    if not models:
        raise WeightsMissing("no model store was named", todo="Pass --models DIR or set VIDEO_LAB_MODELS")
    return Path(models)
