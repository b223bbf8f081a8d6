"""Command line: turns flags into settings, calls the command of a verb, and returns its exit code.

In:   the arguments of a command line. Out: an exit code; errors on standard error.
Never: what a verb prints (verbs/commands.py), or the default of a flag: flags are made from the fields of
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
from dataclasses import MISSING, Field
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
    """Run one verb and return the exit code. Without `argv` this ends the process, even if threads still run."""
    _open_streams()
    code = _call(argv)
    if argv is None:
        from runner.batch.stop import leave

        leave(code)
    return code


def _call(argv: Sequence[str] | None) -> int:
    # The stages share the cores. OpenMP threads that spin while they wait slow each other down: on two busy cores the
    # tiny demo model took ten times the CPU time. torch reads the variable when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _find_home()
    verb, flags, display = parse_command(argv)
    from runner.records.events import configure_logging

    configure_logging(display.log_format, verbose=display.verbose)
    as_json = display.json and verb.json_prints == ONE_OBJECT
    try:
        return verb.call(verb.settings(**flags), display)
    except BrokenPipeError:  # `video-lab preprocess … | head`; a run does not end because of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if verb.name == "run" else 0
    except (RunnerError, OSError) as error:
        return _say_error(error, as_json)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a bug: print its traceback, which may contain a URI
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
    """Open closed standard streams on /dev/null, and escape characters that a stream cannot encode.

    A closed descriptor is replaced first. Otherwise the next opened file would get its number, and native libraries
    would write their messages, meant for descriptor 2, into that file.
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
    """Set HOME and USER if they are missing, as in a container with --user and no line in passwd.

    Without them, libraries that keep caches (torch, Triton, the hub) fail, or write into a folder called ~.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(home_folder())
        os.environ.setdefault("USER", str(os.getuid()))


# -- the parser --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser that accepts flags only by their full names, and prints no secret of a refused flag."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, but refuse an unknown flag before any other check of the line."""
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
        description="Render character animation in batches: a manifest of jobs in, MP4s and records out.",
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
        epilog = _epilog(verb.codes, verb.examples)
        made = groups[group].add_parser(name, help=verb.text, description=verb.text, epilog=epilog, add_help=False)
        made.usage = f"{made.prog} {_usage(verb)}"
        _add_flags(made, verb)
    return top


def _epilog(codes: Iterable[int] = tuple(EXIT_CODES), examples: Iterable[str] = ()) -> str:
    lines = ["exit codes:", *(f"  {code:<3} {EXIT_CODES[code]}" for code in codes)]
    lines += ["An unexpected error (internal) ends every verb with 1, Ctrl-C with 130."]
    lines += ["", "examples:", *(f"  {example}" for example in examples)] if examples else []
    return "\n".join(lines).replace("%", "%%")


def _usage(verb: Verb) -> str:
    """The words that the line must have, and `[flags]` for all others."""
    words = []
    for item, flag in flags_of(verb.settings):
        if flag.positional:
            words.append(flag_name(item))
        elif _is_required(item):
            words.append(f"{flag_name(item)} {flag.metavar}")
    return " ".join([*words, "[flags]"])


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _add_flags(made: argparse.ArgumentParser, verb: Verb) -> None:
    """Add a flag for each field of the verb's settings. A flag that the line does not have is not in the namespace."""
    made.set_defaults(verb=verb)
    flags = flags_of(verb.settings)
    if verb.common:
        common, advanced = made.add_argument_group("common flags"), made.add_argument_group("advanced")
        first = [row for name in verb.common for row in flags if row[0].name == name]
    else:
        common = advanced = made.add_argument_group("flags")
        first = flags
    common.add_argument("-h", "--help", action="help", help="show this help message and exit")
    for item, flag in [*first, *(row for row in flags if row not in first)]:
        how: dict[str, Any] = {"help": flag.help.replace("%", "%%"), "default": argparse.SUPPRESS}
        name = flag_name(item)
        if flag.positional:
            made.add_argument(item.name, metavar=name, **how)
            continue
        group = common if (item, flag) in first else advanced
        if flag.metavar is None:
            how["action"] = "store_true"
        else:
            words = flag.metavar.split()
            how |= {"metavar": flag.metavar, "required": _is_required(item)}
            if len(words) > 1:
                how |= {"metavar": tuple(words), "nargs": len(words)}
            if flag.repeatable:
                how["action"] = "append"
            elif item.default is not MISSING and item.default is not None:
                how["help"] += f" (default: {str(item.default).removesuffix('.0')})"
        group.add_argument(name, dest=item.name, **how)
    if verb.json_prints:
        advanced.add_argument("--json", action="store_true", help=f"print {verb.json_prints}")
    advanced.add_argument(
        "--log-format",
        choices=("auto", "console", "json"),
        default="auto",
        help="format of the log; json: one object per line",
    )
    advanced.add_argument("--verbose", action="store_true", help="log debug events too")


def parse_command(argv: Sequence[str] | None) -> tuple[Verb, dict[str, Any], Display]:
    """Return (verb, the fields of its settings that the line gives, display). Exits with 2 if the line is wrong."""
    flags = vars(parser().parse_args(argv))
    verb = flags.pop("verb")
    display = Display(flags.pop("log_format"), flags.pop("verbose"), flags.pop("json", False))
    return verb, flags, display


if __name__ == "__main__":
    raise SystemExit(main())
