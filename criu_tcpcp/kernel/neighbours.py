"""What the hosts of a link know of each other: who has an address, asked and told.

Told by an ARP announcement, in the form of a request (RFC 5227 3; RFC 826 has everybody take what he knows already from
it), or an unsolicited neighbour advertisement that overrides (RFC 4861 7.2.6). Linux takes both at once for an entry
that it has, even within the time for which it holds on to another (net/ipv4/arp.c, arp_is_garp, since 4.14)."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

from ..core.endpoint import IPAddress
from .routing import rtnetlink
from .syscalls import failing

_NTF_USE = 0x01  # linux/neighbour.h: resolve it, as a packet for it would
_KNOWN = 0x02 | 0x04 | 0x08 | 0x10 | 0x80  # NUD_REACHABLE, STALE, DELAY, PROBE, PERMANENT
_PAUSE_S = 0.005
_ETH_P_ARP, _ETH_P_IP, _ARPHRD_ETHER, _ARPOP_REQUEST = 0x0806, 0x0800, 1, 1
_ARP = struct.Struct(">HHBBH")  # hardware, protocol, their lengths, operation
_NEIGHBOUR_ADVERTISEMENT, _TARGET_LINK_LAYER_ADDRESS = 136, 2  # RFC 4861 4.4, 4.6.1
_ROUTER, _OVERRIDE = 1 << 31, 1 << 29
_ALL_NODES = "ff02::1"
_EVERYBODY = b"\xff" * 6


def hardware_of(address: IPAddress, interface: int, timeout_s: float) -> str:
    """The link-layer address at which a neighbour on this interface's link has the address; '' where nobody says. Only
    one that is not known is asked for: to use an entry takes away that it is permanent (net/core/neighbour.c)."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    deadline = time.monotonic() + timeout_s
    with rtnetlink(f"ask who has {address}") as route:
        is_asked = False
        while True:
            for entry in route.get_neighbours(family=family, ifindex=interface, dst=str(address)):
                if entry["state"] & _KNOWN and entry.get_attr("NDA_LLADDR"):
                    return str(entry.get_attr("NDA_LLADDR"))
            if time.monotonic() > deadline:
                return ""
            if not is_asked:
                route.neigh("replace", family=family, ifindex=interface, dst=str(address), flags=_NTF_USE, state=0)
                is_asked = True
            time.sleep(_PAUSE_S)


def announce(address: IPAddress, interface: int, hardware: str) -> None:
    """Tell all hosts on the link that this one has the address, at its hardware address. It must have it."""
    with failing(f"announce {address}"):
        name = socket.if_indextoname(interface)
        if address.version == 4:
            _announce_by_arp(address, name, bytes.fromhex(hardware.replace(":", "")))
        else:
            _advertise(address, name, interface, bytes.fromhex(hardware.replace(":", "")))


def _announce_by_arp(address: IPAddress, name: str, hardware: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as link:  # protocol 0: it hears nothing
        link.bind((name, 0))
        link.send(_EVERYBODY + hardware + _ETH_P_ARP.to_bytes(2, "big")
                  + _ARP.pack(_ARPHRD_ETHER, _ETH_P_IP, 6, 4, _ARPOP_REQUEST)
                  + hardware + address.packed + bytes(6) + address.packed)


def _advertise(address: IPAddress, name: str, interface: int, hardware: bytes) -> None:
    # Without it where it is due, neighbours would take this host out of their routers (RFC 4861 7.2.5).
    is_router = Path(f"/proc/sys/net/ipv6/conf/{name}/forwarding").read_text().strip() != "0"
    said = (struct.pack(">BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE | (_ROUTER if is_router else 0))
            + address.packed + bytes([_TARGET_LINK_LAYER_ADDRESS, 1]) + hardware)
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6) as speaker:
        speaker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        speaker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface)
        speaker.bind((str(address), 0, 0, 0))
        speaker.sendto(said, (_ALL_NODES, 0, 0, interface))  # the kernel makes the checksum
