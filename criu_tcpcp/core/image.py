"""A connection state as CRIU image bytes, and back.

CRIU keeps a connection in two places: an `inet_sk_entry` (in files.img) with addresses and options, and the image
`tcp-stream-<inode>.img`: two magic numbers, the length of a `tcp_stream_entry`, that entry, the receive queue, the send
queue as raw bytes. `Image` holds both, and what CRIU's images have no field for: `extras`, a small JSON object.
pycriu's own loader is not used, since it hands queues over as base64 text and drops fields newer than itself; its
message classes and magic numbers are.

Everything read here may come from another host: lengths are checked against what is there before anything is cut,
numbers by `ConnectionState` itself, unknown keys are refused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import tcp
from .criu import messages
from .endpoint import Flow, Protocol
from .errors import ProtocolError
from .options import BY_NAME, TABLE, Form, Option, OptionValue
from .state import Congestion, ConnectionState, Negotiated, Window
from .tcp import TcpState

EXTRAS_VERSION = 1
_O_RDWR, _O_NONBLOCK = 2, 0o4000
_SHUTDOWN_READ = 1  # CRIU's enum sk_shutdown
_FIN_UNSENT = "fin_unsent"  # there only where it is so
_ENTRY_LIMIT = 1 << 16
_EXTRAS_LIMIT = 1 << 16
_TEXT = re.compile(r"[!-.0-~]{0,15}")  # IFNAMSIZ, TCP_CA_NAME_MAX less the zero; no name of either kind has a slash
_LONGEST_S = (1 << 63) - 1
_HEADER = re.compile(r"([0-9a-f]{2}){0,40}")  # bytes of IP options at most (RFC 791 3.1)
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k
_MOST_INSTRUCTIONS = 4096  # linux/bpf_common.h, BPF_MAXINSNS


@dataclass(frozen=True)
class Image:
    """`inet_sk`: a serialised inet_sk_entry. `tcp_stream`: the bytes of a tcp-stream image, of a UDP socket those of an
    sk-queues image (datagramimage.py). `extras`: JSON text."""

    inet_sk: bytes
    tcp_stream: bytes
    extras: bytes


def encode(state: ConnectionState, inode: int = 0) -> Image:
    """The state in CRIU's format."""
    return Image(encode_inet_sk(state.flow, state.tcp_state, state.nonblocking, state.options, inode, state.shut_read),
                 _encode_stream(state), _encode_extras(state))


def encode_inet_sk(flow: Flow, tcp_state: TcpState, nonblocking: bool, options: Mapping[str, OptionValue],
                   inode: int, shut_read: bool = False) -> bytes:
    """The part of the image that can be made before the connection is held, since it hardly changes: the last few
    are remembered, so that making it again within the freeze costs nothing, on either side (`read_inet_sk`)."""
    return _encode_inet_sk(flow, tcp_state, nonblocking, tuple(options.items()), inode, shut_read)


def read_inet_sk(data: bytes) -> dict[str, OptionValue]:
    """The options in this part, ahead of the rest. Raises ProtocolError as `decode` would."""
    with explained():
        return dict(decode_inet_sk(data, 0)[3])


def decode(image: Image) -> ConnectionState:
    """Inverse of `encode`. Raises ProtocolError for anything that is not an image of a passable connection."""
    with explained():
        stream, received, outgoing = decode_stream(image.tcp_stream)
        extras = _decode_extras(image.extras)
        flow, tcp_state, nonblocking, options, shut_read = decode_inet_sk(image.inet_sk, extras["scope_id"])
        if flow.protocol is not Protocol.TCP:
            raise ProtocolError("the socket in the image is not TCP")
        timestamps = bool(stream.opt_mask & tcp.OPT_TIMESTAMPS)
        return ConnectionState(
            flow=flow, tcp_state=tcp_state, rcv_nxt=stream.inq_seq, received=received,
            write_seq=stream.outq_seq, outgoing=outgoing, unsent=stream.unsq_len,
            negotiated=Negotiated(stream.mss_clamp, bool(stream.opt_mask & tcp.OPT_WSCALE), stream.snd_wscale,
                                  stream.rcv_wscale, bool(stream.opt_mask & tcp.OPT_SACK), timestamps,
                                  bool(stream.opt_mask & tcp.OPT_ECN)),
            window=Window(stream.snd_wl1, stream.snd_wnd, stream.max_window, stream.rcv_wnd, stream.rcv_wup),
            timestamp=stream.timestamp if timestamps else None, ts_recent=extras["ts_recent"],
            congestion=Congestion(**extras["congestion"]),
            options={**dict(options), **decode_options_beside(extras["options"])}, nonblocking=nonblocking,
            fin_unsent=extras[_FIN_UNSENT], shut_read=shut_read)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Whatever goes wrong in the block, an image was not one."""
    try:
        yield
    except ProtocolError:
        raise
    except Exception as error:  # protobuf's DecodeError cannot be named without importing it; all mean one thing
        raise ProtocolError(f"not an image of a connection: {error}") from error


@functools.lru_cache(maxsize=16)
def _encode_inet_sk(flow: Flow, tcp_state: TcpState, nonblocking: bool, options: tuple[tuple[str, OptionValue], ...],
                    inode: int, shut_read: bool) -> bytes:
    kinds, values = messages(), dict(options)
    entry = kinds.inet_sk(
        id=1, ino=inode & 0xFFFFFFFF, family=flow.socket_family, type=flow.protocol.socket_type,
        proto=int(flow.protocol), state=int(tcp_state), src_port=flow.local.port, dst_port=flow.peer.port,
        flags=_O_RDWR | (_O_NONBLOCK if nonblocking else 0), backlog=0,
        src_addr=_address_words(flow, flow.local.address.packed),
        dst_addr=_address_words(flow, flow.peer.address.packed),
        fown=kinds.fown(uid=0, euid=0, signum=0, pid_type=0, pid=0))
    for option in TABLE:
        if option.criu is not None and option.name in values:
            _set_field(entry, option, values[option.name])
    if shut_read:
        entry.shutdown = _SHUTDOWN_READ
    for name in ("so_sndbuf", "so_rcvbuf", "so_snd_tmo_sec", "so_snd_tmo_usec", "so_rcv_tmo_sec", "so_rcv_tmo_usec"):
        if not entry.opts.HasField(name):  # required by the message class
            setattr(entry.opts, name, 0)
    return bytes(entry.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=16)
def decode_inet_sk(data: bytes, scope_id: int
                   ) -> tuple[Flow, TcpState, bool, tuple[tuple[str, OptionValue], ...], bool]:
    """(flow, TCP state, whether the descriptor does not block, the options that CRIU has fields for, whether the
    program has shut down for reading)."""
    if len(data) > _ENTRY_LIMIT:
        raise ProtocolError("the inet_sk_entry is too long")
    entry = parse_entry(messages().inet_sk, data)
    options = [(option.name, value) for option in TABLE if option.criu is not None
               and (value := _get_field(entry, option)) is not None]
    tcp_state = TcpState(entry.state)
    # CRIU writes what the kernel has (sk_shutdown): a FIN that was received is in that, too.
    shut_read = bool(entry.shutdown & _SHUTDOWN_READ) and tcp_state not in tcp.FIN_RECEIVED_STATES
    return (flow_of_entry(entry, scope_id), tcp_state, bool(entry.flags & _O_NONBLOCK), tuple(options), shut_read)


def _address_words(flow: Flow, packed: bytes) -> list[int]:
    """CRIU's form: the address as it lies in memory, in 32-bit words of the host's byte order."""
    if flow.mapped:
        packed = b"\0" * 10 + b"\xff\xff" + packed
    return list(struct.unpack(f"={len(packed) // 4}I", packed))


def flow_of_entry(entry: Any, scope_id: int) -> Flow:
    """The addresses of an inet_sk_entry. ProtocolError, ValueError where it is no connection of a protocol that is
    passed."""
    if entry.family not in (socket.AF_INET, socket.AF_INET6) or entry.proto not in list(Protocol) \
            or entry.type != Protocol(entry.proto).socket_type:
        raise ProtocolError("the socket in the image is neither TCP nor UDP over IPv4 or IPv6")
    width = 1 if entry.family == socket.AF_INET else 4
    names = []
    for words, port in ((entry.src_addr, entry.src_port), (entry.dst_addr, entry.dst_port)):
        if len(words) < width:
            raise ProtocolError("an address in the image is too short")
        packed = struct.pack(f"={width}I", *words[:width])
        text = socket.inet_ntop(entry.family, packed)
        names.append((text, port) if width == 1 else (text, port, 0, scope_id))
    return Flow.from_names(names[0], names[1], Protocol(entry.proto))


def parse_entry(kind: Any, data: bytes) -> Any:
    """A message of this class. protobuf's Python implementation does not miss required fields by itself, and it takes
    what ends before its bytes do (at the end of a group that never began)."""
    entry = kind.FromString(data)
    if not entry.IsInitialized():
        raise ProtocolError(f"a {kind.DESCRIPTOR.name} lacks required fields")
    if entry.ByteSize() != len(data):
        raise ProtocolError(f"a {kind.DESCRIPTOR.name} says something twice, or something follows it")
    return entry


def _encode_stream(state: ConnectionState) -> bytes:
    kinds = messages()
    negotiated, window = state.negotiated, state.window
    mask = ((tcp.OPT_TIMESTAMPS if negotiated.timestamps else 0) | (tcp.OPT_SACK if negotiated.sack else 0)
            | (tcp.OPT_WSCALE if negotiated.wscale else 0) | (tcp.OPT_ECN if negotiated.ecn else 0))
    entry = kinds.tcp_stream(
        inq_len=len(state.received), inq_seq=state.rcv_nxt, outq_len=len(state.outgoing), outq_seq=state.write_seq,
        opt_mask=mask, snd_wscale=negotiated.snd_wscale, rcv_wscale=negotiated.rcv_wscale,
        mss_clamp=negotiated.mss_clamp, unsq_len=state.unsent, snd_wl1=window.snd_wl1, snd_wnd=window.snd_wnd,
        max_window=window.max_window, rcv_wnd=window.rcv_wnd, rcv_wup=window.rcv_wup)
    if state.timestamp is not None:
        entry.timestamp = state.timestamp
    body = entry.SerializeToString(deterministic=True)
    head = struct.pack("=III", kinds.magic["IMG_COMMON"], kinds.magic["TCP_STREAM"], len(body))
    return b"".join((head, body, state.received, state.outgoing))


def decode_stream(data: bytes) -> tuple[Any, bytes, bytes]:
    """(tcp_stream_entry, receive queue, send queue) of a tcp-stream image, ours or CRIU's."""
    kinds = messages()
    if len(data) < 12:
        raise ProtocolError("the tcp-stream image is cut short")
    common, kind, length = struct.unpack_from("=III", data)
    if common != kinds.magic["IMG_COMMON"] or kind != kinds.magic["TCP_STREAM"]:
        raise ProtocolError("not a tcp-stream image: wrong magic")
    if length > min(_ENTRY_LIMIT, len(data) - 12):
        raise ProtocolError("the tcp-stream image's entry is longer than the image")
    entry = parse_entry(kinds.tcp_stream, data[12:12 + length])
    queues = memoryview(data)[12 + length:]
    if entry.inq_len + entry.outq_len != len(queues):
        raise ProtocolError("the queues in the tcp-stream image are not as long as it says")
    return entry, bytes(queues[:entry.inq_len]), bytes(queues[entry.inq_len:])


def _encode_extras(state: ConnectionState) -> bytes:
    beside = {name: value for name, value in state.options.items() if BY_NAME[name].criu is None}
    extras = {"version": EXTRAS_VERSION, "scope_id": state.flow.scope_id, "ts_recent": state.ts_recent,
              "congestion": vars(state.congestion), "options": beside}
    if state.fin_unsent:
        extras[_FIN_UNSENT] = True
    return json.dumps(extras, sort_keys=True, separators=(",", ":")).encode()


def _decode_extras(text: bytes) -> dict[str, Any]:
    if len(text) > _EXTRAS_LIMIT:
        raise ProtocolError("what travels beside the images is too long")
    extras = json.loads(text)
    if extras.get("version") != EXTRAS_VERSION:
        raise ProtocolError(f"what travels beside the images has version {extras.get('version')}, "
                            f"this program reads {EXTRAS_VERSION}")
    if type(extras.setdefault(_FIN_UNSENT, False)) is not bool:
        raise ProtocolError(f"{_FIN_UNSENT} is neither true nor false")
    if set(extras) - {_FIN_UNSENT} != {"version", "scope_id", "ts_recent", "congestion", "options"}:
        raise ProtocolError("what travels beside the images has unknown or missing fields")
    if extras["ts_recent"] is not None:
        _number("ts_recent", extras["ts_recent"], 0, tcp.MODULUS - 1)
    _number("scope_id", extras["scope_id"], 0, (1 << 32) - 1)
    for name, value in extras["congestion"].items():
        _number(name, value, 0, (1 << 32) - 1)
    return dict(extras)


def _set_field(entry: Any, option: Option, value: OptionValue) -> None:
    *path, name = (option.criu or "").split(".")
    for part in path:
        entry = getattr(entry, part)
    if option.form is Form.TIMEVAL and isinstance(value, tuple):
        setattr(entry, f"{name}_sec", value[0])
        setattr(entry, f"{name}_usec", value[1])
    elif option.form is Form.LINGER and isinstance(value, tuple):
        if value[0]:  # CRIU notes only a lingering socket
            setattr(entry, name, _unsigned(value[1]))
    elif option.form is Form.TEXT:
        if value:
            setattr(entry, name, value)
    elif option.form is Form.FILTER and isinstance(value, str):
        getattr(entry, name).extend(_instructions(bytes.fromhex(value)))
    else:
        field = entry.DESCRIPTOR.fields_by_name[name]
        setattr(entry, name, bool(value) if field.type == field.TYPE_BOOL else _unsigned(value))


def _get_field(entry: Any, option: Option) -> OptionValue | None:
    *path, name = (option.criu or "").split(".")
    for part in path:
        entry = getattr(entry, part)
    if option.form is Form.TIMEVAL:
        return (_number(option.name, int(getattr(entry, f"{name}_sec")), 0, _LONGEST_S),
                _number(option.name, int(getattr(entry, f"{name}_usec")), 0, 999_999))
    if option.form is Form.FILTER:
        return _filter_bytes(getattr(entry, name)).hex()
    if not entry.HasField(name):
        absent: dict[Form, OptionValue] = {Form.LINGER: (0, 0), Form.TEXT: ""}
        return absent.get(option.form)
    value = getattr(entry, name)
    if option.form is Form.LINGER:
        return (1, _signed(value))
    return _text(option.name, value) if option.form is Form.TEXT else _signed(value)


def _instructions(program: bytes) -> list[int]:
    """CRIU's form of struct sock_filter: a number, whose highest digits are the code, and whose lowest is k."""
    return [code << 48 | jt << 40 | jf << 32 | k for code, jt, jf, k in _INSTRUCTION.iter_unpack(program)]


def _filter_bytes(numbers: Sequence[int]) -> bytes:
    if len(numbers) > _MOST_INSTRUCTIONS:
        raise ProtocolError("the filter in the image is too long")
    return b"".join(_INSTRUCTION.pack(one >> 48, one >> 40 & 0xFF, one >> 32 & 0xFF, one & 0xFFFFFFFF)
                    for one in numbers)


def _unsigned(value: OptionValue) -> int:
    """An int as CRIU's uint32 fields hold it: SO_MARK with its highest bit set, or a linger time without end, is
    -1 here."""
    return int(value) & 0xFFFFFFFF if not isinstance(value, tuple) else 0


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else int(value)


def _text(name: str, value: str) -> str:
    if not _TEXT.fullmatch(value):
        raise ProtocolError(f"the value of {name} is no name")
    return str(value)


def _number(name: str, value: Any, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ProtocolError(f"{name} is not a number from {lowest} to {highest}")
    return value


def decode_options_beside(beside: dict[str, Any]) -> dict[str, OptionValue]:
    options: dict[str, OptionValue] = {}
    for name, value in beside.items():
        row = BY_NAME.get(name)
        if row is None or row.criu is not None:
            raise ProtocolError(f"unknown socket option {name!r} beside the images")
        if row.form is Form.INT:
            options[name] = _number(name, value, -(1 << 31), (1 << 31) - 1)
        elif row.form is Form.LONG:
            options[name] = _number(name, value, 0, (1 << 64) - 1)
        elif row.form is Form.PAIR and type(value) is list and len(value) == 2:
            options[name] = (_number(name, value[0], -(1 << 31), (1 << 31) - 1),
                             _number(name, value[1], 0, (1 << 32) - 1))
        elif row.form is Form.TEXT and type(value) is str:
            options[name] = _text(name, value)
        elif row.form is Form.BYTES and type(value) is str and _HEADER.fullmatch(value):
            options[name] = value
        else:
            raise ProtocolError(f"the value of {name} has the wrong form")
    return options
