"""Addresses, next hops, and the routing rule that takes diverted packets to a local socket (rtnetlink, by pyroute2).

The divert needs two things in routing: `ip rule fwmark MARK to ADDRESS lookup TABLE`, one for each foreign address with
connections here, and in that table a route that calls everything local. `to ADDRESS` keeps it harmless where
src_valid_mark is set: without, the source check would use the table too, and drop (fib_frontend.c).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..core.endpoint import IPAddress
from ..core.errors import KernelError
from . import netlink
from .rules import MARK
from .syscalls import failing

TABLE = 31900
PRIORITY = 90
_LOOPBACK_INDEX = 1
_DISCARD = 9  # any port will do (RFC 863): nothing is sent
_NETLINK_ROUTE, _RTM_NEWROUTE, _RTM_GETROUTE, _RTA_DST = 0, 24, 26, 1  # linux/rtnetlink.h
_RTMSG = struct.Struct("=8BI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RTN_LOCAL, _SCOPE_HOST, _FR_ACT_TO_TBL = 2, 254, 1  # linux/rtnetlink.h, linux/fib_rules.h


@contextlib.contextmanager
def rtnetlink(call: str) -> Iterator[Any]:
    """An rtnetlink connection in the calling thread's network namespace; pyroute2 is imported here: it is slow."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError
    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise KernelError(call, int(error.code), str(error.args[1] if len(error.args) > 1 else error)) from error
    except OSError as error:
        raise KernelError(call, error.errno or 0, str(error)) from error


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


@dataclass(frozen=True)
class Hop:
    """The way to an address: through `gateway`, or on the link itself where it is None; `interface` by index."""

    gateway: IPAddress | None
    interface: int
    local: bool


def way_to(address: IPAddress) -> Hop:
    """How this host reaches the address. KernelError where it does not (ENETUNREACH, EHOSTUNREACH)."""
    with rtnetlink(f"route to {address}") as route:
        answer = route.route("get", dst=str(address), family=_family(address.version))[0]
    gateway = answer.get_attr("RTA_GATEWAY")
    return Hop(ipaddress.ip_address(gateway) if gateway else None, int(answer.get_attr("RTA_OIF") or 0),
               answer["type"] == _RTN_LOCAL)


def interface_name(index: int) -> str:
    with failing("if_indextoname"):
        return socket.if_indextoname(index)


def mtu_towards(address: IPAddress) -> int:
    """The MTU of the interface by which this host reaches the address, bytes: nothing larger comes in by it either."""
    with rtnetlink(f"read the MTU towards {address}") as route:
        return int(route.link("get", index=way_to(address).interface)[0].get_attr("IFLA_MTU"))


def source_towards(address: IPAddress) -> IPAddress:
    """The address of this host that it would speak to that one from. KernelError where it does not reach it."""
    with failing(f"route to {address}"), socket.socket(
            _family(address.version), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        probe.connect((str(address), _DISCARD))
        return ipaddress.ip_address(probe.getsockname()[0])


def is_local(address: IPAddress) -> bool:
    """The address is this host's own (in this network namespace). Asked without pyroute2, whose import takes
    longer than a list of thousands of connections."""
    body = (_RTMSG.pack(_family(address.version), address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
            + netlink.attribute(_RTA_DST, address.packed))
    request = netlink.HEADER.pack(netlink.HEADER.size + len(body), _RTM_GETROUTE, netlink.F_REQUEST, 1, 0) + body
    with failing(f"route to {address}"), socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as route:
        route.settimeout(5)
        route.send(request)
        kind, _sequence, answer = next(netlink.messages(route.recv(1 << 15)))
    if kind != _RTM_NEWROUTE:
        number = -struct.unpack_from("=i", answer)[0]
        if number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES):
            return False
        raise KernelError(f"route to {address}", number, os.strerror(number))
    return bool(_RTMSG.unpack_from(answer)[7] == _RTN_LOCAL)


def add_divert(address: IPAddress) -> None:
    """Make diverted packets for this address local. Idempotent."""
    family = _family(address.version)
    with rtnetlink(f"routing rule for {address}") as route:
        with tolerating(errno.EEXIST):
            route.route("add", family=family, dst=_everything(address.version), type=_RTN_LOCAL, scope=_SCOPE_HOST,
                        oif=_LOOPBACK_INDEX, table=TABLE)
        if address not in _diverts(route, address.version):
            with tolerating(errno.EEXIST):
                route.rule("add", **_rule(address))


def sweep_diverts(version: int, needed: set[IPAddress]) -> None:
    """Remove the rules for addresses that are not needed, and the table with the last of them. Idempotent."""
    family = _family(version)
    with rtnetlink("routing rules") as route:
        present = _diverts(route, version)
        for address in present - needed:
            with tolerating(errno.ENOENT):
                route.rule("del", **_rule(address))
        if not needed and list(route.get_routes(family=family, table=TABLE)):
            with tolerating(errno.ESRCH):
                route.route("del", family=family, dst=_everything(version), type=_RTN_LOCAL, scope=_SCOPE_HOST,
                            oif=_LOOPBACK_INDEX, table=TABLE)


def _everything(version: int) -> str:
    return "0.0.0.0/0" if version == 4 else "::/0"


def _rule(address: IPAddress) -> dict[str, Any]:
    return {"family": _family(address.version), "dst": str(address), "dst_len": 32 if address.version == 4 else 128,
            "fwmark": MARK, "table": TABLE, "priority": PRIORITY, "action": _FR_ACT_TO_TBL}


def _diverts(route: Any, version: int) -> set[IPAddress]:
    return {ipaddress.ip_address(rule.get_attr("FRA_DST"))
            for rule in route.get_rules(family=_family(version))
            if rule.get_attr("FRA_FWMARK") == MARK and rule.get_attr("FRA_TABLE") == TABLE and rule.get_attr("FRA_DST")}


@contextlib.contextmanager
def tolerating(number: int) -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError
    try:
        yield
    except NetlinkError as error:
        if error.code != number:
            raise
