"""Where words leave the program: results to stdout, everything else to stderr, colour only on a terminal.

Words come from the other host, from file names and from processes too: what a terminal would act upon is escaped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from ..core.errors import Owner, TcpcpError

_OWNERS = {Owner.ORIGIN: "the origin has the connection", Owner.DESTINATION: "the destination has the connection",
           Owner.UNKNOWN: "who has the connection is not known yet", Owner.NONE: "nobody has the connection"}
_LAYOUT = dict.fromkeys(map(ord, "\n\t"))  # ours: tables, and what --print-completion prints


def _write(stream: TextIO, text: str) -> None:
    """A reader that has gone, or a full disk, must not change the exit status, which says who owns a connection."""
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            log(f"cannot write to stdout: {error.strerror}")


def _printable(text: str) -> str:
    if text.translate(_LAYOUT).isprintable():
        return text
    return "".join(c if c.isprintable() or ord(c) in _LAYOUT else repr(c)[1:-1] for c in text)


def result(text: str) -> None:
    _write(sys.stdout, _printable(text))


def result_json(value: dict[str, Any]) -> None:
    _write(sys.stdout, json.dumps(value))


def results_json(values: Iterable[dict[str, Any]]) -> None:
    """One a line, and all in one write: there may be thousands."""
    text = "\n".join(map(json.dumps, values))
    if text:
        result(text)


def refusal_json(problem: TcpcpError, *, about_connection: bool) -> None:
    """What --json prints where there is nothing else to print: the reason, and who owns the connection where one was
    concerned (docs/command-line.md)."""
    owner = {"owner": problem.owner.value} if about_connection else {}
    result_json({"schema": 1, "exit": int(problem.exit_code), **owner, "error": problem.message, "hint": problem.hint,
                 "refusal": problem.refusal or None})


def progress(text: str) -> None:
    """Passing words for a person who watches; silent where nobody does."""
    if sys.stderr.isatty():
        log(text)


def log(text: str) -> None:
    _write(sys.stderr, _printable(f"criu-tcpcp: {text}"))


def error(problem: TcpcpError, *, about_connection: bool) -> None:
    """One line: what was wrong, what to do, and who owns the connection where one was concerned."""
    text = problem.message + (f" ({problem.hint})" if problem.hint else "")
    owner = _OWNERS[problem.owner] if about_connection else ""
    if owner and "has its connection" not in text:
        text += f"; {owner}"
    _write(sys.stderr, f"criu-tcpcp: {_emphasised(_printable(' '.join(text.split())))}")


def _emphasised(text: str) -> str:
    # https://no-color.org: any value but none
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return f"\033[31m{text}\033[0m"
    return text


def table(rows: list[list[str]]) -> None:
    """Columns as wide as they need to be; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    result("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows))


def steps(report: Any) -> None:
    """What was done, and how long each action took."""
    for side, name, milliseconds in report.steps:
        result(f"  {side:<12} {name:<16} {milliseconds:8.3f} ms")
