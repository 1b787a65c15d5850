"""Connection tracking: what this host's firewall and NAT know of a connection (net/netfilter, ctnetlink).

A firewall that lets by what is `established` asks the table of connections, not the socket. At a new owner's host the
connection is in no table: its first packet is `new` to a firewall, or with nf_conntrack_tcp_loose=0 `invalid`, and is
dropped unless this host speaks first. So an entry is made before the connection comes alive:

    status      SEEN_REPLY, or every packet would still be `new`; ASSURED, or a full table would throw it out first
    TCP state   as the two FINs have it; the time-out is that of the state, from this network namespace's sysctls
    liberal     in both directions: what was sent until now is not known, and with nf_conntrack_tcp_be_liberal=0 a
                packet beyond the window that was seen last is `invalid`. At a host that had the connection before, and
                has still an entry, that is long ago.

The peer is made the side that opened it; which one did is not known, and no state depends on it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from ..core.endpoint import Endpoint, Flow, IPAddress, Protocol
from ..core.errors import KernelError
from . import netlink
from .netlink import attribute, attributes, be16, be32, nested
from .nftables import family

_SETTINGS = Path("/proc/sys/net/netfilter")
_DISCARD = 9  # any port will do (RFC 863): nothing listens
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

# linux/netfilter/nfnetlink_conntrack.h
_SUBSYSTEM, _NEW, _GET, _DELETE = 1, 0, 1, 2
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SOURCE, _IP_DESTINATION = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUMBER, _PROTO_SOURCE, _PROTO_DESTINATION = 1, 2, 3
_PROTOINFO_TCP, _TCP_STATE, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY = 1, 1, 4, 5

# linux/netfilter/nf_conntrack_common.h, nf_conntrack_tcp.h
_SEEN_REPLY, _ASSURED, _CONFIRMED = 1 << 1, 1 << 2, 1 << 3
_BE_LIBERAL = 0x08
#: TCP_CONNTRACK_..., and the sysctl of the state's time-out.
_ESTABLISHED, _CLOSE_WAIT, _LAST_ACK = (3, "established"), (5, "close_wait"), (6, "last_ack")
_TIMEOUTS_S = {"established": 5 * 86400, "close_wait": 60, "last_ack": 30}
_STREAM_S = 120  # nf_conntrack_udp_timeout_stream


@dataclass(frozen=True)
class Entry:
    """Of a connection: who sends to whom, in either direction, as the packets are before a NAT of this host."""

    original: tuple[Endpoint, Endpoint]
    reply: tuple[Endpoint, Endpoint]
    status: int
    tcp_state: int
    flags: tuple[int, int]

    @property
    def is_translated(self) -> bool:
        """A NAT of this host changes its addresses or ports."""
        return self.original != self.reply[::-1]

    @property
    def is_liberal(self) -> bool:
        return all(flags & _BE_LIBERAL for flags in self.flags)

    def outside(self, local: Endpoint) -> Endpoint:
        """What the other side takes the local end for."""
        return self.reply[1] if local == self.original[0] else self.original[1]

    def inside(self, seen: Endpoint) -> Endpoint:
        """Which end it is that the other side takes for that one."""
        return self.original[0] if seen == self.reply[1] else self.reply[0]

    def keeps(self, peer: Endpoint) -> bool:
        """That end is the same before and behind the NAT."""
        return peer in (self.original[0], self.reply[0]) and peer in (self.original[1], self.reply[1])


def is_at_work() -> bool:
    """In the calling thread's network namespace: it is loaded on many hosts, and works only where a rule has asked for
    it. Then it knows at least of a datagram that is sent here."""
    return knows_any() or any(_knows_datagram(*one) for one in _LOOPBACK)


def _knows_datagram(kind: int, address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect((address, _DISCARD))
        probe.send(b"")
        if knows_any():
            forget(Flow.of_socket(probe))
            return True
    return False


def knows_any() -> bool:
    """It has entries in the calling thread's network namespace: without a look at them."""
    return bool(_read("nf_conntrack_count"))


def is_strict() -> bool:
    """Packets of a connection whose beginning it has not seen are invalid to it, whatever nf_conntrack_tcp_be_liberal
    says (nf_conntrack_proto_tcp.c, tcp_new)."""
    return _read("nf_conntrack_tcp_loose") == 0


def _read(name: str) -> int | None:
    """None where the kernel has none of it."""
    try:
        return int((_SETTINGS / name).read_text())
    except (OSError, ValueError):
        return None


class Tracking:
    """The table of the network namespace of the thread that makes this; the default zone of it."""

    def __init__(self) -> None:
        self._wire = netlink.NetlinkSocket()

    def close(self) -> None:
        self._wire.close()

    def entry_of(self, flow: Flow) -> Entry | None:
        """By what either end sends: behind a NAT of this host's they are not each other's opposite."""
        for one in _ways_of(flow):
            try:
                return _entry(self._wire.get("conntrack: look for a connection", _SUBSYSTEM << 8 | _GET,
                                             family(flow.ip_version), one))
            except KernelError as error:
                if not netlink.is_missing(error):
                    raise
        return None

    def enter(self, flow: Flow, fins: int = 0) -> bool:
        """From now on its packets are those of an established connection, of which `fins` FINs were sent. True where
        there was no entry before. KernelError where this kernel does not do it."""
        is_new = self.entry_of(flow) is None
        state, name = (_ESTABLISHED, _CLOSE_WAIT, _LAST_ACK)[fins]
        timeout_s = _read(f"nf_conntrack_tcp_timeout_{name}") or _TIMEOUTS_S[name]
        parts = [_tuple(_TUPLE_ORIGINAL, flow.peer, flow.local, flow.protocol),
                 _tuple(_TUPLE_REPLY, flow.local, flow.peer, flow.protocol),
                 be32(_STATUS, _SEEN_REPLY | _ASSURED | _CONFIRMED)]
        if flow.protocol is Protocol.TCP:
            liberal = bytes([_BE_LIBERAL, _BE_LIBERAL])  # struct nf_ct_tcp_flags: the value, and what of it counts
            parts.append(nested(_PROTOINFO, nested(_PROTOINFO_TCP, attribute(_TCP_STATE, bytes([state])),
                                                   attribute(_TCP_FLAGS_ORIGINAL, liberal),
                                                   attribute(_TCP_FLAGS_REPLY, liberal))))
        else:
            timeout_s = _read("nf_conntrack_udp_timeout_stream") or _STREAM_S
        self._wire.request("conntrack: enter a connection", _SUBSYSTEM << 8 | _NEW, netlink.F_CREATE,
                           family(flow.ip_version), 0, b"".join([*parts, be32(_TIMEOUT, timeout_s)]))
        return is_new

    def remove(self, flow: Flow) -> bool:
        """False where there was no entry."""
        for one in _ways_of(flow):
            try:
                self._wire.request("conntrack: remove a connection", _SUBSYSTEM << 8 | _DELETE, 0,
                                   family(flow.ip_version), 0, one)
                return True
            except KernelError as error:
                if not netlink.is_missing(error):
                    raise
        return False


def forget(flow: Flow) -> None:
    """Take its entry away, where there is one; a kernel without this has none that were made."""
    if knows_any():
        with contextlib.suppress(KernelError), contextlib.closing(Tracking()) as tracking:
            tracking.remove(flow)


def entry_of(flow: Flow) -> Entry | None:
    """None, too, where this kernel does not tell."""
    if knows_any():
        with contextlib.suppress(KernelError), contextlib.closing(Tracking()) as tracking:
            return tracking.entry_of(flow)
    return None


def _ways_of(flow: Flow) -> list[bytes]:
    return [_tuple(_TUPLE_ORIGINAL, one, other, flow.protocol)
            for one, other in ((flow.local, flow.peer), (flow.peer, flow.local))]


def _tuple(kind: int, source: Endpoint, destination: Endpoint, protocol: Protocol) -> bytes:
    version = source.address.version
    return nested(kind,
                  nested(_TUPLE_IP, attribute(_IP_SOURCE[version], source.address.packed),
                         attribute(_IP_DESTINATION[version], destination.address.packed)),
                  nested(_TUPLE_PROTO, attribute(_PROTO_NUMBER, bytes([protocol])),
                         be16(_PROTO_SOURCE, source.port), be16(_PROTO_DESTINATION, destination.port)))


def _entry(data: bytes) -> Entry:
    found = dict(attributes(data))
    original, reply = (_ends(found[kind]) for kind in (_TUPLE_ORIGINAL, _TUPLE_REPLY))
    (status,) = struct.unpack(">I", found[_STATUS])
    info = dict(attributes(found.get(_PROTOINFO, memoryview(b""))))
    tcp = dict(attributes(info.get(_PROTOINFO_TCP, memoryview(b""))))
    state, *flags = (tcp[kind][0] if kind in tcp else 0
                     for kind in (_TCP_STATE, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY))
    return Entry(original, reply, status, state, (flags[0], flags[1]))


def _ends(data: memoryview) -> tuple[Endpoint, Endpoint]:
    found = dict(attributes(data))
    where, who = dict(attributes(found[_TUPLE_IP])), dict(attributes(found[_TUPLE_PROTO]))
    version = 4 if _IP_SOURCE[4] in where else 6
    addresses: list[IPAddress] = [ipaddress.ip_address(bytes(where[kind[version]]))
                                  for kind in (_IP_SOURCE, _IP_DESTINATION)]
    ports = [int.from_bytes(who[kind], "big") for kind in (_PROTO_SOURCE, _PROTO_DESTINATION)]
    return Endpoint(addresses[0], ports[0]), Endpoint(addresses[1], ports[1])
