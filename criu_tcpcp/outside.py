"""A connection of a container that sits behind its host: where its packets can be had, and by which addresses.

    peer ──► HOST:8080 ── prerouting: hold, moved ── conntrack, NAT ──► bridge or veth ──► CONTAINER:80, socket
             the outside flow, in the host's network namespace          the inner flow, in the container's

Hold and redirect work outside, in front of the host's NAT: what goes to another host goes as the peer sent it, so the
connection is passed under the address by which the peer knows it, and nobody else needs to know of the NAT. What is of
the socket (stop, fence, extract, restore, graft) works inside. A connection that comes home finds its way back by the
host's own entry in conntrack. One whose address is neither the host's nor the container's is led into the container by
the host, next hop by next hop, as one host sends on to another (`relay`); the host has an entry for it, which keeps
what the container answers from being masqueraded.

Of UDP, whose entries conntrack forgets after minutes without a packet, nothing of this is done.

A container with a link of its own to the network, which its host does not route for, needs none of this.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .core.endpoint import Flow, IPAddress, Protocol
from .core.errors import KernelError, ProtocolError, Refused
from .core.refusals import Refusal
from .journal import Journal
from .kernel import conntrack, netns, routing
from .kernel.rules import Deafness, HostRules

FIELD = "outside"
_STRICT = 1  # of rp_filter


@dataclass(frozen=True)
class Relay:
    """The container as the host sees it."""

    address: IPAddress
    interface: int


class Outside:
    """Of one connection. `flow`: as the peer's packets have it in front of the host; `inner`: as its socket has it;
    `namespace`: a descriptor of the host's, this object's. `relay`: where the host has to be told to lead it."""

    def __init__(self, flow: Flow, inner: Flow, namespace: int, relay: Relay | None = None) -> None:
        self.flow, self.inner, self.relay = flow, inner, relay
        self._namespace = namespace
        self._deafness: Deafness | None = None

    @property
    def is_translated(self) -> bool:
        return self.flow != self.inner

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """The calling thread is in front of the container."""
        with netns.enter(self._namespace):
            yield

    def rules(self) -> HostRules:
        """Those of the host. What it sends on is not shown to conntrack where that would translate it once more."""
        with self.enter():
            return HostRules(self.flow.ip_version, self.flow.protocol, tracks=False if self.is_translated else None)

    def ignore_knocks(self) -> None:
        """Until `close`, where the host would answer them in the connection's name."""
        if self.is_translated and self._deafness is None:
            with self.enter():
                self._deafness = Deafness(self.flow)

    def leads_in(self, name: str) -> bool:
        """Of a set that says where the connection goes: into the container."""
        return self.relay is not None and HostRules.is_set_of(name, self.relay.address, self.relay.interface)

    def to_json(self) -> dict[str, Any]:
        with self.enter():
            return {"flow": self.flow.to_json(), "network": list(netns.own()),
                    "relay": [str(self.relay.address), self.relay.interface] if self.relay is not None else None}

    def close(self) -> None:
        if self._deafness is not None:
            self._deafness.close()
        if self._namespace != -1:
            os.close(self._namespace)
            self._namespace = -1


def at_origin(flow: Flow, host: int) -> Outside | None:
    """`host`: a descriptor of the namespace in which the command was typed; the calling thread is in the program's.
    None where the packets do not pass there. Refused where they come in a form that cannot be carried."""
    if _is_own(host):
        return None
    behind = _behind(flow, host) if flow.protocol is Protocol.TCP else None
    with netns.enter(host):
        entry = conntrack.entry_of(flow)
        if routing.is_local(flow.peer.address):
            raise Refused(f"the connection {flow} has the peer {flow.peer}, which is on the container's host itself",
                          refusal=Refusal.LOCAL_PEER, hint="a proxy there hides the peer: DNAT does not")
    if entry is None or not entry.is_translated:
        return Outside(flow, flow, os.dup(host)) if behind is not None else None
    if behind is None or not entry.keeps(flow.peer):
        raise Refused(f"a NAT of the host translates {flow}, and not only the address of a container behind it, in TCP",
                      refusal=Refusal.NAT)
    return Outside(replace(flow, local=entry.outside(flow.local)), flow, os.dup(host))


def at_destination(flow: Flow, host: int) -> Outside | None:
    """As of the other, for a connection that comes: `flow` is the outside's."""
    if _is_own(host):
        return None
    behind = _behind(flow, host) if flow.protocol is Protocol.TCP else None
    if behind is None:
        return None
    with netns.enter(host):
        entry = conntrack.entry_of(flow)
        is_hosts = routing.is_local(flow.local.address)
    if entry is not None and entry.is_translated:
        inner = entry.inside(flow.local)
        if not entry.keeps(flow.peer) or not routing.is_local(inner.address):
            raise Refused(f"a NAT of the destination's host translates {flow}, and not to this container",
                          refusal=Refusal.NAT)
        return Outside(flow, replace(flow, local=inner), os.dup(host))
    if routing.is_local(flow.local.address):
        return Outside(flow, flow, os.dup(host))
    if is_hosts:
        raise Refused(f"{flow.local.address} is an address of the container's host, and no NAT there leads the "
                      "connection into the container", refusal=Refusal.NAT)
    _refuse_host_that_does_not_lead(flow, behind, host)
    return Outside(flow, flow, os.dup(host), behind)


def of_journal(journal: Journal) -> Outside | None:
    """As an earlier process had it; None, too, where that namespace has gone."""
    first = journal.field("intent") or journal.field("staged")
    if first is None or not first.get(FIELD):
        return None
    said = first[FIELD]
    try:
        device, inode = map(int, said["network"])
        flow = Flow.from_json(said["flow"])
        relay = Relay(ipaddress.ip_address(said["relay"][0]), int(said["relay"][1])) if said["relay"] else None
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not the outside of a connection: {error}") from None
    namespace = netns.find((device, inode))
    return Outside(flow, Flow.from_json(first["flow"]), namespace, relay) if namespace is not None else None


@contextlib.contextmanager
def rules_of(journal: Journal) -> Iterator[tuple[HostRules, Outside] | None]:
    """Of a pass of a connection behind this host: the thread is outside. None where it has no outside, or none any
    more."""
    found = of_journal(journal)
    if found is None:
        yield None
        return
    with contextlib.closing(found), contextlib.closing(found.rules()) as rules, found.enter():
        yield rules, found


def _is_own(host: int) -> bool:
    return netns.identity(f"/proc/self/fd/{host}") == netns.own()


def _behind(flow: Flow, host: int) -> Relay | None:
    """The container speaks to the peer by way of its host, and the host finds it on a link. The calling thread is in
    the container's namespace."""
    try:
        gateway = routing.way_to(flow.peer.address).gateway
        address = routing.source_towards(flow.peer.address)
        with netns.enter(host):
            if gateway is None or not routing.is_local(gateway):
                return None
            hop = routing.way_to(address)
    except KernelError:  # there is no way
        return None
    return Relay(address, hop.interface) if hop.gateway is None and not hop.local else None


def _refuse_host_that_does_not_lead(flow: Flow, relay: Relay, host: int) -> None:
    """What the container answers comes to its host with an address that lies elsewhere."""
    with netns.enter(host):
        family = f"ipv{flow.ip_version}"
        if not _setting(f"{family}/conf/all/forwarding"):
            raise Refused("the container's host forwards nothing", hint=f"there: sysctl net.{family}.conf.all."
                          "forwarding=1")
        name = routing.interface_name(relay.interface)
        if flow.ip_version == 4 and max(_setting("ipv4/conf/all/rp_filter"),
                                        _setting(f"ipv4/conf/{name}/rp_filter")) == _STRICT:
            raise Refused(f"the container's host takes nothing from {name} whose address lies elsewhere (rp_filter)",
                          hint=f"there: sysctl net.ipv4.conf.{name}.rp_filter=2")


def _setting(name: str) -> int:
    return int(Path("/proc/sys/net", name).read_text())
