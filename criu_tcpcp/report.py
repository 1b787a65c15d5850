"""What a pass ends with: the same facts for the human, for --json and for the Python API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .core.errors import ExitCode, Owner, TcpcpError

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """`steps`: side, action and milliseconds of everything that was done. `stall_ms`: how long packets of the peer were
    held. `left`: what was left behind. `notes`: what was not carried, harmlessly, and how the pass was done. `refusal`:
    the name of what was refused (core/refusals.py), or ''."""

    id: str
    owner: Owner
    exit: ExitCode
    connection: str
    into: str = ""
    redirect: str = ""
    steps: tuple[tuple[str, str, float], ...] = ()
    stall_ms: float | None = None
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None
    hint: str = ""
    refusal: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints (docs/command-line.md)."""
        return {"schema": SCHEMA, "id": self.id, "owner": self.owner.value, "exit": int(self.exit),
                "connection": self.connection, "into": self.into, "redirect": self.redirect,
                "steps": [{"side": side, "name": name, "ms": ms} for side, name, ms in self.steps],
                "stall_ms": self.stall_ms, "left": list(self.left), "notes": list(self.notes), "error": self.error,
                "hint": self.hint, "refusal": self.refusal or None, **self.details}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        """Inverse of `to_json`, for what the keeper says to the command."""
        known = {"schema", "id", "owner", "exit", "connection", "into", "redirect", "steps", "stall_ms", "left",
                 "notes", "error", "hint", "refusal"}
        return cls(id=value["id"], owner=Owner(value["owner"]), exit=ExitCode(value["exit"]),
                   connection=value["connection"], into=value["into"], redirect=value["redirect"],
                   steps=tuple((one["side"], one["name"], one["ms"]) for one in value["steps"]),
                   stall_ms=value["stall_ms"], left=tuple(value["left"]), notes=tuple(value["notes"]),
                   error=value["error"], hint=value["hint"], refusal=value.get("refusal") or "",
                   details={name: one for name, one in value.items() if name not in known})


class PassError(TcpcpError):
    """A pass that did not end with the connection at the destination and all done. `report` has everything."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.error or "the pass failed", hint=report.hint, refusal=report.refusal)
        self.report = report
        self.exit_code = report.exit
        self.owner = report.owner
