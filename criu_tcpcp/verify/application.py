"""Assertion 10: the peer's application sees no error, EOF or HUP; its longest stall stays in the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from .judgement import Violation
from .packet import CaptureError


@dataclass(frozen=True)
class PeerRecord:
    """What a peer program (`criu_tcpcp.lab.load`) reports when it ends. `error` says in words what it saw: an error
    of the socket, an early end, a wrong byte."""

    error: str | None
    stall_max_ns: int

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """From the JSON object that the program prints; further fields are ignored."""
        try:
            error, stall = value["error"], value["stall_max_ns"]
        except (KeyError, TypeError) as problem:
            raise CaptureError(f"not a peer program's report: {problem!r}") from None
        if not (error is None or isinstance(error, str)) or type(stall) is not int or stall < 0:
            raise CaptureError(f"not a peer program's report: error {error!r}, stall_max_ns {stall!r}")
        return cls(error, stall)


def check_application(record: PeerRecord, budget_ns: int | None = None) -> list[Violation]:
    """Violations of assertion 10. Without a budget, only errors are."""
    found = []
    if record.error is not None:
        found.append(Violation(10, f"the peer's application saw: {record.error}"))
    if budget_ns is not None and record.stall_max_ns > budget_ns:
        found.append(Violation(10, f"the peer's application stalled for {record.stall_max_ns / 1e6:.3f} ms, "
                                   f"the budget is {budget_ns / 1e6:.3f} ms"))
    return found
