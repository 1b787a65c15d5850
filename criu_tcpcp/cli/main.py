"""`criu-tcpcp`: the table of commands, and the place where an error becomes a line and an exit status."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from .._version import __version__
from ..core.errors import ExitCode, TcpcpError, UsageError
from . import console

#: name -> (module, whether a connection's owner belongs into its error lines)
COMMANDS: dict[str, tuple[str, bool]] = {
    "pass": ("cmd_pass", True),
    "list": ("cmd_list", False),
    "dump": ("cmd_dump", True),
    "show": ("cmd_show", False),
    "check": ("cmd_check", False),
    "passes": ("cmd_passes", False),
    "resolve": ("cmd_resolve", False),
    "release": ("cmd_release", False),
    "verify": ("cmd_verify", False),
    "serve": ("cmd_serve", False),
    "demo": ("cmd_demo", False),
}


_INTERNAL_ERROR = 70  # sysexits.h, EX_SOFTWARE


_STATUS = ("Exit status, which tells who owns the connection: 0 the destination, all done; 1 the origin, the pass was "
           "undone; 2 usage; 3 refused, nothing was touched; 4 the destination, something could not be cleaned up; 5 "
           "lost; 6 in doubt, run `criu-tcpcp resolve`; 7 `resolve` of several passes, which ended differently; 70 a "
           "bug.")


class _Parser(argparse.ArgumentParser):
    """Usage errors as one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script. The library that makes it is loaded for that alone."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        from .completion import script
        console.result(script(parser, values))
        parser.exit()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{COMMANDS[name][0]}", __package__)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="criu-tcpcp", description="Pass one live TCP connection from a process on this host to "
                  "a process on another. The peer never notices.", epilog=_STATUS)
    top.add_argument("--version", action="version", version=f"criu-tcpcp {__version__}")
    top.add_argument("--print-completion", action=_PrintCompletion, choices=["bash", "zsh"], metavar="SHELL",
                     help="print a completion script for bash or zsh")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name in COMMANDS:
        module = _module(name)
        sub = commands.add_parser(name, allow_abbrev=False, help=module.HELP,
                                  description=(module.__doc__ or "").strip().split("\n\n")[0])
        module.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    about_connection = bool(words) and COMMANDS.get(words[0], ("", False))[1]
    as_json = "--json" in words  # also of a command line that cannot be parsed
    try:
        try:
            arguments = parser().parse_args(words)
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
            console.log(f"cannot write to stdout: {problem.strerror}")  # --help, --version
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return int(ExitCode.OK)
        status = _module(arguments.command).run(arguments)
        return int(status)
    except TcpcpError as problem:
        if as_json:
            _refuse_in_json(problem, about_connection=about_connection)
        else:
            console.error(problem, about_connection=about_connection and problem.exit_code is not ExitCode.USAGE)
        return int(problem.exit_code)
    except KeyboardInterrupt:
        console.log("interrupted")
        return 130
    except BrokenPipeError:  # the reader of argparse's own words has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as problem:  # noqa: BLE001 - a bug: one line, and a status that claims no owner
        text = f"internal error, please report it: {type(problem).__name__}: {problem}"
        if as_json:
            console.result_json({"schema": 1, "exit": _INTERNAL_ERROR, "error": text, "hint": ""})
        else:
            console.log(text)
        return _INTERNAL_ERROR


def _refuse_in_json(problem: TcpcpError, *, about_connection: bool) -> None:
    """A pass that got so far as to have a report says it all; anything else is the reason."""
    report = getattr(problem, "report", None)
    if report is not None:
        console.result_json(report.to_json())
    else:
        console.refusal_json(problem, about_connection=about_connection)


def entry() -> NoReturn:
    """The console script. Whatever the command, there may be payload in its memory."""
    from ..kernel.syscalls import forbid_core_dumps
    _have_stdio()
    forbid_core_dumps()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # a library's words to its developers, of input that is refused
    sys.exit(main())


def _have_stdio() -> None:
    """What was started without stdin, stdout or stderr gets /dev/null there: else the next socket would be in their
    place, and be written to."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - it stays open
