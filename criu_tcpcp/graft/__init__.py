"""Ways into the destination's program: one file a way, one interface.

A way is found and checked before anything is stopped (`find`), and makes ready what takes time (`arrange`, with the
fence for the connection standing). In the freeze it gives the socket that the connection is restored into (`vessel`),
which is a new one or one that the program has already, and gets it dormant (`graft`). Then it is told how it ended:
`brace` and `activate`, or `discard`. `reclaim` is for a later `serve` that continues what an earlier one began.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from ..core.endpoint import Flow
from ..core.errors import Refused, UsageError
from ..core.options import OptionValue
from ..journal import Journal
from ..kernel.process import Identity
from ..kernel.rawpacket import Injector
from ..kernel.rules import HostRules


@dataclass(frozen=True)
class Reclaimed:
    """What an earlier serve left with the program: nothing, the connection half-way (`sock`), or one that is handed out
    already (`delivered`)."""

    sock: socket.socket | None = None
    delivered: bool = False


@dataclass(frozen=True)
class Ground:
    """What a way in may use while it makes ready: the pass's journal, this host's rules, and a hand for packets."""

    journal: Journal
    rules: HostRules
    injector: Injector


@dataclass(frozen=True)
class Vessel:
    """A socket without a connection, and the options that it has. `own`: it is the program's already, which shares its
    file status flags, and has set it up as it likes."""

    sock: socket.socket
    options: dict[str, OptionValue]
    own: bool


class Graft(Protocol):
    """One way in, for one pass. `way`: what `find` takes to find it again. `taker`: the process that the connection is
    for; its number is 0 where it is not known here (another pid namespace), or not yet."""

    description: str
    way: str
    taker: Identity
    stops: bool  # the program stands still from `vessel` on, until `activate` or `discard`

    def arrange(self, flow: Flow, ground: Ground) -> None: ...
    def vessel(self, flow: Flow) -> Vessel: ...
    def graft(self, pass_id: str, sock: socket.socket, flow: Flow, app_state: bytes) -> None: ...
    def check(self) -> None: ...
    def brace(self, unwritten: bool) -> None: ...
    def activate(self, pass_id: str) -> None: ...
    def discard(self, pass_id: str) -> None: ...
    def reclaim(self, journal: Journal) -> Reclaimed: ...
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
