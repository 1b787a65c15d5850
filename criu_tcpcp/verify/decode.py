"""One frame -> a TCP segment, an ICMP error about one, or the reason why it is neither.

Link types: EN10MB (with VLAN tags), LINUX_SLL, LINUX_SLL2, RAW, IPV4, IPV6, NULL and LOOP. IP header lengths decide
where the payload ends, since short Ethernet frames are padded; a total length of 0 (segmentation offload above 64 KiB,
or an IPv6 jumbogram) means "as long as the frame". Checksums are not looked at: on the sending host they are filled in
by the network card, after the capture.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..core.endpoint import Endpoint
from .container import UNTIMED, Frame
from .packet import CaptureError, IcmpError, Options, Packet

_EN10MB, _NULL, _LOOP, _SLL, _SLL2, _IPV4, _IPV6 = 1, 0, 108, 113, 276, 228, 229
_RAW = (12, 14, 101)
_VLAN = (0x8100, 0x88A8, 0x9100)
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_ICMP_ERRORS = (3, 4, 5, 11, 12)        # RFC 792; redirects (5) quote the packet as well
_ICMPV6_ERRORS = (1, 2, 3, 4)           # RFC 4443
_ICMPV6_REDIRECT = 137                  # RFC 4861 4.5: the packet is quoted inside option 4
_EXTENSIONS = (0, 43, 60)               # RFC 8200 4: hop-by-hop, routing, destination options


class Skipped(enum.Enum):
    """Why a frame gave nothing."""

    OTHER = "not TCP, nor an ICMP error about TCP"
    FRAGMENT = "a later fragment of an IP datagram"
    DAMAGED = "cut short inside its headers, or malformed"
    UNTIMED = "without a time"


class _Link(NamedTuple):
    offset: int
    protocol: int
    source: bytes | None
    outgoing: bool | None


class _Datagram(NamedTuple):
    """An IP header: `end` is where the payload ends on the wire, perhaps beyond what was captured."""

    version: int
    src: bytes
    dst: bytes
    protocol: int
    offset: int
    end: int
    ttl: int
    tos: int
    df: bool
    fragment_offset: int
    more_fragments: bool


@lru_cache(maxsize=4096)
def _endpoint(address: bytes, port: int) -> Endpoint:
    return Endpoint(ipaddress.ip_address(address), port)


def decode(frame: Frame, capture: str) -> Packet | IcmpError | Skipped:
    """Never raises for what a packet contains; CaptureError for a link type that is not known."""
    if frame.link_type == UNTIMED:
        return Skipped.UNTIMED
    try:
        link = _link(frame)
        if link is None:
            return Skipped.OTHER
        datagram = _ip(frame.data, link, frame.wire_len)
        if datagram is None:
            return Skipped.OTHER
        if datagram.fragment_offset:
            return Skipped.FRAGMENT if datagram.protocol == _TCP else Skipped.OTHER
        if datagram.protocol == _TCP:
            return _tcp(frame, capture, link, datagram)
        if datagram.protocol in (_ICMP, _ICMPV6):
            return _icmp(frame, capture, datagram)
        return Skipped.OTHER
    except (struct.error, IndexError, ValueError):      # too short at some header, or a port 0, or a mapped address
        return Skipped.DAMAGED


@dataclass(frozen=True, slots=True)
class UdpDatagram:
    """One as captured: the whole of its bytes as far as the capture has them."""

    time_ns: int
    capture: str
    number: int
    src: Endpoint
    dst: Endpoint
    payload: bytes
    hops: int
    tos: int
    df: bool

    def __str__(self) -> str:
        return f"{self.capture} #{self.number} {self.src} > {self.dst} udp, {len(self.payload)} bytes"


def decode_udp(frame: Frame, capture: str) -> UdpDatagram | IcmpError | None:
    """A UDP datagram, or its first fragment, or an ICMP error about one. Never raises for what a packet contains."""
    if frame.link_type == UNTIMED:
        return None
    try:
        link = _link(frame)
        ip = _ip(frame.data, link, frame.wire_len) if link is not None else None
        if ip is None or ip.fragment_offset:
            return None
        if ip.protocol in (_ICMP, _ICMPV6):
            error = _icmp(frame, capture, ip, _UDP)
            return error if isinstance(error, IcmpError) else None
        if ip.protocol != _UDP:
            return None
        sport, dport, length = struct.unpack_from("!HHH", frame.data, ip.offset)
        if length < 8:  # than its own header: no socket takes it (RFC 768), and a pass sends such to try a way
            return None
        return UdpDatagram(frame.time_ns, capture, frame.number, _endpoint(ip.src, sport), _endpoint(ip.dst, dport),
                           frame.data[ip.offset + 8:ip.end], ip.ttl, ip.tos, ip.df)
    except (struct.error, IndexError, ValueError):
        return None


def _link(frame: Frame) -> _Link | None:
    data, kind = frame.data, frame.link_type
    source: bytes | None
    outgoing: bool | None
    if kind == _EN10MB:
        protocol, offset = struct.unpack_from("!H", data, 12)[0], 14
        source, outgoing = data[6:12], None
    elif kind == _SLL:
        packet_type, _, length = struct.unpack_from("!HHH", data)
        protocol, offset = struct.unpack_from("!H", data, 14)[0], 16
        source, outgoing = data[6:12] if length == 6 else None, packet_type == 4
    elif kind == _SLL2:
        protocol, offset = struct.unpack_from("!H", data)[0], 20
        source, outgoing = data[12:18] if data[11] == 6 else None, data[10] == 4
    elif kind in (*_RAW, _IPV4, _IPV6):
        return _Link(0, 0x0800 if data[0] >> 4 == 4 else 0x86DD, None, None)
    elif kind in (_NULL, _LOOP):
        return _Link(4, 0x0800 if data[4] >> 4 == 4 else 0x86DD, None, None)
    else:
        raise CaptureError(f"packet {frame.number} has link type {kind}, which is not known here")
    while protocol in _VLAN:
        protocol, offset = struct.unpack_from("!H", data, offset + 2)[0], offset + 4
    return _Link(offset, protocol, source, outgoing) if protocol in (0x0800, 0x86DD) else None


def _ip(data: bytes, link: _Link, wire_len: int) -> _Datagram | None:
    start, version = link.offset, data[link.offset] >> 4
    if (version, link.protocol) not in ((4, 0x0800), (6, 0x86DD)):
        raise ValueError("the IP version is not the link layer's")
    datagram = _ipv4(data, start, wire_len) if version == 4 else _ipv6(data, start, wire_len)
    if datagram.end > wire_len or datagram.offset > datagram.end:
        raise ValueError("the IP length does not fit the frame")
    return datagram


def _ipv4(data: bytes, start: int, wire_len: int) -> _Datagram:
    first, tos, total, _, fragment, ttl, protocol, _, src, dst = struct.unpack_from("!BBHHHBBH4s4s", data, start)
    header = (first & 15) * 4
    if header < 20:
        raise ValueError("IHL")
    end = start + total if total else wire_len
    return _Datagram(4, src, dst, protocol, start + header, end, ttl, tos, bool(fragment & 0x4000), fragment & 0x1FFF,
                     bool(fragment & 0x2000))


def _ipv6(data: bytes, start: int, wire_len: int) -> _Datagram:
    word, length, protocol, ttl, src, dst = struct.unpack_from("!IHBB16s16s", data, start)
    offset, fragment = start + 40, 0
    end = offset + length if length else wire_len
    while True:
        if protocol in _EXTENSIONS:
            following, size = struct.unpack_from("!BB", data, offset)
            protocol, offset = following, offset + 8 + 8 * size
        elif protocol == 44:
            protocol, _, fragment = struct.unpack_from("!BBH", data, offset)
            offset += 8
            if fragment >> 3:           # what follows is not a header
                break
        else:
            break
    return _Datagram(6, src, dst, protocol, offset, end, ttl, word >> 20 & 255, True, fragment >> 3,
                     bool(fragment & 1))


def _tcp(frame: Frame, capture: str, link: _Link, ip: _Datagram) -> Packet | Skipped:
    sport, dport, seq, ack, word, window = struct.unpack_from("!HHIIHH", frame.data, ip.offset)
    header = (word >> 12) * 4
    body = ip.offset + header
    if header < 20 or body > ip.end or body > len(frame.data):
        return Skipped.DAMAGED
    return Packet(
        time_ns=frame.time_ns, capture=capture, number=frame.number, ip_version=ip.version,
        src=_endpoint(ip.src, sport), dst=_endpoint(ip.dst, dport), seq=seq, ack=ack, flags=word & 0x1FF,
        window=window, payload=frame.data[body:ip.end], payload_len=ip.end - body,
        options=_options(frame.data[ip.offset + 20:body]), ttl=ip.ttl, tos=ip.tos, df=ip.df, ether_src=link.source,
        fragment=ip.more_fragments, outgoing=link.outgoing)


def _options(data: bytes) -> Options:
    """RFC 9293 3.1. An option whose length makes no sense ends the list, as it does in the kernel."""
    if len(data) == 12 and data[:4] == b"\1\1\x08\x0a":         # nearly every segment: timestamps alone (RFC 7323 A)
        tsval, tsecr = struct.unpack_from("!II", data, 4)
        return Options(12, tsval=tsval, tsecr=tsecr)
    mss: int | None = None
    scale: int | None = None
    tsval = tsecr = None
    permitted = False
    sack: tuple[tuple[int, int], ...] = ()
    position = 0
    while position < len(data) and data[position] != 0:
        kind = data[position]
        if kind == 1:
            position += 1
            continue
        length = data[position + 1] if position + 1 < len(data) else 0
        if length < 2 or position + length > len(data):
            break
        value = data[position + 2:position + length]
        if kind == 2 and length == 4:
            mss = int.from_bytes(value, "big")
        elif kind == 3 and length == 3:
            scale = min(value[0], 14)           # RFC 7323 2.3
        elif kind == 4 and length == 2:
            permitted = True
        elif kind == 5 and length >= 10 and (length - 2) % 8 == 0:
            numbers = struct.unpack(f"!{len(value) // 4}I", value)
            sack = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        elif kind == 8 and length == 10:
            tsval, tsecr = struct.unpack("!II", value)
        position += length
    return Options(len(data), mss, scale, permitted, sack, tsval, tsecr)


def _icmp(frame: Frame, capture: str, ip: _Datagram, about: int = _TCP) -> IcmpError | Skipped:
    kind, code = frame.data[ip.offset], frame.data[ip.offset + 1]
    if kind in (_ICMP_ERRORS if ip.protocol == _ICMP else _ICMPV6_ERRORS):
        quoted = ip.offset + 8
    elif ip.protocol == _ICMPV6 and kind == _ICMPV6_REDIRECT:
        quoted = _redirected(frame.data, ip.offset + 40)
    else:
        return Skipped.OTHER
    # A quotation ends early (RFC 792: 8 bytes of the payload), so its own lengths prove nothing.
    version = frame.data[quoted] >> 4
    inner = (_ipv4 if version == 4 else _ipv6)(frame.data, quoted, frame.wire_len)
    if inner.protocol != about or inner.fragment_offset:
        return Skipped.OTHER
    sport, dport = struct.unpack_from("!HH", frame.data, inner.offset)
    return IcmpError(frame.time_ns, capture, frame.number, ip.version, kind, code, str(ipaddress.ip_address(ip.src)),
                     _endpoint(inner.src, sport), _endpoint(inner.dst, dport))


def _redirected(data: bytes, position: int) -> int:
    """Where the packet begins inside the "redirected header" option of an ICMPv6 redirect (RFC 4861 4.6.3)."""
    while data[position] != 4:
        if data[position + 1] == 0:
            raise ValueError("an option of length 0")
        position += data[position + 1] * 8
    return position + 8
