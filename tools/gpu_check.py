"""GPU check: tests a GPU in one command: the engine's choices, one real block, the autoencoder, the engine; verdicts.

    python tools/gpu_check.py [--seconds 480] [--only PART,...] [--json FILE] [--device cuda]

The most important parts run first. Each part runs in a separate process, so that an illegal access or a hang in one
part does not stop the others. FILE is written again for each new row, and each part also writes a file with its own
name added to FILE's. So a run that is stopped, also by SIGKILL, leaves valid JSON of all finished rows. Only the part
`engine` needs a model store; it writes one of 16 GB to memory or disk and removes it at its end.

It ends with a verdict for each claim of the README and a proposal for the forecast's constants. Exit code 0: no part
failed and no claim is `not met`; 1: otherwise; 2: usage, or no such device; 143: SIGTERM, after the verdict.

`--device cpu` runs every part at a tiny scale through the same code, for tests; nothing is measured then.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
# The folder of the scripts, the project, and the benchmarks, whose runs, stores and files the parts share.
sys.path[:0] = [path for path in map(str, (HERE, HERE.parent, HERE.parent / "bench")) if path not in sys.path]

from _gpu_check_claims import verdicts  # noqa: E402
from _gpu_check_constants import proposals  # noqa: E402
from _gpu_check_findings import Findings  # noqa: E402
from _gpu_check_record import PartRecord, error_text, write_whole  # noqa: E402

COMMAND = (sys.executable, str(HERE / "gpu_check.py"))  # the command that runs a part, followed by its flags
SECONDS = 480.0
GRACE_S = 10.0  # from SIGTERM to SIGKILL: the benchmark removes its store
VERDICT_S = GRACE_S + 2.0  # reserve for the verdict
POLL_S = 0.2
FULL, TINY = "full", "tiny, cpu"
NO_DEVICE = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of the tiny scale, which measures nothing


@dataclass(frozen=True)
class Part:
    """A part of the check.

    `module`: the module with its function `run`. `needs_s`: seconds until its first rows on a fast card; it is skipped
    if less time is left. `most_s`: seconds after which it is stopped, because it hangs or the next part is more
    important than its last rows. Both are estimates.
    """

    name: str
    module: str
    needs_s: float
    most_s: float


PARTS: tuple[Part, ...] = (
    Part("choices", "_gpu_check_choices", 8, 120),
    Part("block", "_gpu_check_block", 20, 150),
    Part("autoencoder", "_gpu_check_autoencoder", 12, 75),
    Part("engine", "_gpu_check_engine", 60, 3600),
)


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


def parts_of(text: str) -> tuple[Part, ...]:
    """Return the parts that `--only` names, in the order of PARTS."""
    names = {name.strip() for name in text.split(",")}
    if wrong := names - {part.name for part in PARTS}:
        known = ", ".join(part.name for part in PARTS)
        raise argparse.ArgumentTypeError(f"no part {', '.join(map(repr, sorted(wrong)))}; there are {known}")
    return tuple(part for part in PARTS if part.name in names)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time limit of the whole check ({SECONDS:g})")
    parser.add_argument(
        "--only", type=parts_of, default=PARTS, metavar="PART,...", help=f"of {', '.join(p.name for p in PARTS)}"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("out/gpu-check.json"), metavar="FILE", help="(out/gpu-check.json)"
    )
    parser.add_argument(
        "--device", type=device_name, default="cuda", help="cuda, cuda:N, or cpu at a tiny scale (cuda)"
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # this process is that part's
    return parser.parse_args(arguments)


class Check:
    """The growing result of a check."""

    def __init__(self, path: Path, device: str, seconds: float) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "scale": TINY if device == "cpu" else FULL,
            "device": device,
            "seconds": seconds,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "parts": {},
        }

    def keep(self, name: str, part: dict[str, Any]) -> None:
        """Replace the results of part `name`."""
        self.found["parts"][name] = part
        findings = Findings(self.found)
        self.found |= {"verdicts": verdicts(findings), "constants": proposals(findings)}
        write_whole(self.path, self.found)

    def part_path(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{name}.json")


Start = Callable[[Part, float, Callable[[dict[str, Any]], None]], dict[str, Any]]


def run_parts(
    parts: Sequence[Part], start: Start, check: Check, deadline: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Run all parts for which there is time, one after another.

    `start` runs a part for at most the given seconds and reports its rows as they come.
    """
    for part in parts:
        left = deadline - VERDICT_S - clock()
        print(f"{part.name}: {max(left, 0):.0f} s are left", flush=True)
        if left < part.needs_s:
            needed = f"its first rows take {part.needs_s:g} s on a fast card (an estimate)"
            why = f"{max(left, 0):.0f} s are left, and {needed}"
            check.keep(part.name, {"part": part.name, "state": "refused", "error": why, "tables": {}})
        else:
            check.keep(
                part.name, start(part, min(left, part.most_s), lambda found, part=part: check.keep(part.name, found))
            )
        done = check.found["parts"][part.name]
        print(f"{part.name}: {done['state']}" + (f" ({done['error']})" if done["error"] else ""), flush=True)


class Children:
    """Starts parts as processes, one at a time."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.no_device = False

    def start(self, part: Part, seconds: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Return the part's result after its process has ended or was stopped after `seconds`."""
        path = self._check.part_path(part.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        words = ["--inside", part.name, "--seconds", f"{seconds:.1f}", "--json", str(path)]
        device = self._check.found["device"]
        environment = os.environ | (ONE_THREAD if device == "cpu" else visible(device, os.environ))
        child = subprocess.Popen([*COMMAND, *words, "--device", device.partition(":")[0]], env=environment)
        deadline, seen, late = time.monotonic() + seconds, 0, False
        try:
            while child.poll() is None:
                if path.exists() and (now := path.stat().st_mtime_ns) != seen:
                    seen = now
                    tell(read(path, part.name))
                if time.monotonic() > deadline:
                    late = True
                    break
                time.sleep(POLL_S)
        finally:
            end(child)
        found = read(path, part.name)
        self.no_device = child.returncode == NO_DEVICE
        if late or found["state"] == "running":
            why = f"ended after {seconds:.0f} s" if late else f"its process ended with {child.returncode}"
            found |= {"state": "cut off" if late else "failed", "error": why}
        return found


def visible(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that make cuda:N (`cuda`: the first GPU) the only GPU for a part, its tests and NVML."""
    index = int(device.partition(":")[2] or 0)
    names = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not names:
        return {"CUDA_VISIBLE_DEVICES": str(index)}
    return {"CUDA_VISIBLE_DEVICES": names[index] if index < len(names) else ""}


def device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"no device {text!r}; devices: cuda, cuda:N, cpu")
    return text


def read(path: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {"part": name, "state": "running", "error": None, "tables": {}}
    return found


def end(child: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, then SIGKILL after GRACE_S. Does nothing if the process has ended."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run_inside(options: argparse.Namespace) -> int:
    """Run a part in this process and write its result to the file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    (part,) = parts_of(options.inside)
    tiny = options.device == "cpu"
    record = PartRecord(options.json, part.name, scale=TINY if tiny else FULL, seconds=options.seconds)
    try:
        import structlog
        import torch

        from runner.errors import ConfigInvalid
        from runner.generation.runtime.device import grow_segments, pick_device

        if not tiny and not torch.cuda.is_available():
            try:
                pick_device(options.device)  # knows why
            except ConfigInvalid as err:
                record.end("failed", f"{err}")
                return NO_DEVICE
        # Not asked for its name before NVML is read: that may already make a context.
        device = torch.device("cpu") if tiny else torch.device("cuda", 0)
        grow_segments(device)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        import_module(part.module).run(record, device, tiny=tiny)
    # Any error becomes this part's result, and the next part runs.
    except Exception as err:
        record.end("failed", error_text(err))
        raise
    record.end("done")
    return 0


def end_with_parent(parent: int) -> None:
    """End this part as by SIGTERM if its check was killed, so that it removes its files."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE_S)
    os._exit(143)


def show_verdict(check: Check) -> None:
    print("\nClaims of the README:")
    for row in check.found.get("verdicts", []):
        print(f"  {row['verdict']:<12}  {row['claim']}" + (f"\n{'':16}{row['why']}" if row["why"] else ""))
    print("\nConstants of the forecast, as measured (a proposal):")
    for row in check.found.get("constants", []):
        print(f"  {row['constant']}: {row['old']} -> {row['new']}    {row['key']}")
    if not check.found.get("constants"):
        print("  none was measured")
    if check.found["scale"] == TINY:
        print("\nscale: tiny, cpu. These are not measurements.")
    print(f"\nAll results: {check.path}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.inside:
        return run_inside(options)
    began = time.monotonic()

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    check = Check(options.json, options.device, options.seconds)
    children = Children(check)

    def start(part: Part, seconds: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        found = children.start(part, seconds, tell)
        if children.no_device:
            check.keep(part.name, found)
            raise SystemExit(NO_DEVICE)
        return found

    code = 0
    try:
        run_parts(options.only, start, check, began + options.seconds)
    except Stopped as stopped:
        code = 128 + stopped.args[0]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for name, part in check.found["parts"].items():
            if part["state"] == "running":
                part |= {"state": "cut off", "error": "the check was stopped"}
                check.keep(name, part)
    except SystemExit:
        error = next((part["error"] for part in check.found["parts"].values() if part["error"]), "no such device")
        print(f"error: {error}\n--device cpu runs every part at a tiny scale, without measuring", file=sys.stderr)
        return NO_DEVICE
    show_verdict(check)
    failed = any(part["state"] == "failed" for part in check.found["parts"].values())
    wrong = any(row["verdict"] == "not met" for row in check.found.get("verdicts", []))
    return code or int(failed or wrong)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
