"""Ways into the destination's program: one file a way, one interface.

A way is found and checked before anything is stopped (`find`), given the dormant connection (`graft`), and told how it
ended (`activate`, `discard`). `reclaim` is for a later `serve` that continues what an earlier one began.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from ..core.endpoint import Flow
from ..core.errors import Refused, UsageError
from ..kernel.process import Identity


@dataclass(frozen=True)
class Reclaimed:
    """What an earlier serve left with the program: nothing, the connection half-way (`sock`), or one that is handed out
    already (`delivered`)."""

    sock: socket.socket | None = None
    delivered: bool = False


class Graft(Protocol):
    """One way in, for one pass. `way`: what `find` takes to find it again. `taker`: the process that the connection is
    for; its number is 0 where it is not known here (another pid namespace)."""

    description: str
    way: str
    taker: Identity

    def graft(self, pass_id: str, sock: socket.socket, flow: Flow, app_state: bytes) -> None: ...
    def check(self) -> None: ...
    def activate(self, pass_id: str) -> None: ...
    def discard(self, pass_id: str) -> None: ...
    def reclaim(self, pass_id: str) -> Reclaimed: ...
    def close(self) -> None: ...


def check_name(into: str) -> None:
    """UsageError where `--into` names no way in: known before the destination is reached."""
    kind, colon, rest = into.partition(":")
    if into != "auto" and not (kind == "receiver" and bool(rest) == bool(colon)):
        raise UsageError(f"--into {into[:80]}: not a way in that this version knows", hint="auto or receiver[:PATH]")


def find(into: str, flow: Flow) -> Graft:
    """The way that `--into` names. Refused says what is missing and what could be done; nothing is touched."""
    from . import to_receiver
    check_name(into)
    kind, _, rest = into.partition(":")
    if kind == "receiver":
        return to_receiver.at_path(rest) if rest else to_receiver.for_port(flow.local.port)
    found = to_receiver.try_port(flow.local.port)
    if found is not None:
        return found
    raise Refused(f"nothing at the destination takes connections of port {flow.local.port}",
                  hint=f"an application there that makes criu_tcpcp.Receiver(port={flow.local.port}), or "
                       "--into receiver:PATH")
