"""Weights: the verbs `weights fetch`, `weights verify` and `weights demo`.

In:   `FetchSettings`, `VerifySettings`, `DemoSettings`. Out: files in a local model store; the results of their checks.
Never: the contents of the files; printing.
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
    """The result of `weights verify`. The settings decide which one of the three fields is set."""

    files: tuple[Row, ...] = ()
    plan: tuple[PlanRow, ...] = ()  # with `plan`: the layers of a quantised file
    settled: Settled | None = None  # with `against`: the read options of a published file

    @property
    def sound(self) -> bool:
        """Whether no file is damaged or missing, and read options of the published file were found."""
        if self.settled is not None:
            return self.settled.assume is not None
        return not any(file.status in ("corrupt", "missing") for file in self.files)


@dataclass(frozen=True)
class DemoFolders:
    """The folders of the demo."""

    models: Path
    media: Path


@default_logging()
def fetch(settings: FetchSettings, say: Callable[[str], None] = lambda line: None) -> Fetched:
    """Download the files of a recipe. `say` gets lines to print before the download: licences and sizes.

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
    """Check files, list the layers of a quantised file, or find the read options of a published file.

    A damaged file is a row, not an error. Raises ConfigInvalid, WeightsMissing, WeightsCorrupt, StorageDenied.
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
    """Write the demo's tiny models and media if they are missing. Raises storage.*."""
    from runner.demo.build import build_demo_media, build_demo_models

    folders = DemoFolders(Path(settings.models), settings.media)
    build_demo_models(folders.models)
    build_demo_media(folders.media)
    return folders


def _folder(models: str | None) -> Path:
    if not models:
        raise WeightsMissing("no model store was named", todo="Pass --models DIR or set VIDEO_LAB_MODELS")
    return Path(models)
