"""VXLAN devices between two hosts (RFC 7348), one for each pair of them, by rtnetlink.

Both ends follow from the two hosts' addresses alone, so nobody has to ask for a number: the network identifier, the
device's name, the hardware addresses, and of IPv4 the link-local ones. The neighbour is entered for good: nothing is
broadcast, and nothing waits for an answer.

What goes in has been on a link of the origin's, whose full-size packets, which may not be fragmented, are longer than
the path allows once they are wrapped. So it is the outside that is fragmented: the device's MTU is large, the outer
header has no DF (IFLA_VXLAN_DF, unset by default), and the route to the neighbour has its MTU locked, or each such
packet would lower it (net/ipv4/ip_tunnel_core.c, skb_tunnel_check_pmtu), and the peer be told. IPv6 knows no such lock
(net/ipv6/route.c, __ip6_rt_update_pmtu); but there it is lowered for the address that the packet is for, and not for
the next hop, unless that is the same: hence the large packet of `answers` goes to an address of its own.

Over IPv6 the outside is not fragmented: what is too long is lost, and this host told of it (net/ipv6/ip6_output.c,
ip6_fragment; seen on Linux 6.18). There the path has to be wide enough.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.endpoint import IPAddress
from .checksums import checksum
from .routing import rtnetlink, tolerating
from .rules import TUNNELS
from .syscalls import failing

PORT = 4789  # UDP, IANA's for VXLAN
MTU = 65000  # bytes; vxlan_change_mtu takes up to IP_MAX_MTU less the headers
_IFA_F_NODAD, _RT_SCOPE_LINK, _NUD_PERMANENT = 0x02, 253, 0x80  # linux/if_addr.h, rtnetlink.h, neighbour.h
_RTAX_LOCK_MTU = 1 << 2  # linux/rtnetlink.h, RTAX_MTU
#: Of the addresses of an end: the next hop of packets that are sent on, and the one that is tried.
_PACKETS, _TRIAL = _USES = ("packets", "trial")
_ECHO = struct.Struct(">BBHHH")  # type, code, checksum, identifier, sequence number
_TRIES = 4


@dataclass(frozen=True)
class Tunnel:
    """One end: this host's address and the other's, in the network that lies between them."""

    here: IPAddress
    there: IPAddress

    @property
    def identifier(self) -> int:
        """VXLAN network identifier, 24 bits, the same at both ends."""
        both = sorted((self.here.packed, self.there.packed))
        return int.from_bytes(hashlib.sha256(b"|".join(both)).digest()[:3], "big") or 1

    @property
    def name(self) -> str:
        """Of the device, at both ends."""
        return f"{TUNNELS}{self.identifier:06x}"

    def hardware(self, address: IPAddress) -> str:
        """Of the end with this address: a locally administered one."""
        return "02:" + hashlib.sha256(b"criu-tcpcp" + address.packed).digest()[:5].hex(":")

    def inner(self, address: IPAddress, version: int, use: str) -> IPAddress:
        """A link-local address of the end with this outer address (RFC 3927 2.1, RFC 4291 2.5.6); `use`: one of
        `_USES`."""
        number = hashlib.sha256(f"{use}{self.identifier}".encode() + address.packed).digest()
        if version == 6:
            return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + number[:8])
        return ipaddress.IPv4Address(bytes([169, 254, 1 + number[0] % 254, number[1]]))

    def next_hop(self, version: int) -> IPAddress:
        return self.inner(self.there, version, _PACKETS)

    def make(self) -> int:
        """The device, with its neighbour, in the calling thread's network namespace; returns its index. Idempotent.
        KernelError where this kernel has no VXLAN (EOPNOTSUPP)."""
        outer = "vxlan_local" if self.here.version == 4 else "vxlan_local6"
        other = "vxlan_group" if self.here.version == 4 else "vxlan_group6"
        with rtnetlink("make a VXLAN device") as route:
            with tolerating(errno.EEXIST):
                route.link("add", ifname=self.name, kind="vxlan", vxlan_id=self.identifier, vxlan_port=PORT,
                           vxlan_learning=0, address=self.hardware(self.here), mtu=MTU,
                           **{outer: str(self.here), other: str(self.there)})
            index = int(route.link_lookup(ifname=self.name)[0])
            self._let_in()
            route.link("set", index=index, state="up")
            for version in (4, 6):
                for use in _USES:
                    self._lead(route, index, self.inner(self.here, version, use), self.inner(self.there, version, use))
        return index

    def _lead(self, route: Any, index: int, ours: IPAddress, theirs: IPAddress) -> None:
        family = socket.AF_INET if ours.version == 4 else socket.AF_INET6
        with tolerating(errno.EEXIST):
            route.addr("add", index=index, family=family, address=str(ours), prefixlen=ours.max_prefixlen,
                       **({"flags": _IFA_F_NODAD} if ours.version == 6 else {}))
        with tolerating(errno.EEXIST):
            route.route("add", family=family, dst=f"{theirs}/{theirs.max_prefixlen}", oif=index,
                        **({"scope": _RT_SCOPE_LINK} if ours.version == 4 else {}),
                        metrics={"mtu": MTU, "lock": _RTAX_LOCK_MTU})
        route.neigh("replace", family=family, ifindex=index, dst=str(theirs), lladdr=self.hardware(self.there),
                    state=_NUD_PERMANENT)

    def _let_in(self) -> None:
        """What comes out of it comes from a peer to which another interface leads."""
        with failing("open rp_filter"):
            Path(f"/proc/sys/net/ipv4/conf/{self.name}/rp_filter").write_text("0\n")

    def answers(self, version: int, size: int, timeout_s: float) -> bool:
        """The other end takes a packet of `size` bytes, IP header included, and sends as much back: an echo (RFC 792,
        RFC 4443 4.1), asked for up to `_TRIES` times."""
        number = os.getpid() & 0xFFFF
        header, protocol, ask, answer = (20, socket.IPPROTO_ICMP, 8, 0) if version == 4 \
            else (40, socket.IPPROTO_ICMPV6, 128, 129)
        body = bytes(size - header - _ECHO.size)
        request = _ECHO.pack(ask, 0, 0, number, 1) + body
        if version == 4:  # of ICMPv6 the kernel makes the checksum itself
            request = _ECHO.pack(ask, 0, checksum(request), number, 1) + body
        with failing("probe a VXLAN device"), socket.socket(
                socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.name.encode())
            index, length = socket.if_nametoindex(self.name), 2 if version == 4 else 4
            # From the address for trials, too: else the answer may be for that of the packets, and lower its MTU there.
            probe.bind((str(self.inner(self.here, version, _TRIAL)), 0, 0, index)[:length])
            probe.connect((str(self.inner(self.there, version, _TRIAL)), 0, 0, index)[:length])
            for _ in range(_TRIES):
                with suppress(TimeoutError):
                    probe.send(request)
                    deadline = time.monotonic() + timeout_s / _TRIES
                    while (left_s := deadline - time.monotonic()) > 0:
                        probe.settimeout(left_s)
                        data = probe.recv(1 << 16)[header if version == 4 else 0:]
                        if len(data) == len(request) and _ECHO.unpack_from(data)[0::3] == (answer, number):
                            return True
        return False


def strict_source_checks() -> bool:
    """Every interface of this namespace drops what comes from where it would not send to (RFC 3704 strict), whatever
    the interface says itself: packets that are led here by a tunnel, too."""
    with failing("open rp_filter"):
        return Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text().strip() == "1"
