"""Command line: verbs only. Parse, call, print, exit by outcome.

`--help` ends before torch, diffusers or transformers are imported: every verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import __version__
from runner.errors import RunnerError, as_runner_error
from runner.redact import for_people

__all__ = ["main", "parser"]

EXIT_CODES = """\
exit codes:
  0 all jobs succeeded or were done   1 some jobs failed   2 usage, manifest, weights or credentials: fix, then rerun
  3 infrastructure: rerun the same command   4 regression threshold broken   130 SIGINT   143 SIGTERM, drained
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. Without `argv` the process is ours, and ends here if it cannot end by itself."""
    _open_streams()
    code = _call(argv)
    if argv is None:
        from runner.batch.stop import leave

        leave(code)
    return code


def _call(argv: Sequence[str] | None) -> int:
    # The stages share the cores. OpenMP threads that wait by spinning take them from each other: on two busy cores the
    # tiny demo model took ten times the CPU time. Read when torch is first imported, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _find_home()
    arguments = parser().parse_args(argv)
    from runner.records.events import configure_logging

    configure_logging(arguments.log_format, verbose=arguments.verbose)
    try:
        return int(arguments.call(arguments))
    except BrokenPipeError:  # `video-lab preprocess … | head`; what `run` prints never ends it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if arguments.call is _run else 0
    except (RunnerError, OSError) as error:
        return _say_error(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a bug of ours: its traceback helps to find it, and may quote a URI
        from runner.verbs.tables import print_error

        print_error(traceback.format_exc().rstrip())
        return _say_error(error)


def _say_error(error: Exception) -> int:
    from runner.verbs.tables import print_error

    found = as_runner_error(error)
    print_error(f"{found.code}: {found.message}")
    return found.exit_code


def _open_streams() -> None:
    """A closed standard stream reads and writes nothing; a character that a stream cannot encode is escaped.

    A closed descriptor is taken first: the next file to be opened would get its number, and the messages that native
    libraries write to descriptor 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Quotes no secret of a flag when it refuses it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(for_people(message), file)


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="video-lab",
        description="Batch renderer for character animation: a manifest of jobs in, MP4s and records out.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"video-lab {__version__}")
    common = _Parser(add_help=False)
    common.add_argument(
        "--log-format",
        choices=("auto", "console", "json"),
        default="auto",
        help="json: one object a line, for machines",
    )
    common.add_argument("--verbose", action="store_true", help="debug events too")
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, call: object, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            parents=[common],
            help=text,
            description=text,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(call=call)
        return made

    run = verb("run", _run, "render what is not done yet")
    _manifest(run)
    run.add_argument("--out", required=True, metavar="URI", help="output folder or s3://bucket/prefix")
    _models(run)
    _shard(run)
    _roots(run)
    run.add_argument("--run-id", metavar="ID", help="of the summary; default: the scheduler's job id, else the time")
    run.add_argument(
        "--memory", metavar="MODE", help="where weights live: auto, resident, stream, minimal; over the manifest's"
    )
    run.add_argument("--force", action="store_true", help="run every job, done or not")
    run.add_argument("--retry-failed", action="store_true", help="run only jobs that have failed")
    run.add_argument("--max-attempts", type=_count, default=3, metavar="N", help="attempts a job gets; 0: no limit (3)")
    run.add_argument(
        "--drain-s", type=float, default=20.0, metavar="S", help="seconds the running job gets after a signal (20)"
    )
    run.add_argument(
        "--assume", metavar="K=V,…", help="how to read a published FP4 file where it does not say, e.g. nibble=high"
    )
    _networks(run)
    run.add_argument("--sheet", type=Path, metavar="PNG", help="also draw a contact sheet of this run's outputs")

    _validate_flags(
        verb("validate", _validate, "check a manifest, and that its inputs exist and open; renders nothing")
    )

    plan = verb("plan", _plan, "print frames, segments, padding and cost of each job; renders nothing")
    _manifest(plan)
    _models(plan)
    _shard(plan)
    _roots(plan)
    plan.add_argument("--gpu", metavar="NAME", help="whose seconds to forecast, e.g. 'RTX 5090' (the one here)")

    status = verb("status", _status, "what an output folder holds: done, failed, running")
    status.add_argument("out", metavar="OUT", help="output folder or s3://bucket/prefix")
    status.add_argument("--json", action="store_true", help="one JSON object a job")

    _clean_flags(
        verb(
            "clean",
            _clean,
            "remove what killed runs left in an output folder: staged files, probes, unfinished uploads",
        )
    )

    doctor = verb("doctor", _doctor, "check device, driver, libraries, weights, disk and S3, and say what to do")
    _models(doctor)
    doctor.add_argument("--out", metavar="URI", help="check that this can be written")

    preprocess = verb(
        "preprocess", _preprocess, "one video → src_pose.mp4, src_face.mp4, src_ref.png, as official files"
    )
    preprocess.add_argument("--reference", required=True, metavar="URI", help="image of the character")
    preprocess.add_argument("--video", required=True, metavar="URI", help="driving video")
    preprocess.add_argument(
        "--mask", metavar="URI", help="replace mode: white where the character goes; else it is made"
    )
    preprocess.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the files")
    preprocess.add_argument(
        "--options", default="{}", metavar="YAML", help="job options, e.g. '{fps: 30, size: 480x832}'"
    )
    _roots(preprocess)
    _models(preprocess)
    _networks(preprocess)

    _quantize_flags(verb("quantize", _quantize, "make a recipe's FP4 file from the published weights in the store"))
    _weights_flags(verb("weights", _weights, "fetch | verify | demo: model files"))
    return top


def _clean_flags(clean: argparse.ArgumentParser) -> None:
    clean.add_argument("out", metavar="OUT", help="output folder or s3://bucket/prefix")
    clean.add_argument(
        "--older-than", type=_age, default="1h", metavar="AGE", help="leave what is younger: 30m, 1h, 2d, 0s (1h)"
    )
    clean.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")
    clean.add_argument("--json", action="store_true", help="one JSON object a leftover")


def _validate_flags(validate: argparse.ArgumentParser) -> None:
    _manifest(validate)
    validate.add_argument(
        "--deep", action="store_true", help="decode images whole, download s3:// inputs and open them too"
    )
    _roots(validate)
    validate.add_argument("--no-inputs", action="store_true", help="check the manifest's text only")
    validate.add_argument("--models", metavar="URI", help="check that this model store has the jobs' LoRAs, and whole")
    _cache(validate)


def _quantize_flags(quantize: argparse.ArgumentParser) -> None:
    _models(quantize)
    quantize.set_defaults(recipe="fp4-distill")
    quantize.add_argument("--format", choices=("nvfp4", "g32"), default="nvfp4", help="number format (nvfp4)")
    quantize.add_argument("--scales", choices=("mse", "absmax"), help="how scales are chosen (mse)")
    quantize.add_argument(
        "--calibrate", metavar="MANIFEST", help="render these jobs first and weight scales by activations"
    )
    quantize.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="merge it too; repeatable"
    )
    quantize.add_argument(
        "--rule", default="all", metavar="NAME", help="which layers: all, or sensitive ones kept (all)"
    )
    quantize.add_argument("--text-encoder", action="store_true", help="make the INT4 text encoder too")


def _weights_flags(weights: argparse.ArgumentParser) -> None:
    weights.add_argument("what", choices=("fetch", "verify", "demo"), help="demo: tiny models and media, no hub needed")
    _models(weights)
    weights.add_argument("--media", type=Path, default=Path(".cache/demo-media"), metavar="DIR", help="demo: its media")
    weights.add_argument("--part", action="append", metavar="PART", help="fetch: only this part; repeatable")
    weights.add_argument("--endpoint", metavar="URL", help="fetch: the hub ($HF_ENDPOINT)")
    weights.add_argument(
        "--revision", action="append", default=[], metavar="REPO=REV", help="fetch: branch, tag, commit"
    )
    weights.add_argument("--dry-run", action="store_true", help="fetch: show files, sizes and licences only")
    weights.add_argument("--plan", action="store_true", help="verify: print the quantised file layer by layer")
    weights.add_argument("--format", choices=("nvfp4", "g32"), default="nvfp4", help="verify --plan (nvfp4)")
    weights.add_argument("--rule", default="all", metavar="NAME", help="verify --plan: which layers (all)")
    weights.add_argument(
        "--against", type=Path, metavar="SOURCE", help="verify: settle how a published FP4 file is read"
    )
    weights.add_argument("--layer", metavar="NAME", help="verify --against: this layer, not the first")


def _manifest(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("manifest", metavar="MANIFEST", help="YAML or JSONL: a path, s3://… or - for standard input")


def _roots(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--input-root",
        action="append",
        default=[],
        metavar="DIR",
        help="refuse inputs that lie elsewhere, symlinks followed; a folder or s3://bucket/prefix, repeatable",
    )


def _models(verb: argparse.ArgumentParser) -> None:
    default = os.environ.get("VIDEO_LAB_MODELS")
    verb.add_argument(
        "--models", default=default, metavar="URI", help="model store: a folder or s3://… ($VIDEO_LAB_MODELS)"
    )
    _cache(verb)
    verb.add_argument("--recipe", metavar="NAME", help="weights, precision and steps; over the manifest's")
    verb.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one")


def _cache(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--cache",
        type=Path,
        default=_default_cache(),
        metavar="DIR",
        help="for synced models and scratch ($VIDEO_LAB_CACHE)",
    )


def _default_cache() -> Path:
    """$VIDEO_LAB_CACHE, else below the home folder."""
    named = os.environ.get("VIDEO_LAB_CACHE")
    return Path(named) if named else (_home() or _temporary_home()) / ".cache" / "video-lab"


def _find_home() -> None:
    """A container started with --user may have no HOME and no line of its user in passwd: libraries that keep caches
    (torch, Triton, the hub) would fail, or write into a folder called ~."""
    if _home() is None:
        os.environ["HOME"] = str(_temporary_home())
        os.environ.setdefault("USER", str(os.getuid()))


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


def _temporary_home() -> Path:
    return Path(tempfile.gettempdir()) / f"video-lab-{os.getuid()}"


def _networks(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--pose-precision",
        choices=("fp32", "int8"),
        default="fp32",
        help="int8: the pose network's matrix products in 8 bits, on the CPU only; made once, kept in --cache (fp32)",
    )
    verb.add_argument(
        "--tensorrt",
        choices=("off", "auto", "on"),
        default="off",
        help="preprocessing through TensorRT on a GPU, engines kept in --cache; auto: where it is installed (off)",
    )


def _shard(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--shard", metavar="I/N", help="this share of the jobs; default: from the scheduler's environment"
    )
    verb.add_argument("--shard-count", type=_count, metavar="N", help="shares in all, where the scheduler tells only I")


def _age(text: str) -> float:
    from runner.verbs.clean import parse_age

    try:
        return parse_age(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def _run(arguments: argparse.Namespace) -> int:
    from runner.verbs.run import run_manifest

    return run_manifest(arguments)


def _validate(arguments: argparse.Namespace) -> int:
    from runner.spec.manifest import load_manifest
    from runner.spec.recipes import DEFAULT_RECIPE, get_recipe
    from runner.storage.roots import parse_roots
    from runner.verbs.tables import print_problems
    from runner.verbs.validate import check_inputs, check_models

    manifest = load_manifest(arguments.manifest)
    roots = parse_roots(arguments.input_root)
    problems = [] if arguments.no_inputs else check_inputs(manifest.jobs, deep=arguments.deep, roots=roots)
    if arguments.models:
        recipe = get_recipe(manifest.recipe or DEFAULT_RECIPE)
        problems += check_models(manifest.jobs, recipe, arguments.models, arguments.cache)
    print_problems(manifest, problems, checked=not arguments.no_inputs)
    return 1 if problems else 0


def _plan(arguments: argparse.Namespace) -> int:
    from runner.verbs.plan import forecast_jobs
    from runner.verbs.run import choose_jobs
    from runner.verbs.tables import print_plan

    manifest, jobs, _, _ = choose_jobs(arguments)
    rows, gpu = forecast_jobs(jobs, arguments, manifest)
    print_plan(rows, gpu)
    return 1 if any(row.error for row in rows) else 0


def _status(arguments: argparse.Namespace) -> int:
    from runner.storage import open_storage
    from runner.verbs.status import read_status
    from runner.verbs.tables import print_status

    rows = read_status(open_storage(arguments.out))
    print_status(arguments.out, rows, as_json=arguments.json)
    return 1 if any(row.status == "failed" for row in rows) else 0


def _clean(arguments: argparse.Namespace) -> int:
    from runner.storage import open_storage
    from runner.verbs.clean import age_text, clean_output
    from runner.verbs.tables import print_clean

    rows = list(clean_output(open_storage(arguments.out), arguments.older_than, remove=arguments.yes))
    words = ["video-lab", "clean", arguments.out, "--older-than", age_text(arguments.older_than), "--yes"]
    print_clean(arguments.out, rows, shlex.join(words), as_json=arguments.json)
    for row in rows:
        if row.error is not None:
            raise row.error
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from runner.verbs.doctor import run_checks
    from runner.verbs.tables import print_checks

    checks = run_checks(arguments.models, arguments.out, arguments.cache, arguments.device, recipe=arguments.recipe)
    print_checks(checks)
    return 2 if any(check.status == "fail" for check in checks) else 0


def _preprocess(arguments: argparse.Namespace) -> int:
    from runner.verbs.preprocess import preprocess_one

    return preprocess_one(arguments)


def _quantize(arguments: argparse.Namespace) -> int:
    from runner.verbs.quantize import quantize_models

    return quantize_models(arguments)


def _weights(arguments: argparse.Namespace) -> int:
    from runner.verbs import weights

    return {"fetch": weights.fetch, "verify": weights.verify, "demo": _weights_demo}[arguments.what](arguments)


def _weights_demo(arguments: argparse.Namespace) -> int:
    from runner.demo.build import build_demo_media, build_demo_models
    from runner.verbs.tables import print_text

    models = Path(arguments.models or ".cache/demo-models")
    build_demo_models(models)
    build_demo_media(arguments.media)
    print_text(f"models: {models}\nmedia:  {arguments.media}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
