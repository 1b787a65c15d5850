"""The state of a connected UDP socket as CRIU image bytes, and back.

The `inet_sk_entry` is as of a TCP connection (image.py). What waits to be read is the image `sk-queues.img` of CRIU's:
two magic numbers, then for each packet the length of a `sk_packet_entry`, that entry, and its bytes. (CRIU itself
writes it for unix sockets, and drops the queue of a UDP socket.) Beside it travels what a packet's headers said.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from .criu import messages
from .datagram import MOST, Datagram, DatagramState
from .endpoint import Protocol
from .errors import ProtocolError
from .image import EXTRAS_VERSION, Image, decode_inet_sk, decode_options_beside, encode_inet_sk, explained, parse_entry
from .options import BY_NAME
from .tcp import TcpState

_SIZE = struct.Struct("=I")
_HEAD = struct.Struct("=II")
_ENTRY_LIMIT = 64
_EXTRAS_LIMIT = 4 * MOST + (1 << 16)


def encode(state: DatagramState, inode: int = 0) -> Image:
    """The state in CRIU's format. `Image.tcp_stream` is the queue."""
    inet_sk = encode_inet_sk(state.flow, TcpState.ESTABLISHED, state.nonblocking, state.options, inode)
    return Image(inet_sk, _encode_queue(state), _encode_extras(state))


def decode(image: Image) -> DatagramState:
    """Inverse of `encode`. Raises ProtocolError for anything that is not an image of a connected UDP socket."""
    with explained():
        extras = _decode_extras(image.extras)
        flow, _state, nonblocking, options, _shut = decode_inet_sk(image.inet_sk, extras["scope_id"])
        if flow.protocol is not Protocol.UDP:
            raise ProtocolError("the socket in the image is not UDP")
        payloads = list(_decode_queue(image.tcp_stream))
        arrived = bytes.fromhex(extras["arrived"])
        if len(arrived) != 2 * len(payloads):
            raise ProtocolError("what the headers of the datagrams said is not as long as the queue")
        datagrams = tuple(Datagram(payload, *pair) for payload, pair
                          in zip(payloads, struct.iter_unpack("BB", arrived), strict=True))
        return DatagramState(flow, datagrams, {**dict(options), **decode_options_beside(extras["options"])},
                             nonblocking)


def _encode_queue(state: DatagramState) -> bytes:
    kinds = messages()
    parts = [_HEAD.pack(kinds.magic["IMG_COMMON"], kinds.magic["SK_QUEUES"])]
    for datagram in state.datagrams:
        entry = kinds.sk_packet(id_for=1, length=len(datagram.payload)).SerializeToString(deterministic=True)
        parts += [_SIZE.pack(len(entry)), entry, datagram.payload]
    return b"".join(parts)


def _decode_queue(data: bytes) -> Iterator[bytes]:
    kinds = messages()
    if data[:_HEAD.size] != _HEAD.pack(kinds.magic["IMG_COMMON"], kinds.magic["SK_QUEUES"]):
        raise ProtocolError("not an sk-queues image: wrong magic")
    position, count = _HEAD.size, 0
    while position != len(data):
        size = _SIZE.unpack_from(data, position)[0]
        begin = position + _SIZE.size
        count += 1
        if size > min(_ENTRY_LIMIT, len(data) - begin) or count > MOST:
            raise ProtocolError("the sk-queues image is out of bounds")
        entry = parse_entry(kinds.sk_packet, data[begin:begin + size])
        position = begin + size + entry.length
        if entry.scm or position > len(data):
            raise ProtocolError("a datagram in the image is cut short, or carries descriptors")
        yield data[begin + size:position]


def _encode_extras(state: DatagramState) -> bytes:
    beside = {name: value for name, value in state.options.items() if BY_NAME[name].criu is None}
    arrived = b"".join(struct.pack("BB", one.hops, one.traffic_class) for one in state.datagrams)
    return json.dumps({"version": EXTRAS_VERSION, "scope_id": state.flow.scope_id, "arrived": arrived.hex(),
                       "options": beside}, sort_keys=True, separators=(",", ":")).encode()


def _decode_extras(text: bytes) -> dict[str, Any]:
    if len(text) > _EXTRAS_LIMIT:
        raise ProtocolError("what travels beside the images is too long")
    extras = json.loads(text)
    if set(extras) != {"version", "scope_id", "arrived", "options"} or extras["version"] != EXTRAS_VERSION:
        raise ProtocolError("what travels beside the images has another version, or unknown or missing fields")
    if type(extras["scope_id"]) is not int or not 0 <= extras["scope_id"] < 1 << 32:
        raise ProtocolError("scope_id is not the index of an interface")
    return dict(extras)
