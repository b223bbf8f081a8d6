"""Command line: flags → settings → the command of a verb → exit code.

In:   the words of a command line. Out: an exit code; errors on standard error.
Never: what a verb prints (verbs/commands.py), or what a flag's default is: the flags are made from the fields of
verbs/settings.py.

`--help` ends before torch, diffusers or transformers are imported.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from runner import __version__
from runner.errors import RunnerError, as_runner_error
from runner.redact import for_people
from runner.verbs.commands import EXIT_CODES, GROUPS, ONE_OBJECT, VERBS, Display, Verb
from runner.verbs.flags import flag_name, flags_of
from runner.verbs.settings import home_folder

__all__ = ["main", "parse_command", "parser"]


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
    verb, flags, display = parse_command(argv)
    from runner.records.events import configure_logging

    configure_logging(display.log_format, verbose=display.verbose)
    as_json = display.json and verb.json_prints == ONE_OBJECT
    try:
        return verb.call(verb.settings(**flags), display)
    except BrokenPipeError:  # `video-lab preprocess … | head`; what `run` prints never ends it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if verb.name == "run" else 0
    except (RunnerError, OSError) as error:
        return _say_error(error, as_json)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a bug of ours: its traceback helps to find it, and may quote a URI
        from runner.verbs.tables import print_error

        print_error(traceback.format_exc().rstrip())
        return _say_error(error, as_json)


def _say_error(error: Exception, as_json: bool) -> int:
    from runner.verbs.tables import print_error, print_json

    found = as_runner_error(error)
    if as_json:
        from runner.verbs.json_objects import error_object

        with suppress(OSError):
            print_json(error_object(found))
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


def _find_home() -> None:
    """A container started with --user may have no HOME and no line of its user in passwd: libraries that keep caches
    (torch, Triton, the hub) would fail, or write into a folder called ~."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(home_folder())
        os.environ.setdefault("USER", str(os.getuid()))


# -- the parser --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Takes flags by their whole names alone, and quotes no secret of a flag when it refuses it."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an unknown flag is refused before anything else is said of the line."""
        words = sys.argv[1:] if args is None else list(args)
        has_verbs = self._subparsers is not None
        for word in words:
            if word == "--" or (has_verbs and not word.startswith("-")):
                break
            name = word.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][^\s]*", name) and name not in self._option_string_actions:
                self._refuse(name)
        return super().parse_known_args(words, namespace)

    def _refuse(self, name: str) -> None:
        flags = {flag.lstrip("-"): flag for flag in self._option_string_actions if flag.startswith("--")}
        bare = name.lstrip("-")
        near = [word for word in flags if word.startswith(bare)] or difflib.get_close_matches(bare, flags, 1)
        meant = " or ".join(flags[word] for word in near)
        self.error(f"no flag {name}; " + (f"did you mean {meant}?" if meant else f"see {self.prog} --help"))

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(for_people(message), file)


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="video-lab",
        description="Batch renderer for character animation: a manifest of jobs in, MP4s and records out.",
        epilog=_epilog(),
    )
    top.add_argument("--version", action="version", version=f"video-lab {__version__}")
    groups = {"": top.add_subparsers(metavar="VERB", required=True)}
    for verb in VERBS:
        group, _, name = verb.name.rpartition(" ")
        if group not in groups:
            text, below = GROUPS[group], [other for other in VERBS if other.name.startswith(f"{group} ")]
            codes = sorted({code for other in below for code in other.codes})
            epilog = _epilog(codes, [other.examples[0] for other in below][:2])
            made = groups[""].add_parser(group, help=text, description=text, epilog=epilog)
            groups[group] = made.add_subparsers(metavar="WHAT", required=True)
        _add_flags(
            groups[group].add_parser(
                name, help=verb.text, description=verb.text, epilog=_epilog(verb.codes, verb.examples)
            ),
            verb,
        )
    return top


def _epilog(codes: Iterable[int] = tuple(EXIT_CODES), examples: Iterable[str] = ()) -> str:
    lines = ["exit codes:", *(f"  {code:<3} {EXIT_CODES[code]}" for code in codes)]
    lines += ["An unexpected error (internal) ends any verb with 1, Ctrl-C with 130."]
    lines += ["", "examples:", *(f"  {example}" for example in examples)] if examples else []
    return "\n".join(lines).replace("%", "%%")


def _add_flags(made: argparse.ArgumentParser, verb: Verb) -> None:
    """A flag for each field of the verb's settings; what is not given on the line is not in the namespace."""
    made.set_defaults(verb=verb)
    for item, flag in flags_of(verb.settings):
        how: dict[str, Any] = {"help": flag.help.replace("%", "%%"), "default": argparse.SUPPRESS}
        name = flag_name(item)
        if flag.positional:
            made.add_argument(item.name, metavar=name, **how)
            continue
        if flag.metavar is None:
            how["action"] = "store_true"
        else:
            required = item.default is MISSING and item.default_factory is MISSING
            words = flag.metavar.split()
            how |= {"metavar": flag.metavar, "required": required}
            if len(words) > 1:
                how |= {"metavar": tuple(words), "nargs": len(words)}
            if flag.repeatable:
                how["action"] = "append"
            elif item.default is not MISSING and item.default is not None:
                how["help"] += f" ({str(item.default).removesuffix('.0')})"
        made.add_argument(name, dest=item.name, **how)
    if verb.json_prints:
        made.add_argument("--json", action="store_true", help=verb.json_prints)
    made.add_argument(
        "--log-format",
        choices=("auto", "console", "json"),
        default="auto",
        help="json: one object a line, for machines",
    )
    made.add_argument("--verbose", action="store_true", help="debug events too")


def parse_command(argv: Sequence[str] | None) -> tuple[Verb, dict[str, Any], Display]:
    """(verb, fields of its settings that the line names, display). Exits with 2 where it cannot be parsed."""
    flags = vars(parser().parse_args(argv))
    verb = flags.pop("verb")
    display = Display(flags.pop("log_format"), flags.pop("verbose"), flags.pop("json", False))
    return verb, flags, display


if __name__ == "__main__":
    raise SystemExit(main())
