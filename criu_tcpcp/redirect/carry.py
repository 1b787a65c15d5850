"""`carry`: the packets travel through the SSH channel, for hosts that can only reach each other by that.

    peer ──► gateway ──► origin host ══ the SSH channel ══► destination host
    peer ◄── gateway ◄── origin host ◄═════════════════════ destination host

Both ends are TUN devices (kernel/channel.py), made while staging and led into as into any next hop: until the handoff
is over the packets wait there, and then two processes carry them (carrying.py). To the rules it is `forward`.
"""

from __future__ import annotations

import contextlib

from ..core.endpoint import Flow, Protocol
from ..core.errors import KernelError, Refused
from ..core.refusals import Refusal
from ..journal import LAID, TUNNEL, Journal, structure_lock
from ..kernel import channel, routing, tunnel
from ..kernel.channel import Channel, Sender
from ..kernel.rules import Gate, host_rules
from . import CARRY, Plan


class End:
    """The origin's: the device, and how packets go to the peer."""

    def __init__(self, channel: Channel, flow: Flow) -> None:
        self.channel = channel
        with contextlib.ExitStack() as undo:
            undo.callback(channel.close)
            self._gate = Gate(flow.ip_version)
            undo.callback(self._gate.close)
            self.sender = Sender(flow)
            undo.pop_all()

    def descriptors(self) -> set[int]:
        """What a fork needs that goes on with it."""
        return {one.fileno() for one in (self.channel, self._gate, self.sender)}

    def close(self) -> None:
        for one in (self.channel, self._gate, self.sender):
            one.close()


def lay_at_origin(journal: Journal, flow: Flow) -> End:
    """This end, in the calling thread's network namespace."""
    if flow.protocol is not Protocol.TCP:
        raise Refused("only the packets of TCP connections travel through the SSH channel")
    with structure_lock():
        if journal.exists():  # not in a rehearsal
            journal.write(TUNNEL, tunnel=channel.name_of(journal.pass_id))
        laid = _made(journal, channel.MTU)
    channel.lead_in(laid.name, flow.ip_version)
    return End(laid, flow)


def lay_at_destination(journal: Journal, flow: Flow, mtu: int, origin_boot: str, origin_network: list[int]) -> Channel:
    """This end, in the calling thread's network namespace: of the connection, and nothing else, packets go in and come
    out."""
    if flow.protocol is not Protocol.TCP:
        raise Refused("only the packets of TCP connections travel through the SSH channel")
    if flow.ip_version == 4 and tunnel.strict_source_checks():
        raise Refused("rp_filter of the destination drops what the SSH channel brings",
                      hint="there: sysctl net.ipv4.conf.all.rp_filter=0, or 2")
    with structure_lock():
        journal.write(TUNNEL, tunnel=channel.name_of(journal.pass_id))
        journal.write(LAID, mtu=mtu, origin_boot=origin_boot, origin_network=origin_network)
        with host_rules(flow.ip_version, flow.protocol) as rules:
            rules.guard_tunnels()
            rules.let_out(flow)
        laid = _made(journal, mtu)
    laid.lead_out(flow)
    return laid


def plan(laid: Channel, flow: Flow, why: str) -> Plan:
    return Plan(CARRY, why, channel.next_hop(laid.name, flow.ip_version), laid.index)


def back_home(flow: Flow, name: str, index: int) -> Plan:
    """To the host from which the packets of this connection are carried to this one: what was held goes back by the
    same way, and nothing comes after it."""
    return Plan("none", f"{flow.local.address} is an address of the destination, which carries the packets here",
                channel.lead_in(name, flow.ip_version), index)


def open_again(journal: Journal, flow: Flow) -> Channel:
    """Either end, of which another process has let go."""
    laid = journal.field(LAID)
    again = _made(journal, laid["mtu"] if laid is not None else channel.MTU)
    if laid is not None:
        again.lead_out(flow)
    else:
        channel.lead_in(again.name, flow.ip_version)
    return again


def _made(journal: Journal, mtu: int) -> Channel:
    try:
        return Channel(channel.name_of(journal.pass_id), mtu)
    except KernelError as error:
        raise Refused(f"the packets cannot travel through the SSH channel: {error.message}",
                      hint="a kernel with TUN devices is needed at both hosts") from error


def mtu_of_way(flow: Flow, learnt: int) -> int:
    """Of the way from this host to the peer, bytes. `learnt`: by the connection itself (RFC 1191, RFC 8201)."""
    link = routing.mtu_towards(flow.peer.address)
    return min(link, learnt) if learnt else link


def refuse_without_route(no_route: str) -> None:
    """`no_route`: what the destination says of its way to the peer; nothing where it has one."""
    if no_route:
        raise Refused(no_route, refusal=Refusal.NO_ROUTE)
