"""The sockets below the strict endpoint, and the address that it speaks from.

That address is on the interface's link and not the kernel's: so the kernel neither takes the packets for it nor answers
them (it drops them without a word, as every host that does not forward), and no packet rule is needed. The neighbours
find it since ARP (RFC 826) and neighbour solicitations (RFC 4861 7.2) for it are answered here, with the interface's
own link-layer address. Nothing of it is left in this host when the socket is closed.

Packets leave through a raw socket, by the kernel's routes and its knowledge of the next hop.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct

from criu_tcpcp.core.endpoint import IPAddress

from .segments import pseudo_header, words_sum

_ETH_P_ALL, _ETH_P_IP, _ETH_P_ARP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x0806, 0x86DD
_ARP = struct.Struct(">HHBBH6s4s6s4s")
_ETHERNET, _REQUEST, _REPLY = 1, 1, 2
_SOLICITATION, _ADVERTISEMENT, _TARGET_ADDRESS = 135, 136, 2
_SOLICITED_AND_OVERRIDE = 0x60000000
_ICMPV6, _NEIGHBOUR_HOPS = 58, 255
# linux/if_packet.h, asm-generic/socket.h, linux/in6.h
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_SO_RCVBUFFORCE, _IPV6_HDRINCL = 33, 36
_BUFFER = 16 << 20
# linux/sockios.h, linux/ethtool.h
_SIOCETHTOOL = 0x8946
_SET_TX_CHECKSUM, _SET_SEGMENTATION, _SET_GENERIC_SEGMENTATION, _SET_GENERIC_RECEIVE = 0x17, 0x1F, 0x24, 0x2C


class Wire:
    """Made in the network namespace of the thread, on `interface`, for `address`."""

    def __init__(self, interface: str, address: IPAddress) -> None:
        self._address = address
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self._out = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
        if address.version == 6:
            self._out.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
        self._in = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
        self._in.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._in.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._in.setblocking(False)
        self._in.bind((interface, _ETH_P_ALL))
        self._interface = interface
        self._mac: bytes = self._in.getsockname()[4]
        self._dropped = 0

    @property
    def socket(self) -> socket.socket:
        """Readable while `receive` has something to do."""
        return self._in

    def send(self, data: bytes, to: IPAddress) -> None:
        self._out.sendto(data, (str(to), 0))

    def receive(self) -> bytes | None:
        """The next IP packet to our address; None if there is none now. Neighbours that ask are answered meanwhile."""
        while True:
            try:
                data, sender = self._in.recvfrom(1 << 17)
            except BlockingIOError:
                return None
            protocol, mac = sender[1], sender[4]
            if protocol == _ETH_P_ARP:
                self._answer_arp(data)
            elif protocol == _ETH_P_IPV6 and self._is_solicitation(data):
                self._answer_solicitation(data, mac)
            elif protocol in (_ETH_P_IP, _ETH_P_IPV6) and self._is_for_us(data):
                return data

    @property
    def dropped(self) -> int:
        """Packets that came and found no room here."""
        packed = self._in.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)  # reading it starts it anew
        self._dropped += struct.unpack("II", packed)[1]
        return self._dropped

    def close(self) -> None:
        self._in.close()
        self._out.close()

    def _is_for_us(self, data: bytes) -> bool:
        if not data or data[0] >> 4 != self._address.version:
            return False
        return data[16:20] == self._address.packed if self._address.version == 4 else \
            data[24:40] == self._address.packed

    def _answer_arp(self, data: bytes) -> None:
        if len(data) < _ARP.size:
            return
        kind, protocol, _hardware_length, _length, operation, mac, asker, _target_mac, target = \
            _ARP.unpack_from(data)
        if (kind, protocol, operation, target) == (_ETHERNET, _ETH_P_IP, _REQUEST, self._address.packed):
            answer = _ARP.pack(_ETHERNET, _ETH_P_IP, 6, 4, _REPLY, self._mac, target, mac, asker)
            self._in.sendto(answer, (self._interface, _ETH_P_ARP, 0, 0, mac))

    def _is_solicitation(self, data: bytes) -> bool:
        return len(data) >= 64 and data[6] == _ICMPV6 and data[40] == _SOLICITATION \
            and data[48:64] == self._address.packed

    def _answer_solicitation(self, data: bytes, mac: bytes) -> None:
        asker, ours = data[8:24], self._address.packed
        body = struct.pack(">BBHI", _ADVERTISEMENT, 0, 0, _SOLICITED_AND_OVERRIDE) + ours \
            + struct.pack(">BB", _TARGET_ADDRESS, 1) + self._mac
        checksum = 0xFFFF - words_sum(pseudo_header(ours, asker, len(body), _ICMPV6) + body)
        body = body[:2] + struct.pack(">H", checksum) + body[4:]
        packet = struct.pack(">IHBB", 6 << 28, len(body), _ICMPV6, _NEIGHBOUR_HOPS) + ours + asker + body
        self._in.sendto(packet, (self._interface, _ETH_P_IPV6, 0, 0, mac))


def without_offload(interface: str) -> None:
    """Segments leave `interface`, of this thread's network namespace, whole and with their checksums, as a real card
    puts them on the wire: a veth hands them on as the stack made them, up to 64 KiB long and without."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        for command in (_SET_SEGMENTATION, _SET_GENERIC_SEGMENTATION, _SET_GENERIC_RECEIVE, _SET_TX_CHECKSUM):
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
            request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(control, _SIOCETHTOOL, request)
