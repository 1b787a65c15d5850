"""Assertion 9, the kernel's half: counters of the peer that a pass must not move.

They are what `nstat` or /proc/net/netstat show, taken before and after. `nstat` prefixes the names
("TcpExtTCPTimeouts") and leaves out zeros: a missing name is 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from .judgement import Violation
from .packet import CaptureError

WATCHED = ("PAWSEstab", "TCPChallengeACK", "TCPSYNChallenge", "TCPAbort*", "TCPACKSkippedPAWS", "TCPSACKReneging",
           "TCPTimeouts")


def check_counters(before: Mapping[str, int], after: Mapping[str, int],
                   watched: Iterable[str] = WATCHED) -> list[Violation]:
    """One violation for each watched counter (patterns as in fnmatch) that moved, either way: one that fell means that
    the two snapshots are not of one kernel. Raises ValueError if nothing was given at all."""
    if not after and not before:
        raise ValueError("no counters were given")
    old, new = _plain(before), _plain(after)
    patterns = tuple(watched)
    moved = [name for name in sorted(old.keys() | new.keys())
             if any(fnmatchcase(name, pattern) for pattern in patterns) and old.get(name, 0) != new.get(name, 0)]
    return [Violation(9, f"the peer's {name} went from {old.get(name, 0)} to {new.get(name, 0)}") for name in moved]


def _plain(counters: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix("TcpExt"): value for name, value in counters.items()}


def parse_netstat(text: str) -> dict[str, int]:
    """/proc/net/netstat or /proc/net/snmp -> {"TcpExtTCPTimeouts": 0, ...}, named as `nstat` does."""
    found: dict[str, int] = {}
    lines = text.splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        prefix, _, rest = names.partition(":")
        prefix_again, _, numbers = values.partition(":")
        try:
            if prefix != prefix_again:
                raise ValueError(f"{prefix!r} is followed by {prefix_again!r}")
            found.update({prefix + name: int(number)
                          for name, number in zip(rest.split(), numbers.split(), strict=True)})
        except ValueError as error:
            raise CaptureError(f"not /proc/net/netstat: {error}") from None
    return found
