"""Faults: kills runs, or lets their disk or S3 server fail, and checks that nothing is lost.

    python bench/faults.py [--trials N] [--seed N] [--json PATH]

Each trial is a whole `video-lab run` of two or three jobs. Only the model is a stub. The run is killed with SIGKILL at
a change of the output folder, before or after a request, or at a random time. Or one file operation or request fails,
or all later ones too. Then the output is checked from outside, the same command runs again without a fault, and every
job must be done with the frames of an undisturbed run. Local trials and S3 trials (moto behind a connection that fails
on demand) run in parallel in two processes; see `tests/faults/trials.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _json_file import write_json

ROOT = Path(__file__).resolve().parents[1]
S3_SHARE = 0.3  # of the trials: one over S3 takes three times as long
COLUMNS = {
    "lost": ("job lost",),
    "wrong": ("wrong frames",),
    "removed": ("output removed",),
    "crashed": ("crashed", "called failed"),
    "other": ("record", "left over", "exit code", "rendered again", "internal"),
}


def run_trials(what: str, store: str, trials: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of `tests/faults/trials.py`, run as a process that forks; RuntimeError if it breaks."""
    target = folder / f"{what}-{store}.json"
    words = [what, "--stores", store, "--trials", str(trials), "--seed", str(seed), "--json", str(target)]
    if what == "faults":
        words += ["--scenarios", "fresh,other seeds"]
    elif trials >= 40:
        words += ["--series", str(trials // 40)]
    command = [sys.executable, "-m", "tests.faults.trials", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not target.exists():
        raise RuntimeError(f"the trials broke off:\n{done.stdout}{done.stderr}")
    return json.loads(target.read_text())


def bench(trials: int, seed: int, stores: list[str]) -> dict[str, Any]:
    """`trials` in all, half of them kills; problems are as in the rows."""
    share = {"local": 1 - S3_SHARE, "s3": S3_SHARE} if len(stores) > 1 else {stores[0]: 1.0}
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as folder:

        def run_store(store: str) -> list[dict[str, Any]]:
            each = max(1, round(trials * share[store] / 2))
            return [row for what in ("kills", "faults") for row in run_trials(what, store, each, seed, Path(folder))]

        with ThreadPoolExecutor(len(stores)) as pool:
            rows = [row for rows in pool.map(run_store, stores) for row in rows]
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        merge(merged.setdefault(name_of(row), empty(row)), row)
    found = list(merged.values())
    return {"bench": "faults", "seed": seed, "rows": found, "total": total(found), "problems": problems_of(rows)}


def name_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What is one line: kills by scenario, faults over all scenarios."""
    scenario = row["scenario"] if "kills" in row["what"] else "all"
    return row["store"], row["format"], row["what"], scenario


def empty(row: dict[str, Any]) -> dict[str, Any]:
    names = dict(zip(("store", "format", "what", "scenario"), name_of(row), strict=True))
    return names | {"trials": 0, "landed": 0, "when": {}, "exit_codes": {}} | dict.fromkeys(COLUMNS, 0)


def merge(into: dict[str, Any], row: dict[str, Any]) -> None:
    # A job counts once a trial, whatever was found wrong with it.
    found = {(p["kind"], p["trial"], re.split("[ :]", p["what"], maxsplit=1)[0]) for p in row.get("problems", ())}
    kinds = Counter(kind for kind, _, _ in found)
    into["trials"] += row["trials"]
    into["landed"] += row["landed"]
    for name in ("when", "exit_codes"):
        into[name] = dict(sorted((Counter(into[name]) + Counter(row[name])).items()))
    for column, names in COLUMNS.items():
        into[column] += row.get(column, sum(kinds[name] for name in names))


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = empty({"store": "all", "format": "", "what": "", "scenario": ""})
    for row in rows:
        merge(found, row)
    return found


def problems_of(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['store']} {row['format']} {row['scenario']}: {p['trial']}: {p['kind']}: {p['what']}"
        for row in rows
        for p in row["problems"]
    ]


def table(found: dict[str, Any]) -> str:
    titles = "".join(f"{column:>8}" for column in COLUMNS)
    lines = [f"{'':<52}{'trials':>7}{'landed':>7}{titles}  landed while; exit codes of the disturbed runs"]
    for row in [*found["rows"], found["total"]]:
        name = ", ".join(part for part in (row["store"], row["format"], row["what"], row["scenario"]) if part)
        when = ", ".join(f"{moment} {n}" for moment, n in row["when"].items())
        codes = ", ".join(f"{code}: {n}" for code, n in row["exit_codes"].items())
        counts = "".join(f"{row[column]:>8}" for column in COLUMNS)
        lines.append(
            f"{name.removesuffix(', all'):<52}{row['trials']:>7}{row['landed']:>7}{counts}  {when or codes}".rstrip()
        )
    lines.append(
        "lost: jobs not done after the command was given again; wrong: frames called done that are not the job's; "
        "removed: good\nolder outputs; crashed: jobs called failed for a kill that was not theirs; other: records, "
        "leftovers, exit codes."
    )
    return "\n".join([*lines, *found["problems"]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, metavar="N", help="in all, half of them kills (300)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the points and instants (1)")
    parser.add_argument("--stores", default="local,s3", metavar="NAMES", help="of local, s3 (both)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    found = bench(arguments.trials, arguments.seed, arguments.stores.split(","))
    print(table(found))
    write_json(arguments.json, found)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
