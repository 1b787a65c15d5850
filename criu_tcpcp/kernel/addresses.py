"""The addresses of this host's interfaces, and what depends on one (rtnetlink, by pyroute2). All of the network
namespace of the calling thread."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from dataclasses import dataclass
from typing import Any

from ..core.address import KEPT_FLAGS, NODAD, InterfaceAddress
from ..core.endpoint import IPAddress
from ..core.errors import KernelError, ProtocolError
from . import routing
from .routing import rtnetlink, tolerating

# linux/if_addr.h; of IPv4 the first says "secondary", of IPv6 "temporary"
_SECONDARY, _DADFAILED, _DEPRECATED, _TENTATIVE, _PERMANENT = 0x01, 0x08, 0x20, 0x40, 0x80
_RTPROT_KERNEL = 2  # linux/rtnetlink.h
_ARPHRD_ETHER, _IFF_NOARP = 1, 0x80  # linux/if_arp.h, linux/if.h
_LONGEST_LABEL = 15  # IFNAMSIZ less the end
_LOCAL_ROUTE_S = 2.0
_PAUSE_S = 0.001


@dataclass(frozen=True)
class Held:
    """An address that an interface has. `is_lasting`: nothing takes it away after a time; `is_in_use`: no other host
    was found to have it, or may still be; `has_other_end`: it is one end of a pair."""

    what: InterfaceAddress
    interface: int
    name: str
    is_lasting: bool = True
    is_secondary: bool = False
    is_in_use: bool = True
    has_other_end: bool = False

    def to_json(self) -> dict[str, Any]:
        """What is needed to give it back."""
        return {"what": self.what.to_json(), "interface": self.interface, "name": self.name}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Held:
        try:
            return cls(InterfaceAddress.from_json(value["what"]), int(value["interface"]), str(value["name"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not an address of this host: {error}") from None


def held(version: int) -> list[Held]:
    """Every address of this IP version, of every interface."""
    with rtnetlink("list the addresses") as route:
        names = {int(link["index"]): str(link.get_attr("IFLA_IFNAME")) for link in route.get_links()}
        return [one for message in route.get_addr(family=_family(version))
                if (one := _held(message, names)) is not None]


def _held(message: Any, names: dict[int, str]) -> Held | None:
    index = int(message["index"])
    local, other = message.get_attr("IFA_LOCAL"), message.get_attr("IFA_ADDRESS")
    text = local or other
    if text is None or index not in names:  # the interface came just now, or has just gone
        return None
    flags = int(message.get_attr("IFA_FLAGS") or message["flags"])
    label = str(message.get_attr("IFA_LABEL") or names[index]).removeprefix(names[index])
    broadcast = message.get_attr("IFA_BROADCAST")
    what = InterfaceAddress(
        ipaddress.ip_address(text), int(message["prefixlen"]),
        ipaddress.ip_address(broadcast) if broadcast else None, int(message["scope"]),
        label if label.startswith(":") else "", flags & KEPT_FLAGS, int(message.get_attr("IFA_RT_PRIORITY") or 0),
        bool(flags & _DEPRECATED))
    return Held(what, index, names[index], bool(flags & _PERMANENT), what.address.version == 4
                and bool(flags & _SECONDARY), not flags & (_TENTATIVE | _DADFAILED), bool(local and other != local))


def add(what: InterfaceAddress, interface: int) -> None:
    """Give it to the interface, to be used at once: nobody is asked whether he has it (IFA_F_NODAD). Idempotent."""
    # The kernel's own choice of these is what is left out.
    chosen: dict[str, Any] = {"rt_priority": what.metric} if what.metric else {}
    if what.deprecated:
        chosen["preferred_lft"] = 0
    if what.address.version == 4:
        name = _name(interface)
        label = name + what.label
        chosen |= {"label": label if len(label) <= _LONGEST_LABEL else name}
        if what.broadcast is not None:
            chosen["broadcast"] = str(what.broadcast)
    about = {"index": interface, "family": _family(what.address.version), "address": str(what.address),
             "prefixlen": what.prefix_length, "scope": what.scope, **chosen}
    with rtnetlink(f"add the address {what}") as route:
        quick = NODAD if what.address.version == 6 else 0
        with tolerating(errno.EEXIST):
            route.addr("add", **about, flags=what.flags | quick)
        if quick & ~what.flags:  # whoever gave it wanted it tried, should the link fail: the flag stays otherwise
            _until_local(what.address)
            route.addr("replace", **about, flags=what.flags)
    _until_local(what.address)


def _until_local(address: IPAddress) -> None:
    """The kernel makes the local route of an IPv6 address some time later (net/ipv6/addrconf.c, addrconf_dad_work)."""
    deadline = time.monotonic() + _LOCAL_ROUTE_S
    while not routing.is_local(address):
        if time.monotonic() > deadline:
            raise KernelError(f"use the address {address}", errno.ETIMEDOUT, "the kernel makes no local route for it")
        time.sleep(_PAUSE_S)


def remove(what: InterfaceAddress, interface: int) -> None:
    """Idempotent."""
    with rtnetlink(f"remove the address {what}") as route, tolerating(errno.EADDRNOTAVAIL), tolerating(errno.ENODEV):
        route.addr("del", index=interface, family=_family(what.address.version), address=str(what.address),
                   prefixlen=what.prefix_length)


def preferring(address: IPAddress) -> list[str]:
    """The destinations of routes that somebody made with this address as their source (`src`): they go with it."""
    with rtnetlink("list the routes") as route:
        return [f"{found.get_attr('RTA_DST')}/{found['dst_len']}" if found.get_attr("RTA_DST") else "default"
                for found in route.get_routes(family=_family(address.version))
                if found.get_attr("RTA_PREFSRC") == str(address) and found["proto"] != _RTPROT_KERNEL]


def hardware(interface: int) -> str:
    """The link-layer address of an Ethernet interface ("02:00:..."), or '' where it has none that others ask for."""
    with rtnetlink("look at an interface") as route:
        link = route.link("get", index=interface)[0]
    is_plain = link["ifi_type"] == _ARPHRD_ETHER and not link["flags"] & _IFF_NOARP
    return str(link.get_attr("IFLA_ADDRESS") or "") if is_plain else ""


def _name(interface: int) -> str:
    with rtnetlink("look at an interface") as route:
        return str(route.link("get", index=interface)[0].get_attr("IFLA_IFNAME"))


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6
