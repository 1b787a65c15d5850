"""One end of a channel by which a connection's packets travel between two hosts in a program's hands: a TUN device.

What is sent into the device is read here, whole packets of the size that they had on the link, with all checksums: a
TUN device without offloads is given nothing else (net/core/dev.c, validate_xmit_skb). What waits to be read is bounded
by the device's queue, and what does not fit is dropped, as on any link. What is written comes in as from a link.

At the origin the rules lead the peer's packets into it (rules.py, `moved`): `next_hop` is an address for that. At the
destination a routing rule leads the connection's own packets into it (`lead_out`). The device stays when its program
ends: routes and rules stay valid, and what is sent into it is lost until the next program opens it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.endpoint import Flow, IPAddress
from ..core.errors import KernelError
from .routing import rtnetlink, tolerating
from .rules import CARRIED, TUNNELS
from .syscalls import failing

MTU = 65000  # of the end that must not be the narrowest place of the path; tun_set_headroom takes up to 65535
_QUEUE = 4096  # packets: the largest window that Linux offers by default (tcp_rmem, 6 MB)
_TUNSETIFF, _TUNSETPERSIST, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x400454CB, 0x0001, 0x1000  # linux/if_tun.h
_IN6_ADDR_GEN_MODE_NONE = 1  # linux/if_link.h
_RT_SCOPE_LINK, _FR_ACT_TO_TBL = 253, 1  # linux/rtnetlink.h, fib_rules.h
_TABLES = 0x7CB10000  # and the device's index: the number of its routing table
_PRIORITY = 89  # in front of the divert's
_SO_MARK, _IPV6_HDRINCL = 36, 36
_LARGEST = 1 << 16


def name_of(pass_id: str) -> str:
    """Of the device, at both ends."""
    return f"{TUNNELS}{pass_id[:8]}"


def next_hop(name: str, version: int) -> IPAddress:
    """A link-local address that is nobody's (RFC 3927 2.1, RFC 4291 2.5.6)."""
    return _link_local(b"there" + name.encode(), version)


def _local(name: str) -> IPAddress:
    return _link_local(b"here" + name.encode(), 4)


def _link_local(seed: bytes, version: int) -> IPAddress:
    number = hashlib.sha256(seed).digest()
    if version == 6:
        return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + number[:8])
    return ipaddress.IPv4Address(bytes([169, 254, 1 + number[0] % 254, number[1]]))


class Channel:
    """This end, in the network namespace of the thread that makes it: made, or opened again. KernelError EBUSY where
    another program has it."""

    def __init__(self, name: str, mtu: int = MTU) -> None:
        self.name = name
        with failing("open /dev/net/tun"):
            self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with failing("TUNSETIFF"):
                fcntl.ioctl(self._tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
                fcntl.ioctl(self._tun, _TUNSETPERSIST, 1)
                self.index = socket.if_nametoindex(name)
            self._set_up(mtu)
        except BaseException:
            os.close(self._tun)
            raise

    def _set_up(self, mtu: int) -> None:
        with rtnetlink("set up a TUN device") as route:
            route.link("set", index=self.index, mtu=mtu, txqlen=_QUEUE)
            for name, value in (("ipv4/conf/{}/rp_filter", 0), ("ipv6/conf/{}/addr_gen_mode", _IN6_ADDR_GEN_MODE_NONE)):
                path = Path("/proc/sys/net", name.format(self.name))
                if path.exists():  # IPv6 may be off
                    with failing(f"open {path.name}"):
                        path.write_text(f"{value}\n")
            route.link("set", index=self.index, state="up")
            # Without one, loose source checks would fail as strict ones do (net/ipv4/fib_frontend.c,
            # __fib_validate_source: no_addr).
            with tolerating(errno.EEXIST):
                route.addr("add", index=self.index, family=socket.AF_INET, address=str(_local(self.name)),
                           prefixlen=32, scope=_RT_SCOPE_LINK)

    def lead_out(self, flow: Flow) -> None:
        """What this host sends for the connection goes into the device from now on. Idempotent."""
        with rtnetlink("routing rule for a connection") as route:
            with tolerating(errno.EEXIST):
                route.route("add", family=_family(flow.ip_version), oif=self.index, table=_TABLES + self.index,
                            dst="0.0.0.0/0" if flow.ip_version == 4 else "::/0")
            _delete_rules(route, flow.ip_version, lambda one: _leads(one, flow))  # of an earlier pass
            route.rule("add", **_rule(flow, self.index))

    def fileno(self) -> int:
        return self._tun

    def read(self) -> bytes | None:
        """A packet that was sent into the device; None where none waits."""
        try:
            with failing("read a TUN device"):
                return os.read(self._tun, _LARGEST)
        except KernelError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return None
            raise

    def write(self, packet: bytes) -> None:
        """It comes in as from a link; what the kernel does not take is lost."""
        try:
            with failing("write to a TUN device"):
                os.write(self._tun, packet)
        except KernelError as error:
            if error.errno not in (errno.EINVAL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN):
                raise

    def close(self) -> None:
        """The device stays."""
        if self._tun != -1:
            os.close(self._tun)
            self._tun = -1


def delete(name: str) -> None:
    """A device of ours, a tunnel's too, and the rules that lead into it. Idempotent."""
    with rtnetlink(f"delete the device {name}") as route:
        for index in route.link_lookup(ifname=name):
            for version in (4, 6):
                _delete_rules(route, version, lambda one: one.get_attr("FRA_TABLE") == _TABLES + index)  # noqa: B023
            with tolerating(errno.ENODEV):
                route.link("del", index=index)


def _delete_rules(route: Any, version: int, chosen: Callable[[Any], bool]) -> None:
    for one in route.get_rules(family=_family(version)):
        if one.get_attr("FRA_PRIORITY") == _PRIORITY and chosen(one):
            with tolerating(errno.ENOENT):
                route.rule("del", family=_family(version), priority=_PRIORITY, table=one.get_attr("FRA_TABLE"),
                           action=_FR_ACT_TO_TBL, sport_range=_range(one, "FRA_SPORT_RANGE"),
                           dport_range=_range(one, "FRA_DPORT_RANGE"))


def _range(rule: Any, name: str) -> str:
    value = rule.get_attr(name)
    return value if isinstance(value, str) else f"{value['start']}:{value['end']}"


def _leads(rule: Any, flow: Flow) -> bool:
    here, there = flow.plain.local, flow.plain.peer
    return (rule.get_attr("FRA_SRC"), rule.get_attr("FRA_DST"), _range(rule, "FRA_SPORT_RANGE"),
            _range(rule, "FRA_DPORT_RANGE")) == (str(here.address), str(there.address), f"{here.port}:{here.port}",
                                                 f"{there.port}:{there.port}")


def lead_in(name: str, version: int) -> IPAddress:
    """Make a next hop known that lies behind the device; returns it. Idempotent."""
    hop = next_hop(name, version)
    with rtnetlink("route into a TUN device") as route, tolerating(errno.EEXIST):
        route.route("add", family=_family(version), dst=f"{hop}/{hop.max_prefixlen}", oif=index_of(name),
                    **({"scope": _RT_SCOPE_LINK} if version == 4 else {}))
    return hop


def index_of(name: str) -> int:
    """Of the device; 0 where it is not there."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _rule(flow: Flow, index: int) -> dict[str, Any]:
    here, there = flow.plain.local, flow.plain.peer
    length = here.address.max_prefixlen
    return {"family": _family(flow.ip_version), "src": str(here.address), "src_len": length, "dst": str(there.address),
            "dst_len": length, "ip_proto": int(flow.protocol), "sport_range": f"{here.port}:{here.port}",
            "dport_range": f"{there.port}:{there.port}", "table": _TABLES + index, "priority": _PRIORITY,
            "action": _FR_ACT_TO_TBL}


class Sender:
    """Sends packets that another host has made, as they are, to the peer of the connection; each carries the mark
    `CARRIED`, and leaves only as long as this host is fenced off from it (rules.py, `Gate`)."""

    def __init__(self, flow: Flow) -> None:
        with failing("socket(SOCK_RAW)"):
            self._socket = socket.socket(_family(flow.ip_version), socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                         socket.IPPROTO_RAW)
            if flow.ip_version == 6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, CARRIED)
            self._socket.settimeout(1.0)
        self._to = (str(flow.peer.address), 0)
        self.lost = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, packet: bytes) -> None:
        """What cannot leave, for want of room, of a route, or by a rule, is lost, as on any way."""
        try:
            self._socket.sendto(packet, self._to)
        except OSError:
            self.lost += 1

    def close(self) -> None:
        self._socket.close()
