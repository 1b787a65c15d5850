"""Ways into the destination's program: one file a way, one interface.

A way is found and checked before anything is stopped (`find`), and makes ready what takes time (`arrange`, with the
fence for the connection standing). In the freeze it gives the socket that the connection is restored into (`vessel`),
which is a new one or one that the program has already, and gets it dormant (`graft`). Then it is told how it ended:
`brace` and `activate`, or `discard`. `reclaim` is for a later `serve` that continues what an earlier one began.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from typing import Protocol as Interface

from ..core.endpoint import Flow, Protocol
from ..core.errors import Refused, UsageError
from ..core.options import OptionValue
from ..core.policy import Taker
from ..journal import Journal
from ..kernel import process, sockdiag
from ..kernel.process import Identity
from ..kernel.rawpacket import Injector
from ..kernel.rules import HostRules

if TYPE_CHECKING:
    from . import in_place


@dataclass(frozen=True)
class Reclaimed:
    """What an earlier serve left with the program: nothing, the connection half-way (`sock`; `own` as of a Vessel), or
    one that is handed out already (`delivered`)."""

    sock: socket.socket | None = None
    own: bool = False
    delivered: bool = False


@dataclass(frozen=True)
class Ground:
    """What a way in may use while it makes ready: the pass's journal, this host's rules, a hand for packets; and the
    bytes that the program is to read before the peer's, with its answers dropped, or None. `admit` is asked about the
    program as soon as it is known, and again where it is another one: Refused where it may not have the connection."""

    journal: Journal
    rules: HostRules
    injector: Injector
    admit: Callable[[list[Taker]], None]
    prologue: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Vessel:
    """A socket without a connection, and the options that it has. `own`: it is the program's already, which shares its
    file status flags, and has set it up as it likes."""

    sock: socket.socket
    options: dict[str, OptionValue]
    own: bool


class Graft(Interface):
    """One way in, for one pass. `way`: what `find` takes to find it again. `taker`: the process that the connection is
    for; its number is 0 where it is not known here (another pid namespace), or not yet. `takers`: what is to be known
    of it, and before that of each that it could be."""

    @property
    def description(self) -> str: ...
    way: str
    taker: Identity
    stops: bool  # the program stands still from `vessel` on, until `activate` or `discard`

    def takers(self) -> list[Taker]: ...
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
    numbers = [part.isascii() and part.isdigit() and len(part) < 10 for part in rest.split(":")]
    known = {"auto": not colon, "receiver": bool(rest) == bool(colon), "accept": numbers == [True],
             "listen": numbers == [True] and 0 < int(rest) < 65536, "pid": numbers in ([True], [True, True])}
    if not known.get(kind, False) or "\0" in into:
        raise UsageError(f"--into {into[:80]}: not a way in that this version knows",
                         hint="auto, receiver[:PATH], accept:PID, listen:PORT or pid:PID[:FD]")


def process_in(into: str) -> int | None:
    """The process that `--into` names; None where it names none. UsageError as of `check_name`."""
    check_name(into)
    kind, _, rest = into.partition(":")
    return int(rest.split(":")[0]) if kind in ("accept", "pid") else None


def taker_of(pid: int, port: int | None) -> Taker:
    """What is to be known of this process."""
    return Taker(process.users(pid), process.executable(pid), port)


def find(into: str, flow: Flow) -> Graft:
    """The way that `--into` names. Refused says what is missing and what could be done; nothing is touched."""
    from . import in_place, to_accept, to_descriptor, to_new_descriptor, to_receiver, to_replaced
    check_name(into)
    kind, _, rest = into.partition(":")
    protocol = flow.protocol
    if kind == "receiver":
        return to_receiver.at_path(rest, protocol) if rest else to_receiver.for_port(flow.local.port, protocol)
    if kind in ("accept", "listen") and protocol is not Protocol.TCP:
        raise Refused(f"--into {kind}: in {protocol.label} a server accepts nothing that could become the connection",
                      hint="--into receiver[:PATH], or pid:PID[:FD] for a program that can be told of a descriptor")
    if kind == "accept":
        return to_accept.of_process(int(rest), flow)
    if kind == "listen":
        return to_accept.at_port(int(rest), flow)
    if kind == "pid":
        pid, colon, descriptor = rest.partition(":")
        if not colon:
            return to_new_descriptor.of_process(int(pid))
        in_place.check_program(int(pid))
        if not to_descriptor.is_tcp(int(pid), int(descriptor)):
            return to_replaced.at(int(pid), int(descriptor))
        if protocol is not Protocol.TCP:
            raise Refused(f"descriptor {descriptor} of {in_place.named(int(pid))} is a TCP socket, and the connection "
                          f"is {protocol.label}", hint="--into pid:PID makes a new descriptor")
        return to_descriptor.at(int(pid), int(descriptor), flow)
    port = flow.local.port
    found = to_receiver.try_port(port, protocol)
    if found is not None:
        return found
    if protocol is not Protocol.TCP:
        raise Refused(f"nothing at the destination takes connections of {to_receiver.name_of(port, protocol)}",
                      hint=f"an application there that makes {to_receiver.call_for(port, protocol)}; or --into "
                           "receiver:PATH or pid:PID[:FD]")
    if to_accept.listens(port):
        return to_accept.at_port(port, flow)
    raise Refused(f"nothing at the destination takes connections of port {port}",
                  hint=f"a server there that listens on port {port}; an application that makes "
                       f"criu_tcpcp.Receiver(port={port}); or --into listen:PORT, accept:PID or receiver:PATH")


def find_again(way: str, flow: Flow, journal: Journal) -> Graft:
    """The way that an earlier serve went for this pass. Refused where it is not there any more."""
    from . import in_place
    if in_place.ProgramSocket.of_journal(journal) is not None:
        return in_place.IntoProgram(way, frozenset())
    return find(way, flow)


def abandon(journal: Journal, rules: HostRules) -> None:
    """Take away what a serve that was killed has made in a program for a pass that is undone: for the program its
    connection ends, and nobody else hears of it. The fence must stand."""
    from . import in_place, throwaway
    taken = in_place.ProgramSocket.of_journal(journal) or _thrown_at_program(throwaway.thrown_flow(journal))
    if taken is not None:
        staged = journal.field("staged")
        taken.end(unless_untouched=staged is not None and str(staged["way"]).startswith("pid:"))
    throwaway.clear(journal, rules)


def _thrown_at_program(flow: Flow | None) -> in_place.ProgramSocket | None:
    from . import in_place
    entry = sockdiag.entry_of(flow) if flow is not None else None
    if entry is None or not entry.inode:
        return None
    return in_place.first_of(process.holders({entry.inode})[entry.inode], entry.inode, entry.cookie)


def forget(journal: Journal, rules: HostRules) -> None:
    """The pass is history: what stands for its throw-away connections goes."""
    from . import throwaway
    throwaway.unfence(journal, rules)
