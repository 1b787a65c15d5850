"""The two file formats: pcap (draft-ietf-opsawg-pcap) and pcapng (draft-ietf-opsawg-pcapng) -> frames.

A length field is believed only after it was compared with the bytes that are there. Whatever does not fit raises
CaptureError; no other exception leaves this file, and the work is linear in the size of the input.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from .packet import CaptureError

_NS = 1_000_000_000
_PCAP_MAGIC = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1}     # magic -> nanoseconds of one unit of the fraction
_SHB, _IDB, _OPB, _SPB, _EPB = 0x0A0D0D0A, 1, 2, 3, 6
UNTIMED = -1        # the link type of a frame whose time the file does not tell
_BYTE_ORDER_MAGIC = 0x1A2B3C4D


class Frame(NamedTuple):
    """`data` as captured; `wire_len` as it was on the wire; `number` counts from 1 in the file, as tools print it."""

    number: int
    time_ns: int
    link_type: int
    data: bytes
    wire_len: int


class _Interface(NamedTuple):
    link_type: int
    units_per_second: int
    offset_s: int


def frames(data: bytes) -> Iterator[Frame]:
    """Every frame of a capture file, in file order. One without a time (pcapng SPB, and OPB, which nobody writes any
    more) is empty, its link type UNTIMED."""
    if len(data) < 12:
        raise CaptureError(f"{len(data)} bytes are too few for a capture")
    for order in ("<", ">"):
        magic = struct.unpack_from(order + "I", data)[0]
        if magic in _PCAP_MAGIC:
            return _pcap(data, order, _PCAP_MAGIC[magic])
    if struct.unpack_from("<I", data)[0] == _SHB:
        return _pcapng(data)
    raise CaptureError("neither pcap nor pcapng: unknown magic number")


def _pcap(data: bytes, order: str, unit_ns: int) -> Iterator[Frame]:
    if len(data) < 24:
        raise CaptureError("the file ends inside the pcap header")
    major, minor = struct.unpack_from(order + "HH", data, 4)
    if major != 2:
        raise CaptureError(f"pcap version {major}.{minor} is unknown")
    link_type = struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF     # the upper bits tell of a checksum
    header = struct.Struct(order + "IIII")
    position, number = 24, 0
    while position < len(data):
        number += 1
        if len(data) - position < 16:
            raise CaptureError(f"the file ends inside the header of packet {number}", hint="was tcpdump killed? use -U")
        seconds, fraction, captured, wire_len = header.unpack_from(data, position)
        position += 16
        if captured > len(data) - position:
            raise CaptureError(f"packet {number} claims {captured} bytes, the file has {len(data) - position} left",
                               hint="was tcpdump killed? use -U")
        yield Frame(number, seconds * _NS + fraction * unit_ns, link_type, data[position:position + captured],
                    max(wire_len, captured))
        position += captured


def _pcapng(data: bytes) -> Iterator[Frame]:
    position, number, order = 0, 0, "<"
    interfaces: list[_Interface] = []
    while position < len(data):
        if len(data) - position < 12:
            raise CaptureError(f"the file ends inside a block header at byte {position}")
        if data[position:position + 4] == b"\x0a\x0d\x0d\x0a":      # a new section: its byte order, no interfaces yet
            order = _section_order(data, position)
            interfaces = []
        kind, length = struct.unpack_from(order + "II", data, position)
        if length % 4 or length < 12 or length > len(data) - position:
            raise CaptureError(f"the block at byte {position} claims {length} bytes, {len(data) - position} are left")
        if struct.unpack_from(order + "I", data, position + length - 4)[0] != length:
            raise CaptureError(f"the two lengths of the block at byte {position} differ")
        body = data[position + 8:position + length - 4]
        if kind == _IDB:
            interfaces.append(_interface(body, order))
        elif kind == _EPB:
            number += 1
            yield _enhanced(body, order, number, interfaces)
        elif kind in (_SPB, _OPB):
            number += 1
            yield Frame(number, 0, UNTIMED, b"", 0)
        position += length


def _section_order(data: bytes, position: int) -> str:
    if len(data) - position < 28:
        raise CaptureError("the file ends inside a section header")
    for order in ("<", ">"):
        if struct.unpack_from(order + "I", data, position + 8)[0] == _BYTE_ORDER_MAGIC:
            return order
    raise CaptureError(f"the section header at byte {position} has no byte-order magic")


def _interface(body: bytes, order: str) -> _Interface:
    if len(body) < 8:
        raise CaptureError("an interface block is too short")
    link_type = struct.unpack_from(order + "H", body)[0]
    units, offset_s, position = 1_000_000, 0, 8
    while len(body) - position >= 4:
        code, length = struct.unpack_from(order + "HH", body, position)
        position += 4
        if code == 0:
            break
        if length > len(body) - position:
            raise CaptureError(f"option {code} of an interface claims {length} bytes, {len(body) - position} are left")
        if code == 9 and length == 1:           # if_tsresol: the high bit chooses 2^-n, else 10^-n
            resolution = body[position]
            units = 2 ** (resolution & 127) if resolution & 128 else 10 ** resolution
        elif code == 14 and length == 8:        # if_tsoffset
            offset_s = struct.unpack_from(order + "q", body, position)[0]
        position += (length + 3) & ~3
    return _Interface(link_type, units, offset_s)


def _enhanced(body: bytes, order: str, number: int, interfaces: list[_Interface]) -> Frame:
    if len(body) < 20:
        raise CaptureError(f"the block of packet {number} is too short")
    index, high, low, captured, wire_len = struct.unpack_from(order + "IIIII", body)
    if index >= len(interfaces):
        raise CaptureError(f"packet {number} names interface {index}; {len(interfaces)} were described")
    if captured > len(body) - 20:
        raise CaptureError(f"packet {number} claims {captured} bytes, its block has {len(body) - 20}")
    interface = interfaces[index]
    time_ns = (high << 32 | low) * _NS // interface.units_per_second + interface.offset_s * _NS
    return Frame(number, time_ns, interface.link_type, body[20:20 + captured], max(wire_len, captured))
