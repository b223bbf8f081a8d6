"""Trials: runs that are killed or disturbed at one point each, and what was lost by it.

    python -m tests.faults.trials kills --stores local,s3 --formats mp4,png --trials 200 --seed 1

The process imports everything once, has no threads, and forks a child a trial, so that a trial costs a fraction of a
second and its kill lands in the run and not in imports. Points: each change of the output folder (`operations`), before
and after each request (`requests`), an instant (`instants`). After a kill the output is looked at from outside, then
the command is given again, undisturbed, and must end with everything done. `runners` are several runs of one output at
once, of which one is killed, one suspended past its lease, and one late:

    python -m tests.faults.trials runners --stores local,s3 --runners 2,3,5 --trials 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its pool of threads is made when numpy is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.faults.fault_trials import faults
from tests.faults.kill_trials import SERIES, kills
from tests.faults.line_process import LineServer, line_server
from tests.faults.runner_trials import SCENARIOS as SEEDS
from tests.faults.runner_trials import open_stage, runners
from tests.faults.stub_runs import import_all, shorten_waits
from tests.faults.trial_places import LocalPlace, Place, S3Place
from tests.faults.trial_stage import SCENARIOS, Row, Stage, shares
from tests.s3_servers import S3Server

__all__ = ["main"]

MEMORY_BYTES = 2**30


@contextmanager
def trial_folder(keep: Path | None = None) -> Iterator[Path]:
    """In memory where there is room: a SIGKILL takes nothing from the page cache, and no trial waits for a disk.

    `keep`: a folder that is left as it is at the end."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_BYTES
    with tempfile.TemporaryDirectory(prefix="video-lab-trials-", dir=memory if roomy else None) as folder:
        yield Path(folder)


@contextmanager
def open_places(
    stores: Sequence[str], folder: Path, server: S3Server | None = None
) -> Iterator[tuple[dict[str, Place], LineServer | None]]:
    """`local` and `s3` (moto behind the line, or `server`), ready for trials; the line. Imports the product, once."""
    with ExitStack() as held:
        line: LineServer | None = None
        if "s3" in stores:
            if server is None:
                server = line = held.enter_context(line_server())
            for name in [name for name in os.environ if name.startswith(("AWS_", "VIDEO_LAB_S3"))]:
                del os.environ[name]
            os.environ.update(server.environment())
        shorten_waits()
        import_all()
        places: dict[str, Place] = {}
        for store in stores:
            if store == "local":
                places[store] = LocalPlace(folder)
            else:
                assert server is not None
                places[store] = S3Place(server, "S3" if line is not None else "S3, SeaweedFS")
        yield places, line


def table(rows: Sequence[Row]) -> str:
    """One line a row: how many, where the kills landed, what went wrong."""
    moments = ("generating", "delivering", "both", "else")
    titles = "".join(f"{moment:>11}" for moment in moments)
    lines = [
        f"{'store':<14}{'format':<7}{'scenario':<13}{'what':<19}{'trials':>7}{'landed':>7}"
        f"{titles}{'violations':>11}{'hidden':>7}{'s':>7}  exit codes"
    ]
    for row in rows:
        cells = "".join(f"{row.when[moment]:>11}" for moment in moments)
        codes = ", ".join(f"{code}: {n}" for code, n in sorted(row.exit_codes.items()))
        lines.append(
            f"{row.store:<14}{row.format:<7}{row.scenario:<13}{row.what:<19}{row.trials:>7}{row.landed:>7}"
            f"{cells}{len(row.problems):>11}{row.hidden:>7}{row.seconds:>7.1f}  {codes}".rstrip()
        )
        if not row.when.keys() <= {*moments, "missed"}:
            lines.append("    " + ", ".join(f"{name}: {n}" for name, n in row.when.items()))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("kills", "faults", "runners"), help="faults: of the disk for local, of the line for s3"
    )
    parser.add_argument("--stores", default="local,s3", help="of local, s3")
    parser.add_argument("--formats", default="mp4,png")
    parser.add_argument("--scenarios", help=f"all; of {', '.join(SCENARIOS)}; for runners: of {', '.join(SEEDS)}")
    parser.add_argument("--runners", default="2,3,5", help="how many at once")
    parser.add_argument("--trials", type=int, default=20, help="in all (20)")
    parser.add_argument("--series", type=int, default=0, help=f"outputs killed {SERIES} times in a row (0)")
    parser.add_argument("--every-point", action="store_true", help="kill at each operation or request too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--server", metavar="JSON", help="fields of a running S3 server, instead of moto; not for faults"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="runners: keep logs, journals and bad outputs there"
    )
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args(argv)
    server = S3Server(**json.loads(arguments.server)) if arguments.server else None
    several = arguments.what == "runners"
    names = arguments.scenarios or ",".join(SEEDS if several else SCENARIOS)
    stores, formats, scenarios = (text.split(",") for text in (arguments.stores, arguments.formats, names))
    chance = random.Random(arguments.seed)
    combinations = list(product(stores, formats, scenarios))
    rows: list[Row] = []
    with trial_folder(arguments.keep) as folder, open_places(stores, folder, server) as (places, line):
        parts = shares(arguments.trials, len(combinations), chance)
        for (store, format, name), share in zip(combinations, parts, strict=True):
            if several and share:
                stage = open_stage(places[store], folder, format, name)
                counts = [int(text) for text in arguments.runners.split(",")] if name != "other seeds" else [2]
                for count, part in zip(counts, shares(share, len(counts), chance), strict=True):
                    if part:
                        rows.append(runners(stage, count, part, chance))
                if arguments.keep is None:
                    shutil.rmtree(stage.folder, ignore_errors=True)
            elif share or arguments.every_point or (arguments.series and name == "fresh"):
                stage = Stage(places[store], folder, format, name)
                if arguments.what == "kills":
                    rows += kills(stage, share, arguments.series, chance, every_point=arguments.every_point)
                else:
                    rows += faults(stage, share, line, chance)
                shutil.rmtree(stage.folder, ignore_errors=True)
    print(table(rows))
    for row in rows:
        for trial, problem in row.problems:
            print(f"{row.store} {row.format} {row.scenario}: {trial}: {problem.kind}: {problem.what}")
    if arguments.json:
        arguments.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
