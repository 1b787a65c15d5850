"""The packet rules of a pass: who owns which table, and how long it stands.

    table criu_tcpcp_hold_PID_N `flags owner`: gone with the keeper, whatever ends it
        held         prerouting -300   incoming packets of these connections wait in the keeper's packet queue, and
                                       `arrived` says that one came
        gate         output -301       a packet of the tool's own that no peer sends ends the hold if none came since
                                       the last such packet, and goes nowhere
        silent       output -300       what this host sends for these connections is dropped
    table criu_tcpcp_deaf_PID_N `flags owner`, in front of a NAT
        deaf         prerouting -302   what knocks for these connections, to try their way, goes no further
    table criu_tcpcp_carry_PID_N `flags owner`: gone with the process that carries packets (carrying.py)
        carried      output -299   what it sends, and the fence has not let by, is dropped
    table criu_tcpcp            stands until its last connection is released (criu_tcpcp_udp: those of UDP)
        tunnelled    prerouting -310   of what comes out of our tunnels (tunnel.py), only these connections go on, and
                                       of UDP those in a set beside it
        moved_*      prerouting -299   go to the next hop in the set's name, and no further
        sent_on      output -300       where conntrack is at work: it sees what `moved` sends, which else is untracked,
                                       and of which a firewall knows nothing
        fenced       prerouting -298   dropped, and dropped in output: this host does not speak for these connections;
                                        but what it sends in the name of the host that does (`CARRIED`) is let by
        diverted     prerouting -150   are for this host though their address is not: marked, so that a routing rule
                                       (routing.py) takes them to a local socket
        returning_*, returned_*        what the destination says goes back through the origin host (returning.py)

A packet released from the queue goes on *behind* `held`: where its connection is in a `moved` set by then, it takes the
same way as those that come later, so a switch is one element added, and nothing slips past both. That what waits goes
before what comes needs one more thing: the hold may end only at an instant at which nothing waits, and a command that
asks first and removes the element then is too late by some 0.1 ms. So the kernel asks itself, as a packet of ours goes
by (`gate`), some 0.02 ms after the queue was last emptied. Packets that the tool hands to a local socket carry `MARK`
and pass by all the rest. Of UDP the rules see whole datagrams only (`_whole`), which are cut again as they leave.

Elements live `LIFETIME_S` from their last packet, `CLOSING_S` once one of them carried FIN or RST: an idle connection
must not lose its rules, or the old host would answer the next packet with a RST. Nothing in UDP says that it ends: its
elements live on, and go once its socket is gone, with `release`.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Iterator

from ..core.endpoint import Endpoint, Flow, IPAddress, Protocol
from ..core.errors import KernelError
from . import conntrack, netlink, nftables
from .nftables import OUTPUT, PREROUTING, Chain, Component, Table
from .syscalls import failing

TABLE = "criu_tcpcp"
MARK = 0x7CB0C001
CARRIED = MARK + 1  # on what another host has made, and this one sends to the peer
COPIED = MARK + 2  # on the copies of returning.py: the fence lets them by, and no routing rule knows them
LIFETIME_S = 5 * 86400  # nf_conntrack_tcp_timeout_established
CLOSING_S = 600

_SWEEPS = 20  # by other commands, at the very moments at which something is added
TUNNELS = "tcpcpx"  # how the names of our tunnels' devices begin
RETURNING, RETURNED = "returning_", "returned_"
_FENCED, _DIVERTED, _MOVED, _SENT_ON, _TUNNELLED = "fenced", "diverted", "moved_", "sent_on", "tunnelled"
TUNNELLED_SETS = {Protocol.TCP: _TUNNELLED, Protocol.UDP: f"{_TUNNELLED}_udp"}
_ANYWHERE: dict[int, IPAddress] = {4: ipaddress.IPv4Address(0), 6: ipaddress.IPv6Address(0)}


def tunnels() -> list[str]:
    """Our tunnels' devices in the calling thread's network namespace, by name."""
    return [name for _index, name in socket.if_nameindex() if name.startswith(TUNNELS)]


def marks_are_inherited() -> bool:
    """In this network namespace an accepted socket carries the mark of the SYN (ip-sysctl: tcp_fwmark_accept), for IPv4
    and IPv6 alike: with `MARK`, whatever it sent would pass by the fence."""
    with failing("open tcp_fwmark_accept"), open("/proc/sys/net/ipv4/tcp_fwmark_accept") as setting:
        return setting.read().strip() != "0"


class Silence:
    """Nothing leaves this host for these connections, for as long as this object, or its process, lives."""

    def __init__(self, ip_version: int, protocol: Protocol = Protocol.TCP) -> None:
        self._wire = netlink.NetlinkSocket()
        self._table = Table(self._wire, f"{TABLE}_silent_{os.getpid()}_{self._wire.fileno()}", ip_version, protocol)
        try:
            self._table.create(nftables.TABLE_OWNER)
            self._table.install(_silent_component(self._table))
        except BaseException:
            self.close()
            raise

    def add(self, flow: Flow) -> None:
        self._table.add("silent", [flow])

    def remove(self, flow: Flow) -> bool:
        return self._table.remove("silent", flow)

    def close(self) -> None:
        """The kernel removes the table with its owner."""
        self._wire.close()


class Deafness:
    """Nobody at this host hears what knocks for one connection (rawpacket.py, `knock_at`), for as long as this object,
    or its process, lives. In front of a NAT: no packet without flags is of any connection to conntrack, so it would not
    be translated, and the host itself would answer it."""

    def __init__(self, flow: Flow) -> None:
        self._wire = netlink.NetlinkSocket()
        table = Table(self._wire, f"{TABLE}_deaf_{os.getpid()}_{self._wire.fileno()}", flow.ip_version, flow.protocol)
        try:
            table.create(nftables.TABLE_OWNER)
            table.install(Component(flow.ip_version, ("deaf",), (Chain("deaf", PREROUTING, -302, (
                nftables.is_knock(flow.protocol) + nftables.load_flow(flow.ip_version, flow.protocol)
                + nftables.in_set("deaf") + nftables.drop(),)),)))
            table.add("deaf", [flow])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The kernel removes the table with its owner."""
        self._wire.close()


class Gate:
    """What this process sends with the mark `CARRIED` leaves only for connections that this host is fenced off from,
    for as long as this object, or the process, lives. So what is still under way when a connection comes home is never
    heard after its new owner."""

    def __init__(self, ip_version: int) -> None:
        self._wire = netlink.NetlinkSocket()
        table = Table(self._wire, f"{TABLE}_carry_{os.getpid()}_{self._wire.fileno()}", ip_version)
        try:
            table.create(nftables.TABLE_OWNER)
            table.install(Component(ip_version, ("carried",), (
                Chain("carried", OUTPUT, -299, (nftables.mark_is(CARRIED) + nftables.drop(),)),)))
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """What has to stay open."""
        return self._wire.fileno()

    def close(self) -> None:
        self._wire.close()


class Hold:
    """Packets of the chosen connections wait, instead of reaching the socket; and nothing leaves for a connection that
    is silenced. Made before the freeze."""

    def __init__(self, ip_version: int, queue_number: int, protocol: Protocol = Protocol.TCP) -> None:
        self._wire = netlink.NetlinkSocket()
        self._table = Table(self._wire, f"{TABLE}_hold_{os.getpid()}_{self._wire.fileno()}", ip_version, protocol)
        self.queues = True
        try:
            self._table.create(nftables.TABLE_OWNER)
            self._install(queue_number)
            self._table.install(_silent_component(self._table))
        except BaseException:
            self.close()
            raise

    def _install(self, number: int) -> None:
        """By `queue`, the xt target, or dropping (the peer sends again)."""
        version, protocol = self._table.version, self._table.protocol
        load = nftables.load_flow(version, protocol)
        ours = nftables.mark_is(MARK) + nftables.is_knock(protocol) + load
        gate = Chain("gate", OUTPUT, -301, (
            ours + nftables.in_set("arrived") + nftables.take_out("arrived") + nftables.drop(),
            ours + nftables.take_out("held") + nftables.drop()))
        # Looked for again behind the note, or the gate could open between look-up and note.
        held = load + nftables.in_set("held") + nftables.put_in("arrived") + nftables.in_set("held")
        ways = (nftables.queue_natively(number), nftables.queue_by_xt(number), nftables.drop())
        taken = self._table.install_first([
            Component(version, ("held", "arrived"), (
                Chain("held", PREROUTING, -300, (nftables.mark_is(MARK) + nftables.accept(), held + way,
                                                 *_whole(version, protocol))), gate))
            for way in ways])
        self.queues = ways[taken] != nftables.drop()

    def add(self, flow: Flow) -> None:
        self._table.add("held", [flow])

    def is_held(self, flow: Flow) -> bool:
        return self._table.contains("held", flow)

    def remove(self, flow: Flow) -> bool:
        return self._table.remove("held", flow)

    def silence(self, flow: Flow) -> None:
        self._table.add("silent", [flow])

    def unsilence(self, flow: Flow) -> bool:
        return self._table.remove("silent", flow)

    def close(self) -> None:
        """The kernel removes the table with its owner."""
        self._wire.close()


def _output_drop(name: str, set_name: str, version: int, protocol: Protocol, *more: bytes) -> Chain:
    """What this host sends for the connections in the set is dropped, but for what the tool itself sends. `more`: rules
    in front of that."""
    return Chain(name, OUTPUT, -300, (
        nftables.mark_is(MARK) + nftables.accept(), nftables.mark_is(COPIED) + nftables.accept(), *more,
        nftables.load_flow(version, protocol, outgoing=True) + nftables.in_set(set_name) + nftables.drop()))


def _silent_component(table: Table) -> Component:
    """The fence decides about what is carried: a hold may last a little longer than the pass."""
    return Component(table.version, ("silent",), (_output_drop("silent", "silent", table.version, table.protocol,
                                                               nftables.mark_is(CARRIED) + nftables.accept()),))


# The lasting components. Making one takes longer than adding an element to it: each is made once.

@functools.cache
def _fence_component(version: int, protocol: Protocol) -> Component:
    return Component(version, (_FENCED,), (
        Chain("fence_input", PREROUTING, -298, (
            nftables.mark_is(MARK) + nftables.accept(),
            nftables.load_flow(version, protocol) + nftables.in_set(_FENCED) + nftables.refresh(_FENCED, LIFETIME_S)
            + nftables.drop(), *_whole(version, protocol))),
        _output_drop("fence_output", _FENCED, version, protocol,
                     nftables.mark_is(CARRIED) + nftables.load_flow(version, protocol, outgoing=True)
                     + nftables.in_set(_FENCED) + nftables.refresh(_FENCED, LIFETIME_S) + nftables.set_mark(MARK)
                     + nftables.accept())))


@functools.lru_cache(maxsize=64)
def _moved_component(version: int, protocol: Protocol, nexthop: IPAddress, interface: int,
                     name: str = "") -> Component:
    away = nftables.duplicate(nexthop.packed, interface) + nftables.drop()
    return living_component(version, protocol, name or way_name(_MOVED, nexthop, interface), -299, away)


def way_name(prefix: str, nexthop: IPAddress, interface: int) -> str:
    """Of the set of those that go this way."""
    return f"{prefix}{str(nexthop).replace('.', '_').replace(':', '_')}_if{interface}"


@functools.cache
def _sent_on_component(version: int, protocol: Protocol) -> Component:
    """A copy that `dup` makes is untracked (net/ipv4/netfilter/nf_dup_ipv4.c)."""
    return Component(version, (_SENT_ON,), (Chain(_SENT_ON, OUTPUT, -300, (
        nftables.load_flow(version, protocol) + nftables.in_set(_SENT_ON) + nftables.refresh(_SENT_ON, LIFETIME_S)
        + nftables.track_again(),)),))


@functools.cache
def _divert_component(version: int, protocol: Protocol) -> Component:
    return living_component(version, protocol, _DIVERTED, -150, nftables.set_mark(MARK) + nftables.accept())


def living_component(version: int, protocol: Protocol, name: str, priority: int, way: bytes, *, hook: int = PREROUTING,
                     outgoing: bool = False, first: tuple[bytes, ...] = ()) -> Component:
    """Packets from the peers of the connections in the set `name` (`outgoing`: to them) go the way, and their elements
    live as long as they come; shorter once one has said that its connection ends, where the protocol has a word for
    that. `first`: rules in front."""
    closing = f"{name}_closing"
    load = nftables.load_flow(version, protocol, outgoing=outgoing)
    short = nftables.refresh(name, CLOSING_S) + nftables.refresh(closing, CLOSING_S)
    ending = (load + nftables.in_set(closing) + short + way,
              load + nftables.in_set(name) + nftables.ends_connection() + short + way)
    return Component(version, (name, closing), (Chain(name, hook, priority, (
        nftables.mark_is(MARK) + nftables.accept(), *first,
        *(ending if protocol is Protocol.TCP else ()),
        load + nftables.in_set(name) + nftables.refresh(name, LIFETIME_S) + way,
        *(_whole(version, protocol) if hook == PREROUTING else ()))),))


def _whole(version: int, protocol: Protocol) -> tuple[bytes, ...]:
    """A last rule, for a protocol whose packets come in fragments, of which only the first names the ports."""
    if protocol is Protocol.TCP or not reassembles(version):
        return ()
    return (nftables.accept() + nftables.reassemble(version),)


@functools.cache
def reassembles(ip_version: int) -> bool:
    """This kernel can be made to put fragments together before our rules see them."""
    return _takes(ip_version, PREROUTING, nftables.accept() + nftables.reassemble(ip_version))


@functools.cache
def can_track_again(ip_version: int) -> bool:
    """This kernel knows the rule; where it does, conntrack is at work for a moment."""
    return _takes(ip_version, OUTPUT, nftables.track_again())


def _takes(ip_version: int, hook: int, rule: bytes) -> bool:
    wire = netlink.NetlinkSocket()
    try:
        table = Table(wire, f"{TABLE}_tried_{os.getpid()}_{wire.fileno()}", ip_version)
        table.create(nftables.TABLE_OWNER)
        table.install(Component(ip_version, ("tried",), (Chain("tried", hook, -300, (rule,)),)))
        return True
    except KernelError:
        return False
    finally:
        wire.close()


@functools.cache
def _tunnelled_component(version: int) -> Component:
    """A tunnel's other end can wrap what it likes, from whomever: nothing else of it comes in. What is for the link
    itself may: by that the tunnel is tried. One for all protocols, since what it does not know goes no further."""
    ours = nftables.comes_by(TUNNELS)
    return Component(version, tuple(TUNNELLED_SETS.values()), (Chain(_TUNNELLED, PREROUTING, -310, (
        ours + nftables.is_for_link_local(version) + nftables.accept(),
        *(ours + nftables.load_flow(version, protocol) + nftables.in_set(name) + nftables.refresh(name, LIFETIME_S)
          + nftables.accept() for protocol, name in TUNNELLED_SETS.items()),
        ours + nftables.drop())),))


class HostRules:
    """The lasting table of one IP version and protocol, in the network namespace of the thread that makes this."""

    def __init__(self, ip_version: int, protocol: Protocol = Protocol.TCP, tracks: bool | None = None) -> None:
        """`tracks`: whether conntrack is to see what is sent on; None: where it is at work."""
        self.version, self.protocol = ip_version, protocol
        self._tracks = tracks
        self._wire = netlink.NetlinkSocket()
        self._table = self._table_of(protocol)
        self._guard = Table(self._wire, TABLE, ip_version, protocol)  # what is of one protocol and kept for all

    @property
    def table(self) -> Table:
        """For rules that have a file of their own."""
        return self._table

    @property
    def guard(self) -> Table:
        return self._guard

    def _table_of(self, protocol: Protocol) -> Table:
        suffix = "" if protocol is Protocol.TCP else f"_{protocol.label}"
        return Table(self._wire, f"{TABLE}{suffix}", self.version, protocol)

    def close(self) -> None:
        self._wire.close()

    # -- fence: this host does not speak for the connection, and does not hear it -------------------------------------

    def prepare_fence(self) -> None:
        """Make what `fence` needs, so that within the freeze it is one element. The first removal of an element in a
        network namespace takes 2 ms, all later ones 0.1: it is done here, on a connection that nobody has."""
        nobody = Flow(Endpoint(_ANYWHERE[self.version], os.getpid() % 65535 + 1), Endpoint(_ANYWHERE[self.version], 1),
                      protocol=self.protocol)
        self._add(_fence_component(self.version, self.protocol), nobody)
        self._table.remove(_FENCED, nobody)

    def fence(self, flow: Flow) -> None:
        self._add(_fence_component(self.version, self.protocol), flow)

    def is_fenced(self, flow: Flow) -> bool:
        return self._table.contains(_FENCED, flow)

    def unfence(self, flow: Flow) -> bool:
        return self._table.remove(_FENCED, flow)

    # -- moved: packets go to another host ----------------------------------------------------------------------------

    def prepare_move(self, nexthop: IPAddress, interface: int) -> str:
        """Make what `move` needs for this next hop on this link; returns the name of the set."""
        component = _moved_component(self.version, self.protocol, nexthop, interface)
        self._install(component)
        if self.is_tracking():
            self._install(_sent_on_component(self.version, self.protocol))
        return component.sets[0]

    def move(self, flow: Flow, nexthop: IPAddress, interface: int) -> None:
        if self.is_tracking():
            self._add(_sent_on_component(self.version, self.protocol), flow)
        self._add(_moved_component(self.version, self.protocol, nexthop, interface), flow)

    @staticmethod
    def is_set_of(name: str, nexthop: IPAddress, interface: int) -> bool:
        """One of those that say that it goes there."""
        return name.removesuffix("_closing") == way_name(_MOVED, nexthop, interface)

    def is_tracking(self) -> bool:
        """This kernel can have conntrack see what is sent on, and it is at work."""
        if self._tracks is None:
            self._tracks = conntrack.knows_any() and can_track_again(self.version)
        return self._tracks

    def moves_of(self, flow: Flow) -> list[str]:
        """The sets that say where it goes: each behind its `_closing` one, which a FIN may put it into at
        any time, and which would put it back into the first."""
        return [part for name in self._table.set_names() if name.startswith(_MOVED) and not name.endswith("_closing")
                and (self._table.contains(name, flow) or self._table.contains(f"{name}_closing", flow))
                for part in (f"{name}_closing", name)]

    def stay(self, flow: Flow, names: Iterable[str] | None = None) -> bool:
        """No longer moved anywhere. `names`: an earlier result of `moves_of`."""
        found = self.turn_from(flow, self.moves_of(flow) if names is None else names)
        self._table.remove(_SENT_ON, flow)
        return found

    def turn_from(self, flow: Flow, names: Iterable[str]) -> bool:
        """It goes by these ways no longer, and by another now. `names`: as of `stay`."""
        found = [self._table.remove(name, flow) for name in names]
        return any(found)

    def take_over(self, flow: Flow, names: Iterable[str]) -> None:
        """`unfence` a connection that is fenced, and `stay`, at once. `names`: the result of `moves_of`."""
        here = [_FENCED, *(name for name in names if self._table.contains(name, flow))]
        try:
            self._table.remove_all(here, flow)
        except KernelError as error:
            if not netlink.is_missing(error):
                raise
            self.unfence(flow)
            self.stay(flow)

    def is_moved(self, flow: Flow) -> bool:
        return bool(self.moves_of(flow))

    def moved_elsewhere(self, address: IPAddress, nexthop: IPAddress | None, interface: int) -> list[Flow]:
        """The connections of this local address, of all protocols, that go to other next hops than this one."""
        here = _moved_component(self.version, self.protocol, nexthop, interface).sets[0] if nexthop else ""
        tables = map(self._table_of, Protocol)
        return [flow for table in tables for name in table.set_names()
                if name.startswith(_MOVED) and not name.endswith("_closing") and name != here
                for flow in table.flows(name) if flow.local.address == address]

    # -- divert: packets for an address that this host does not have --------------------------------------------------

    def divert(self, flow: Flow) -> None:
        self._add(_divert_component(self.version, self.protocol), flow)

    def is_diverted(self, flow: Flow) -> bool:
        return self._table.contains(_DIVERTED, flow)

    def undivert(self, flow: Flow) -> bool:
        return self._remove(flow, _DIVERTED)

    def diverted_addresses(self) -> set[IPAddress]:
        """The local addresses that a routing rule is needed for, whatever is spoken there."""
        return {flow.local.address for protocol in Protocol for flow in self._table_of(protocol).flows(_DIVERTED)}

    # -- tunnelled: out of a tunnel of ours comes nothing but these connections ----------------------------------------

    def guard_tunnels(self) -> None:
        """Before there is one."""
        self._install(_tunnelled_component(self.version), self._guard)

    def let_out(self, flow: Flow) -> None:
        component, name = _tunnelled_component(self.version), TUNNELLED_SETS[self.protocol]
        self.though_swept(lambda: self._guard.add(name, [flow], LIFETIME_S),
                          lambda: self._install(component, self._guard))

    def keep_in(self, flow: Flow) -> bool:
        return self._guard.remove(TUNNELLED_SETS[self.protocol], flow)

    # -- all ----------------------------------------------------------------------------------------------------------

    def _install(self, component: Component, table: Table | None = None) -> None:
        def install() -> None:
            (table or self._table).create()
            (table or self._table).install(component)
        self.though_swept(install, install)

    def _add(self, component: Component, flow: Flow) -> None:
        """One transaction where the component is installed, as it is within a freeze."""
        self.though_swept(lambda: self._table.add(component.sets[0], [flow], LIFETIME_S),
                          lambda: self._install(component))

    @staticmethod
    def though_swept(attempt: Callable[[], None], repair: Callable[[], None]) -> None:
        """Another command may remove what is empty at any instant: then it is made again."""
        for _ in range(_SWEEPS):
            try:
                attempt()
                return
            except KernelError as error:
                if not netlink.is_missing(error):
                    raise
            with contextlib.suppress(KernelError):
                repair()
        attempt()

    def _remove(self, flow: Flow, prefix: str) -> bool:
        """From every set with this prefix; first from that of connections that are closing, which would put it back."""
        names = [name for name in self._table.set_names() if name.startswith(prefix)]
        found = [self._table.remove(name, flow) for name in sorted(names, key=lambda one: not one.endswith("_closing"))]
        return any(found)

    def flows(self) -> dict[str, list[Flow]]:
        """What stands: set name -> connections, for `passes` and `release`."""
        found = {name: flows for name in self._table.set_names() if not name.endswith("_closing")
                 and name not in TUNNELLED_SETS.values() and (flows := self._table.flows(name))}
        tunnelled = self._guard.flows(TUNNELLED_SETS[self.protocol])
        return found | ({_TUNNELLED: tunnelled} if tunnelled else {})

    def sweep(self) -> bool:
        """Remove what no connection needs; True when nothing stands any more. Safe beside other commands: a component
        with a connection in it stays."""
        for name in self._table.set_names():
            if name.endswith("_closing"):
                continue
            if name == _FENCED:
                self._table.remove_if_unused(_fence_component(self.version, self.protocol))
            elif name == _SENT_ON:
                self._table.remove_if_unused(_sent_on_component(self.version, self.protocol))
            elif name == _DIVERTED:
                self._table.remove_if_unused(_divert_component(self.version, self.protocol))
            elif name.startswith((_MOVED, RETURNING, RETURNED)):  # by names only, which are made alike
                self._table.remove_if_unused(
                    _moved_component(self.version, self.protocol, _ANYWHERE[self.version], 1, name))
        if not tunnels():
            self._guard.remove_if_unused(_tunnelled_component(self.version))
            self._guard.delete_if_unused()
        return self._table.delete_if_unused()


@contextlib.contextmanager
def host_rules(ip_version: int, protocol: Protocol = Protocol.TCP) -> Iterator[HostRules]:
    rules = HostRules(ip_version, protocol)
    try:
        yield rules
    finally:
        rules.close()
