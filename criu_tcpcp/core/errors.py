"""The project's errors, each with its exit status and the owner of the connection.

Two questions every error answers: what failed, and who owns the connection now. The exit status tells an orchestrator
the second without reading a word. Layers raise the narrowest class they can; `cli.main` is the one place that turns
one into a line on stderr and an exit status, `kernel.syscalls` the one place that turns an OSError into `KernelError`.
"""

from __future__ import annotations

import enum


class Owner(enum.StrEnum):
    """Who answers the peer: the word that reports and errors use."""

    ORIGIN = "origin"
    DESTINATION = "destination"
    UNKNOWN = "unknown"
    NONE = "none"


class ExitCode(enum.IntEnum):
    """Exit status of every command (the command line's contract)."""

    OK = 0
    ROLLED_BACK = 1
    USAGE = 2
    REFUSED = 3
    UNCLEAN = 4
    LOST = 5
    IN_DOUBT = 6
    MIXED = 7


class TcpcpError(Exception):
    """Base of all our errors. `hint` says what to do about it, in one clause, or is empty. `refusal` is the name of
    what was refused, where that has one (core/refusals.py)."""

    exit_code = ExitCode.REFUSED
    owner = Owner.ORIGIN

    def __init__(self, message: str, *, hint: str = "", refusal: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.refusal = refusal

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(TcpcpError):
    """The command line, or an argument of the Python API, makes no sense."""

    exit_code = ExitCode.USAGE


class Refused(TcpcpError):
    """The pass cannot be done faithfully; found before anything was touched."""


class ProtocolError(TcpcpError):
    """The other side said something that the protocol does not allow; what it said is not acted upon."""


class KernelError(TcpcpError):
    """A system call failed. `call` names it, `errno` is the kernel's number."""

    def __init__(self, call: str, errno_: int, text: str) -> None:
        super().__init__(f"{call}: {text}")
        self.call = call
        self.errno = errno_


class LinkError(TcpcpError):
    """The byte stream to the other host could not be made, or broke."""


class LinkTimeout(LinkError):
    """The other side said nothing in time; it may still."""


class JournalError(TcpcpError):
    """The run directory cannot be written or read."""


class InDoubt(TcpcpError):
    """The commit was sent, and its answer has not arrived: only the destination's journal knows."""

    exit_code = ExitCode.IN_DOUBT
    owner = Owner.UNKNOWN
