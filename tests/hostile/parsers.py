"""Every parser that reads what others wrote: how its inputs are made, and what it may answer.

A parser's function does with an input what the tool would do up to the first thing that is touched, and holds what was
accepted against what its users rely upon. It raises one of the parser's `refusals`, or returns; anything else is a bug.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gzip
import io
import ipaddress
import json
import os
import socket
import struct
import tarfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import zstandard

from criu_tcpcp import application, apps, features, graft, journal, verify
from criu_tcpcp.cli import cmd_show, console
from criu_tcpcp.core import criu, datagramimage, datagramplan, imageset, messages, tcp, tls
from criu_tcpcp.core.address import InterfaceAddress
from criu_tcpcp.core.datagram import DatagramState
from criu_tcpcp.core.endpoint import Endpoint, Flow, Protocol
from criu_tcpcp.core.errors import LinkError, TcpcpError
from criu_tcpcp.core.image import Image, decode, encode, read_inet_sk
from criu_tcpcp.core.options import BY_NAME
from criu_tcpcp.core.recall import MAX_BYTES
from criu_tcpcp.core.reorder import Reorder
from criu_tcpcp.core.restoreplan import (
    ForceBuffers,
    InjectSegment,
    RecallPath,
    SetNegotiated,
    SetOption,
    SetSequence,
    SetTimestamp,
    SetWindow,
    Step,
    activation_steps,
    clock_steps,
    describe,
    dormant_steps,
)
from criu_tcpcp.core.state import ConnectionState, Window, fitted
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.executor import event_of
from criu_tcpcp.graft.replacing import Place
from criu_tcpcp.journal import Journal
from criu_tcpcp.kernel import netlink, process, rawdatagram, rawpacket, sockopt, tap
from criu_tcpcp.kernel.addresses import Held
from criu_tcpcp.origin.extraction import parts_of
from criu_tcpcp.pipeline import archive
from criu_tcpcp.redirect import Plan
from criu_tcpcp.transport.known_hosts import judge, known_keys
from criu_tcpcp.transport.ssh_config import Hop, resolve
from criu_tcpcp.transport.target import LocalTarget, Target, parse_host, target_from_json
from criu_tcpcp.verify import builder
from madeup import passed
from states import FLOWS, datagram_states, plain

from .mutation import NUMBERS, bent_bytes, bent_some, bent_text, bent_value, cut, is_rare, odd

ID = "0123456789abcdef"
MODULUS = 1 << 32
ADDRESS = {"address": "192.0.2.9", "prefix_length": 24, "broadcast": "192.0.2.255", "scope": 0, "label": ":vip",
           "flags": 0x200, "metric": 7, "deprecated": False}
OPTIONS = {"SO_SNDBUF": 87040, "SO_RCVBUF": 131072, "SO_RCVTIMEO": (1, 500000), "SO_SNDTIMEO": (0, 0),
           "SO_BINDTODEVICE": "", "SO_ATTACH_FILTER": "", "SO_LINGER": (1, 5), "SO_MARK": 7, "TCP_NODELAY": 1,
           "TCP_CONGESTION": "cubic"}


@dataclass(frozen=True)
class Parser:
    """`make`: an input. `parse`: raises one of `refusals`, or accepts. `never_refuses`: there is nothing that it may
    not be given."""

    name: str
    make: Callable[[Random], Any]
    parse: Callable[[Any], object]
    refusals: tuple[type[Exception], ...] = (TcpcpError,)
    never_refuses: bool = False


# -- what the other side says ------------------------------------------------------------------------------------------

def _states() -> list[ConnectionState]:
    half = plain(options=OPTIONS, tcp_state=TcpState.CLOSE_WAIT, window=Window(998, 1, 1, 100, 999))
    return [half, *(plain(options=OPTIONS, flow=flow) for flow in FLOWS.values())]


@functools.cache
def _images() -> list[Image]:
    return [encode(state, 1234) for state in _states()]


@functools.cache
def _messages() -> list[messages.Message]:
    flow, image = FLOWS["v6"].to_json(), _images()[1]
    parts = (image.inet_sk, image.tcp_stream, image.extras, b"state")
    return [messages.Hello(messages.PROTOCOL, "0.1.0", "host", "boot", [4, 4026531840]),
            messages.Stage(ID, flow, "receiver:/run/x.sock", "auto", image.inet_sk, 500, True, b"AUTH x\r\n"),
            messages.Staged(ID, "n" * 32, True, "receiver", True), messages.Refused(ID, "no", "why"),
            messages.Prepare(ID, "n" * 32, *parts), messages.Prepared(ID), messages.Commit(ID, 5),
            messages.Committed(ID), messages.Active(ID, ["left"], ["note"], [["restore", 0.5]]),
            messages.Abort(ID, "why"), messages.Aborted(ID, "why"), messages.Query(ID),
            messages.Activate(ID, 5, *parts), messages.Lost(ID, "why"), messages.Settled(ID), messages.Ask(ID, flow),
            messages.Standing(ID, True), messages.Imminent(ID), messages.Adopt(ID, ADDRESS, "02:00:00:00:00:01", True),
            messages.Adopted(ID, "left"), messages.Try("nfqueue"),
            messages.Tried([{"name": "x", "meaning": "y", "required": True, "problem": None}])]


def _frame(rng: Random) -> list[bytes]:
    frame = messages.encode(rng.choice(_messages()))
    if rng.randrange(3):
        kind, length = struct.unpack_from(">BI", frame, 4)
        header, blobs = json.loads(frame[9:9 + length]), frame[9 + length:]
        if rng.randrange(8):
            header = bent_value(rng, header)
        text = json.dumps(header).encode()
        text = bent_bytes(rng, text) if is_rare(rng, 8) else text
        kind = rng.randrange(32) if is_rare(rng, 16) else kind
        body = struct.pack(">BI", kind, len(text)) + text + (bent_bytes(rng, blobs) if is_rare(rng, 4) else blobs)
        frame = struct.pack(">I", len(body)) + body
    else:
        frame = bent_bytes(rng, frame)
    return cut(rng, frame + (frame if is_rare(rng, 8) else b""))


def _hear(pieces: list[bytes]) -> None:
    decoder = messages.Decoder()
    heard = [message for piece in pieces for message in decoder.feed(piece)]
    if not heard:
        raise LinkError("it ends in the middle")
    for message in heard:
        _use(message)


def _use(message: messages.Message) -> None:
    """As serve, the destination, the origin and the report do."""
    for value in vars(message).values():
        if isinstance(value, str):
            console._printable(value).encode()
    match message:
        case messages.Stage():
            Journal(message.pass_id, journal.DESTINATION)
            Flow.from_json(message.flow)
            graft.check_name(message.into)
            os.fsencode(message.into)
            read_inet_sk(message.inet_sk)
        case messages.Ask():
            _address(Flow.from_json(message.flow))
        case messages.Prepare() | messages.Activate():
            event_of(message, ID)
            _restore(Image(message.inet_sk, message.tcp_stream, message.extras))
        case messages.Active():
            event_of(message, ID)
            json.dumps([(str(name), float(ms)) for name, ms in message.steps], allow_nan=False)
            "".join(message.left + message.notes).encode()
        case messages.Adopt():
            found = InterfaceAddress.from_json(message.address)
            assert InterfaceAddress.from_json(found.to_json()) == found
            assert found.address in found.network
        case messages.Tried():
            for one in message.features:
                features._feature(one)
        case messages.Hello():
            assert all(type(number) is int for number in message.network)
        case _ if hasattr(message, "pass_id"):
            event_of(message, ID)


def _address(flow: Flow) -> None:
    """As sock_diag is asked, and addresses are bound."""
    struct.pack("=III", flow.scope_id, 0, 0)
    for end in (flow.local, flow.peer):
        struct.pack(">H", end.port)
        assert ipaddress.ip_address(str(end.address)).packed == end.address.packed
    assert Flow.from_json(flow.to_json()) == flow


def _image(rng: Random) -> Image:
    good = rng.choice(_images())
    part = rng.choice(("inet_sk", "tcp_stream", "extras", "none"))
    if part == "none":
        return good
    data: bytes = getattr(good, part)
    if is_rare(rng, 3):
        return replace(good, **{part: bent_bytes(rng, data)})
    if part == "extras":
        return replace(good, extras=json.dumps(bent_value(rng, json.loads(data))).encode())
    if part == "inet_sk":
        return replace(good, inet_sk=_bent_entry(rng, criu.messages().inet_sk.FromString(data)))
    length = struct.unpack_from("=I", data, 8)[0]
    entry = _bent_entry(rng, criu.messages().tcp_stream.FromString(data[12:12 + length]))
    return replace(good, tcp_stream=data[:8] + struct.pack("=I", len(entry)) + entry + data[12 + length:])


@functools.cache
def _datagram_images() -> list[Image]:
    return [datagramimage.encode(state, 1234) for state in datagram_states()]


def _datagram_image(rng: Random) -> Image:
    good = rng.choice(_datagram_images())
    part = rng.choice(("inet_sk", "tcp_stream", "extras", "none"))
    if part == "none":
        return good
    data: bytes = getattr(good, part)
    if part == "extras" and rng.randrange(3):
        return replace(good, extras=json.dumps(bent_value(rng, json.loads(data))).encode())
    if part == "inet_sk" and rng.randrange(3):
        return replace(good, inet_sk=_bent_entry(rng, criu.messages().inet_sk.FromString(data)))
    return replace(good, **{part: bent_bytes(rng, data)})


def _restore_datagrams(image: Image) -> DatagramState:
    state = datagramimage.decode(image)
    _address(state.flow)
    assert datagramimage.decode(datagramimage.encode(state)) == state
    for datagram in state.datagrams:
        rawdatagram.build_datagram(state.flow.peer, state.flow.local, datagram.payload, hops=datagram.hops,
                                   traffic_class=datagram.traffic_class)
    for step in [*datagramplan.dormant_steps(state), *datagramplan.activation_steps(state)]:
        if isinstance(step, SetOption):
            sockopt.packed(BY_NAME[step.name], step.value)
    return state


def _bent_entry(rng: Random, entry: Any) -> bytes:
    """With one or two of its fields another number, or none."""
    for _ in range(rng.randint(1, 2)):
        part = entry
        names = list(part.DESCRIPTOR.fields_by_name)
        if "opts" in names and rng.randrange(2):
            part = entry.opts
            names = list(part.DESCRIPTOR.fields_by_name)
        field = part.DESCRIPTOR.fields_by_name[rng.choice(names)]
        if is_rare(rng, 4):
            part.ClearField(field.name)
            continue
        with contextlib.suppress(ValueError, TypeError, AttributeError, UnicodeEncodeError):
            if field.cpp_type == field.CPPTYPE_STRING:
                setattr(part, field.name, odd(rng))
                continue
            old = getattr(part, field.name)
            wide = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
            number = (int(old) + rng.choice((-1, 1)) if type(old) in (int, bool) and rng.randrange(2)
                      else rng.choice(NUMBERS)) % (1 << wide)
            setattr(part, field.name, bool(number) if field.cpp_type == field.CPPTYPE_BOOL else number)
    return bytes(entry.SerializePartialToString())


def _restore(image: Image) -> None:
    """Everything up to the system calls."""
    state = decode(image)
    _address(state.flow)
    for one in (state, fitted(state, {"SO_RCVBUF": 1, "TCP_NODELAY": 0}, True)):
        steps = [*dormant_steps(one), *clock_steps(one, 5), *activation_steps(one)]
        for step in steps:
            _check_step(step)
        describe(one.flow, steps)
    assert decode(encode(state)) == state


def _check_step(step: Step) -> None:
    """It can be said to the kernel (kernel/repair.py)."""
    match step:
        case SetOption(name, value):
            sockopt.packed(BY_NAME[name], value)
        case ForceBuffers(receive, send):
            assert 0 < receive < 1 << 31
            assert 0 < send < 1 << 31
        case SetSequence(_, number) | SetTimestamp(number):
            assert 0 <= number < MODULUS
        case SetWindow(window):
            assert all(0 <= number < MODULUS for number in vars(window).values())
        case SetNegotiated(mss, scales):
            assert 0 < mss < 1 << 16
            assert scales is None or max(scales) <= tcp.MAX_WSCALE
        case RecallPath(bytes_, clock, segment):
            assert 0 < bytes_ <= MAX_BYTES
            assert clock is None or 0 <= clock < MODULUS
            _check_step(segment)
        case InjectSegment():
            rawpacket.build_segment(FLOWS["v4"].peer, FLOWS["v4"].local, sequence=step.sequence,
                                    acknowledgement=step.acknowledgement, flags=16, window=step.window,
                                    timestamps=(step.timestamp, step.echo) if step.timestamp is not None else None)


# -- what lies on a disk -----------------------------------------------------------------------------------------------

@functools.cache
def _directories() -> list[dict[str, bytes]]:
    kinds, more = criu.messages(), criu.directory_messages()
    ours = imageset.write(_images()[1], 1234, imageset.Owner(42, "server", (7, 9)), b"state", {"id": ID})
    entries = [kinds.inet_sk.FromString(one.inet_sk) for one in _images()]
    for number, entry in enumerate(entries, 1):
        entry.id, entry.ino = number, 0xABC + number
    ids = more.ids(vm_id=1, files_id=2, fs_id=1, sighand_id=1)
    theirs = {
        "inventory.img": imageset._image("INVENTORY", [more.inventory(img_version=2)]),
        "files.img": imageset._image("FILES", [kinds.file(type=4, id=one.id, isk=one) for one in entries]),
        "fdinfo-2.img": imageset._image("FDINFO", [kinds.fdinfo(id=one.id, flags=0, type=4, fd=10 + one.id)
                                                   for one in entries]),
        "ids-77.img": imageset._image("IDS", [ids]),
        **{imageset.stream_name(0xABC + number): one.tcp_stream for number, one in enumerate(_images(), 1)}}
    return [ours, theirs]


def _directory(rng: Random) -> dict[str, bytes]:
    files = dict(rng.choice(_directories()))
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(files))
        if name == imageset.OURS and rng.randrange(4):
            files[name] = json.dumps(bent_value(rng, json.loads(_directories()[0][name]))).encode()
        elif name == "files.img" and rng.randrange(3):
            files[name] = _bent_files(rng, files[name])
        elif is_rare(rng, 8):
            del files[name]
        elif is_rare(rng, 8):
            files[name] = files[rng.choice(list(files))]
        else:
            files[name] = bent_bytes(rng, files[name])
        if not files:
            break
    return files


def _bent_files(rng: Random, data: bytes) -> bytes:
    with contextlib.suppress(TcpcpError):
        entries = list(imageset._entries({"files.img": data}, "files.img", "FILES", criu.messages().file))
        if entries:
            _bent_entry(rng, rng.choice(entries).isk)
        return imageset._image("FILES", [entry for entry in entries if entry.IsInitialized()])
    return data


def _show(files: dict[str, bytes]) -> None:
    about = imageset.about(files)
    for one in imageset.read(files):
        json.dumps(cmd_show._object(one, about, payload=True))
        assert one.whole or one.problem or imageset.OURS not in files or one.stream is not None


@functools.cache
def _archives() -> list[bytes]:
    """As engines make them: what tells of connections is a small part."""
    found = []
    for files, kind in zip((*_directories(), _directories()[1]), (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT,
                                                                  tarfile.USTAR_FORMAT), strict=True):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=kind) as tar:
            for name, data in {"config.dump": b"{}", "checkpoint/pages-1.img": bytes(9000),
                               **{f"checkpoint/{name}": data for name, data in files.items()},
                               f"checkpoint/{'long/' * 25}": b"name"}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        found.append(made.getvalue())
    return found


def _archive(rng: Random) -> bytes:
    """Bent before it is compressed, or after; a header is bent with its checksum right."""
    data = rng.choice(_archives())
    if rng.randrange(3):
        data = _bent_header(rng, data) if rng.randrange(2) else bent_bytes(rng, data)
    packed = rng.choice((bytes, gzip.compress, zstandard.compress))(data)
    return bent_bytes(rng, packed) if is_rare(rng, 3) else packed


def _bent_header(rng: Random, data: bytes) -> bytes:
    begin = rng.randrange(len(data) // 512) * 512
    header = bytearray(data[begin:begin + 512])
    field = rng.choice(((124, 12), (156, 1), (257, 8), (345, 100)))  # size, typeflag, magic, prefix: pax(1)
    value = rng.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, rng.randbytes(12), b"x", b"g", b"L", b"S", b"1"))
    header[field[0]:field[0] + field[1]] = value[:field[1]].ljust(field[1], b"\0")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:begin] + bytes(header) + data[begin + 512:]


def _unpack(data: bytes) -> None:
    with os.fdopen(os.memfd_create("archive"), "wb", buffering=0) as file:
        file.write(data)
        _show(archive.read(f"/proc/self/fd/{file.fileno()}"))


@functools.cache
def _records() -> list[dict[str, Any]]:
    flow = FLOWS["v4"].to_json()
    target = Target("dest", "root", 22, ("/key",), None, "/known").to_json()
    local = LocalTarget(("criu-tcpcp", "serve"), "/run/netns/x", {"A": "b"}).to_json()
    plan = Plan("forward", "same link", ipaddress.ip_address("192.0.2.7"), 3).to_json()
    place = Place(9, "/dev/null", 2, ((5, 1, 9),)).to_json()
    intent = {"record": "intent", "flow": flow, "pid": 42, "start_time": 99, "descriptors": [7], "cookie": 5,
              "inode": 6, "target": target, "host": "dest", "destination_boot": "b", "plan": plan, "into": "receiver",
              "origin_sees": "reset", "settle_s": 10.0, "doubt_limit_s": 5.0}
    records: list[dict[str, Any]] = [
        {"record": "claimed", "flow": flow}, intent, {**intent, "target": local},
        {"record": "offered", "extracted_at_ms": 5, "offered_at_ms": 6}, {"record": "committed"},
        {"record": "staged", "flow": flow, "into": "auto", "divert": True, "keeps_fence": False, "way": "receiver:/x",
         "taker": [42, 99], "has_prologue": False},
        {"record": "images", "place": "/d", "connection": "a <-> b", "flow_json": flow},
        {"record": "taken", "taker": [42, 99], "inode": 5, "cookie": 6, "descriptor": 7, "injected": False,
         "place": place}, {"record": "thrown", "thrown": flow, "sequence": 5, "fences": True},
        {"record": "address", "phase": "leaving", "held": {"what": ADDRESS, "interface": 2, "name": "eth0"}}]
    return [{**one, "boot": "this"} for one in records]


def _log(rng: Random) -> bytes:
    lines = []
    for one in rng.choices(_records(), k=rng.randint(1, 3)):
        text = json.dumps(bent_value(rng, one) if rng.randrange(4) else one).encode()
        lines.append(bent_bytes(rng, text) if is_rare(rng, 4) else text)
    return b"\n" + b"\n".join(lines) + b"\n"


def _read_log(log: bytes) -> None:
    """As settle, resolve and a later serve do (settle.py, origin/side.py, destination.py)."""
    records = journal._records_of(log)
    if not records:
        raise LinkError("no record is whole")
    for one in records:
        if one["record"] == "intent":
            _address(Flow.from_json(one["flow"]))
            assert target_from_json(one["target"])
            Plan.from_json(one["plan"])
            process.Identity(one["pid"], one["start_time"])
            one["host"].encode(errors="replace")
            assert one["descriptors"][0] is not None
        elif one["record"] == "address":
            assert one["phase"] is not None
            Held.from_json(one["held"])
        elif one["record"] in ("staged", "taken"):
            assert process.Identity(*one["taker"]).pid is not None
            if one.get("place"):
                Place.from_json(one["place"])
        elif one["record"] == "thrown":
            Flow.from_json(one["thrown"])
            tcp.add(one["sequence"], 1)


def _saved(rng: Random) -> bytes:
    image = _image(rng)
    data = b"".join(len(part).to_bytes(8, "big") + part
                    for part in (image.inet_sk, image.tcp_stream, image.extras, b"application"))
    return bent_bytes(rng, data) if rng.randrange(2) else data


def _resume(saved: bytes) -> None:
    inet_sk, tcp_stream, extras, _app_state = parts_of(saved)
    _restore(Image(inet_sk, tcp_stream, extras))


# -- captures and counters ---------------------------------------------------------------------------------------------

@functools.cache
def _captures() -> list[bytes]:
    packets = passed().packets
    frames = builder.frames_of(packets)
    sixth = [replace(one, ip_version=6, src=_six(one.src), dst=_six(one.dst)) for one in packets]
    frames_6 = [*builder.frames_of(sixth), (sixth[-1].time_ns, builder.icmp(sixth[-1]), 200)]
    return [builder.pcap(frames), builder.pcapng(frames), builder.pcap(frames_6, order=">", nanoseconds=False),
            builder.pcapng(frames_6, order=">", resolution=0x8A)]


def _six(end: Endpoint) -> Endpoint:
    return Endpoint(ipaddress.IPv6Address(b"\x20\x01" + bytes(10) + end.address.packed), end.port)


def _capture(rng: Random) -> tuple[bytes, bool]:
    """And whether it is to be judged, which takes its time."""
    data = rng.choice(_captures())
    return (bent_bytes(rng, data) if rng.randrange(8) else data), is_rare(rng, 20)


def _judge_capture(given: tuple[bytes, bool]) -> None:
    data, judged = given
    capture = verify.parse(data, "peer", verify.Role.PEER)
    if judged and capture.packets:
        flows = [one.flow for one in verify.find_connections([capture]) if one.flow is not None]
        for flow, captures in verify.narrowed([capture], flows).items():
            for violation in verify.verify(captures, flow, verify.Expectations(passes=1)).violations:
                str(violation)


COUNTERS = ("TcpExt: TCPTimeouts TCPAbortOnData PAWSEstab\nTcpExt: 0 5 17\nIpExt: InOctets OutOctets\n"
            "IpExt: 99999999999 5\n")


def _counters(rng: Random) -> str:
    return bent_some(rng, COUNTERS, 3)


# -- packets, netlink, processes ---------------------------------------------------------------------------------------

def _packet(rng: Random) -> tuple[bytes, int]:
    version = rng.choice((4, 6))
    flow = FLOWS["v4" if version == 4 else "v6"]
    packet = rawpacket.build_segment(flow.peer, flow.local, sequence=rng.getrandbits(32),
                                     acknowledgement=rng.getrandbits(32), flags=rng.randrange(256), window=500,
                                     timestamps=(5, 6) if rng.randrange(2) else None, payload=b"x" * rng.randrange(200))
    packet = bent_bytes(rng, packet) if rng.randrange(4) else packet
    return packet[:120], version  # what a queue shows


def _take_packet(given: tuple[bytes, int]) -> None:
    packet, version = given
    stamps = tap._timestamps(packet, version)
    for protocol in Protocol:
        rawpacket.is_knock(packet, protocol, version)
    assert stamps is None or all(0 <= number < MODULUS for number in stamps)
    begin, length = rawpacket.extent(packet, version)
    assert 0 <= begin < MODULUS
    assert 0 <= length < 1 << 17
    order = Reorder(1000)
    gone = [*order.came(1, begin, length), *order.came(2, 1000, 1), *order.give_up()]
    assert sorted(gone) == [1, 2]
    if rawpacket.headers(packet, version) is None:
        raise LinkError("no segment")


def _answer(rng: Random) -> bytes:
    inner = netlink.nested(3, netlink.be32(1, 5), netlink.text(2, "name"))
    body = b"".join((netlink.be16(1, 7), netlink.be64(2, 9), inner))
    data = b"".join(netlink.message(0x0300 + number, 0, 2, number, body, number) for number in range(rng.randint(1, 3)))
    return bent_bytes(rng, data) if rng.randrange(4) else data


def _take_answer(data: bytes) -> None:
    found = list(netlink.messages(data))
    for _kind, _sequence, payload in found:
        for _number, value in netlink.attributes(payload[4:]):
            list(netlink.attributes(value))
    if not found:
        raise LinkError("no message")


_LIBC = ctypes.CDLL(None)
_PR_SET_NAME, _OWN_NAME = 15, b"hostile-name"
_ENDINGS = ("\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", ")", " ", "\t", "\x1b", "\udcff")


def _name(rng: Random) -> bytes:
    text = rng.choice(("TracerPid:\t7", "State:\tZ", ") Z 1 1", "x", "Seccomp:\t0"))
    for _ in range(rng.randint(0, 3)):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(_ENDINGS) + text[at:]
    data = text.encode(errors="surrogateescape")
    return (bent_bytes(rng, data) if is_rare(rng, 4) else data).replace(b"\0", b"")[:15]


def _look_at_process(name: bytes) -> None:
    """This very thread calls itself so."""
    _LIBC.prctl(_PR_SET_NAME, name, 0, 0, 0)
    pid = os.getpid()
    try:
        assert process.tracer_of(pid) == 0
        assert process.parent(pid) == os.getppid()
        assert process.run_state(pid) == "R"
        assert process.name(pid).isprintable() or not name
    finally:
        _LIBC.prctl(_PR_SET_NAME, _OWN_NAME, 0, 0, 0)


def _queue(rng: Random) -> bytes:
    record = b"\x17\x03\x03\x00\x20" + b"x" * 32
    data = b"".join(rng.choice((record, record, b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.0\r\n", rng.randbytes(20)))
                    for _ in range(rng.choice((0, 1, 3, 600))))
    return bent_bytes(rng, data) if rng.randrange(2) else data


def _sniff(queue: bytes) -> None:
    if not tls.has_records(queue):
        raise LinkError("no TLS")


# -- the way to the other host -----------------------------------------------------------------------------------------

#: Nothing in it runs a program, or asks for a name.
SSH_CONFIG = ("Host dest *.example !bad\n  HostName %h.lan\n  Port 2222\n  User root\n  IdentityFile ~/.ssh/%u_%r\n"
              "  ProxyJump jump@gate:2200\n  ConnectTimeout 5\n  UserKnownHostsFile ~/a \"~/b c\"\n  HostKeyAlias x\n"
              "Match host gate\n  ProxyJump none\n  AddressFamily inet6\n  IdentityAgent $SSH_AUTH_SOCK\nHost *\n"
              "  IdentitiesOnly yes\n  ProxyCommand none\n")


def _config(rng: Random) -> str:
    lines = SSH_CONFIG.splitlines(keepends=True)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                lines.insert(at, rng.choice(lines))
            case 1:
                lines[at] = lines[at].split()[0] + f" {odd(rng)}\n"
            case _:
                lines[at] = bent_text(rng, lines[at])
    text = "".join(lines).encode(errors="replace").decode()  # as it is read
    return SSH_CONFIG if "exec" in text.lower() or "canonical" in text.lower() else text


def _find_way(text: str) -> None:
    for hop in resolve(Target("dest"), "/home/x", text):
        assert hop.known_hosts_name
        str(hop).encode(errors="replace")


KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIGYk2m5iL1d3a5cZkZ0u0Xh0m1n0p7xq2v5lC5kQeG7C"
HOP = Hop("dest", "dest.lan", 2222, "root", ())
KNOWN = (f"[dest.lan]:2222 ssh-ed25519 {KEY}\n@revoked * ssh-rsa AAAAB3==\n# comment\n*.lan,!dest.lan ssh-rsa AAAA\n"
         "|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg= ssh-rsa AAAA\n@cert-authority * ssh-rsa AAAA\n")


def _known(rng: Random) -> str:
    return bent_some(rng, KNOWN, 4)


def _judge_key(text: str) -> None:
    judge(HOP, known_keys([("known_hosts", text)], HOP.known_hosts_name), "ssh-ed25519", KEY)


def _named_host(rng: Random) -> str:
    text = rng.choice(("root@dest:2222", "[fd00::1]:22", "fd00::1", "dest", "a@b@192.0.2.1"))
    return bent_text(rng, text) if rng.randrange(4) else text


def _reach(text: str) -> None:
    assert parse_host(str(parse_host(text))) == parse_host(text)


# -- applications ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sent:
    data: bytes
    things: tuple[str, ...]  # that come as descriptors


def _packet_to_application(rng: Random) -> Sent:
    packet = {"op": rng.choice(("ping", "offer", "offer", "active", "abort", "claim")),
              "id": rng.choice((ID, "f" * 16)), "flow": FLOWS["v4"].to_json()}
    data = json.dumps(bent_value(rng, packet) if rng.randrange(2) else packet).encode()
    if is_rare(rng, 4):
        data = bent_bytes(rng, data)
    offered = ("tcp", "state") if rng.randrange(2) else ("state", "tcp")
    things = rng.choice((offered, offered, (), tuple(rng.choices(("tcp", "udp", "null", "state", "open"), k=3))))
    return Sent(data[:60000] or b"{}", things)


def _thing(kind: str) -> int:
    match kind:
        case "tcp":
            return socket.socket().detach()
        case "udp":
            return socket.socket(type=socket.SOCK_DGRAM).detach()
        case "state":
            return apps.wrap_state(b"state")
        case "open":
            return os.memfd_create("open", os.MFD_ALLOW_SEALING)
        case _:
            return os.open(os.devnull, os.O_RDONLY)


class _Receiver:
    """What a listener hands over to: kept, and closed."""

    protocol = Protocol.TCP

    def __init__(self) -> None:
        self.got: list[application.Passed] = []

    def _deliver(self, passed: application.Passed) -> None:
        self.got.append(passed)


def _hand_over(sent: Sent) -> None:
    """The packet, twice, and then the end of the conversation; no descriptor may stay open."""
    before = len(os.listdir("/proc/self/fd"))
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener = object.__new__(application._ReceiverListener)
    listener._receiver, listener._dormant, listener._delivered = _Receiver(), {}, deque(maxlen=4)  # type: ignore[assignment]
    conversation = apps.Conversation(ours, 1)
    try:
        for _ in range(2):
            things = [_thing(kind) for kind in sent.things]
            try:
                socket.send_fds(theirs, [sent.data], things)
            finally:
                for thing in things:
                    os.close(thing)
            listener.handle(conversation, *conversation.receive())
    finally:
        listener.ended(conversation)
        for dormant in listener._dormant.values():
            dormant.sock.close()
        for one in listener._receiver.got:
            one.socket.close()
        theirs.close()
        ours.close()
        del listener, conversation
    assert len(os.listdir("/proc/self/fd")) == before


PARSERS: dict[str, Parser] = {one.name: one for one in (
    Parser("frame", _frame, _hear),
    Parser("state", _image, _restore),
    Parser("datagram state", _datagram_image, _restore_datagrams),
    Parser("directory", _directory, _show),
    Parser("archive", _archive, _unpack),
    Parser("journal", _log, _read_log),
    Parser("saved state", _saved, _resume),
    Parser("capture", _capture, _judge_capture),
    Parser("counters", _counters, verify.parse_netstat),
    Parser("packet", _packet, _take_packet),
    Parser("netlink", _answer, _take_answer),
    Parser("process name", _name, _look_at_process, never_refuses=True),
    Parser("TLS", _queue, _sniff),
    Parser("SSH configuration", _config, _find_way),
    Parser("known_hosts", _known, _judge_key),
    Parser("host", _named_host, _reach),
    Parser("application", _packet_to_application, _hand_over, (apps.Gone,)),
)}


def made(parser: Parser, seed: int, number: int) -> Any:
    """The input of this number: the same ever again."""
    return parser.make(Random((seed << 40) + number))



