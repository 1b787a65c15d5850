"""The files of an image directory, as bytes: what `dump` writes and `show` reads. Pure: names and bytes in and out.

CRIU's layout, as far as connections are concerned:

    inventory.img            the version of the format
    files.img                one entry a file; those of TCP sockets hold an inet_sk_entry, with an id and the inode
    fdinfo-N.img             descriptor number -> id, for the descriptor table N
    ids-PID.img              process -> N (in a dump by CRIU)
    tcp-stream-INODE.img     inode in hexadecimal: the tcp_stream_entry and the two queues

Ours has one file more, `criu-tcpcp.json`: what CRIU's images have no field for (core/image.py), and whose the
connection was; and `criu-tcpcp-app-state-INODE.img` where the application handed something over. `crit` reads all of
CRIU's files of ours. There is no process in them, so `criu restore` has nothing to restore.

Whoever wrote a directory, it is input: lengths are checked before anything is cut, and one connection that cannot be
read does not hide the others.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import tcp
from .criu import directory_messages, messages
from .endpoint import Flow
from .errors import ProtocolError
from .image import Image, decode, decode_stream, explained, flow_of_entry, parse_entry
from .tcp import TcpState

OURS = "criu-tcpcp.json"
VERSION = 1
#: The names of the files that are read.
WANTED = re.compile(r"inventory\.img|files\.img|inetsk\.img|fdinfo-\d+\.img|ids-\d+\.img|tcp-stream-[0-9a-f]+\.img"
                    r"|criu-tcpcp\.json|criu-tcpcp-app-state-[0-9a-f]+\.img")

_IMAGES_V1_1 = 2  # criu/include/image.h, CRTOOLS_IMAGES_V1_1: with two magic numbers
_INETSK = 4  # images/fdinfo.proto, fd_types
_IPPROTO_TCP = 6
_HEAD = struct.Struct("=II")
_SIZE = struct.Struct("=I")
_FDINFO = 1
_OURS_LIMIT = 1 << 20


@dataclass(frozen=True)
class Owner:
    """Whose the connection was: the process, its name if known, its descriptors."""

    pid: int
    process: str
    descriptors: tuple[int, ...]


@dataclass(frozen=True)
class Imaged:
    """One connection in a directory. `stream`: its tcp_stream_entry, if there is one. `whole`: all is there that a pass
    carries, so that it could be activated as it was. `problem`: why not all of it can be read, or ''."""

    inode: int
    state: str
    flow: Flow | None
    owners: tuple[Owner, ...]
    stream: Any
    received: bytes = field(repr=False)
    outgoing: bytes = field(repr=False)
    app_state: bytes = field(repr=False)
    whole: bool
    problem: str


def stream_name(inode: int) -> str:
    return f"tcp-stream-{inode & 0xFFFFFFFF:x}.img"


def app_state_name(inode: int) -> str:
    return f"criu-tcpcp-app-state-{inode & 0xFFFFFFFF:x}.img"


def write(image: Image, inode: int, owner: Owner, app_state: bytes, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a directory with this one connection: name -> contents. `about`: what else is to be remembered of
    the dump, as JSON."""
    kinds, more = messages(), directory_messages()
    socket_entry = parse_entry(kinds.inet_sk, image.inet_sk)
    fdinfo = [kinds.fdinfo(id=socket_entry.id, flags=0, type=_INETSK, fd=number) for number in owner.descriptors]
    ours = {"version": VERSION, **about, "connections": [
        {"inode": inode & 0xFFFFFFFF, "pid": owner.pid, "process": owner.process,
         "descriptors": list(owner.descriptors), "extras": json.loads(image.extras)}]}
    files = {
        "inventory.img": _image("INVENTORY", [more.inventory(img_version=_IMAGES_V1_1)]),
        "files.img": _image("FILES", [kinds.file(type=_INETSK, id=socket_entry.id, isk=socket_entry)]),
        f"fdinfo-{_FDINFO}.img": _image("FDINFO", fdinfo),
        stream_name(inode): image.tcp_stream,
        OURS: json.dumps(ours, indent=1, sort_keys=True).encode() + b"\n"}
    if app_state:
        files[app_state_name(inode)] = app_state
    return files


def _image(kind: str, entries: list[Any]) -> bytes:
    magic = messages().magic
    parts = [_HEAD.pack(magic["IMG_COMMON"], magic[kind])]
    for entry in entries:
        body = entry.SerializeToString(deterministic=True)
        parts += [_SIZE.pack(len(body)), body]
    return b"".join(parts)


# -- reading -----------------------------------------------------------------------------------------------------------

def read(files: Mapping[str, bytes]) -> list[Imaged]:
    """The connections in these files, by id. ProtocolError where they are not those of an image directory."""
    ours = _read_ours(files)
    kept = {one["inode"]: one for one in ours.get("connections", [])}
    owners_of = _owners(files)
    found: dict[int, Imaged] = {}
    for number, entry in _sockets(files):
        if entry.proto == _IPPROTO_TCP and entry.state not in (TcpState.LISTEN, TcpState.CLOSE):
            beside = kept.get(entry.ino)
            owners = owners_of.get(number, ()) if beside is None else (
                Owner(beside["pid"], beside["process"], tuple(beside["descriptors"])),)
            if entry.ino in found:  # each would have a copy of the queues
                raise ProtocolError(f"there are two sockets with the inode {entry.ino}")
            found[entry.ino] = _imaged(files, entry, owners, beside)
    return list(found.values())


def about(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a directory of ours says of its dump; {} for one of CRIU's."""
    return {name: value for name, value in _read_ours(files).items() if name not in ("connections", "version")}


def _imaged(files: Mapping[str, bytes], entry: Any, owners: tuple[Owner, ...],
            beside: dict[str, Any] | None) -> Imaged:
    state = TcpState(entry.state).label if entry.state in iter(TcpState) else f"state {entry.state}"
    flow, stream, received, outgoing, whole, problem = None, None, b"", b"", False, ""
    data = files.get(stream_name(entry.ino))
    try:
        with explained():
            flow = flow_of_entry(entry, beside["extras"]["scope_id"] if beside is not None else 0)
        if data is None:
            raise ProtocolError(f"there is no {stream_name(entry.ino)}")
        with explained():
            stream, received, outgoing = decode_stream(data)
        if beside is not None:
            decode(Image(entry.SerializeToString(), data, json.dumps(beside["extras"]).encode()))
            whole = True
    except ProtocolError as error:
        problem = error.message
    return Imaged(entry.ino, state, flow, owners, stream, received, outgoing,
                  files.get(app_state_name(entry.ino), b""), whole, problem)


def _sockets(files: Mapping[str, bytes]) -> Iterator[tuple[int, Any]]:
    """(id, inet_sk_entry) of every internet socket. Before files.img (CRIU 3.2) they had an image of their own."""
    kinds = messages()
    if "files.img" in files:
        for entry in _entries(files, "files.img", "FILES", kinds.file):
            if entry.HasField("isk"):
                yield entry.id, entry.isk
    elif "inetsk.img" in files:
        for entry in _entries(files, "inetsk.img", "INETSK", kinds.inet_sk):
            yield entry.id, entry
    else:
        raise ProtocolError("no files.img is in it: not a directory of CRIU images")


def _owners(files: Mapping[str, bytes]) -> dict[int, tuple[Owner, ...]]:
    """In a dump by CRIU: id of a socket -> the processes whose descriptor table has it. That they cannot be told is no
    reason to hide the connections."""
    tables: dict[int, dict[int, list[int]]] = {}  # table -> id -> descriptors
    found: dict[int, list[Owner]] = {}
    with contextlib.suppress(ProtocolError):
        for name in sorted(files):
            if name.startswith("fdinfo-"):
                table = tables.setdefault(int(name[len("fdinfo-"):-len(".img")]), {})
                for one in _entries(files, name, "FDINFO", messages().fdinfo):
                    if one.type == _INETSK:
                        table.setdefault(one.id, []).append(one.fd)
        for name in sorted(files):
            if name.startswith("ids-"):
                pid = int(name[len("ids-"):-len(".img")])
                for files_id in {ids.files_id for ids in _entries(files, name, "IDS", directory_messages().ids)}:
                    for number, descriptors in tables.get(files_id, {}).items():
                        found.setdefault(number, []).append(Owner(pid, "", tuple(descriptors)))
    return {number: tuple(owners) for number, owners in found.items()}


def _entries(files: Mapping[str, bytes], name: str, kind: str, message: Any) -> Iterator[Any]:
    data, magic = files[name], messages().magic
    if len(data) < _HEAD.size or _HEAD.unpack_from(data) != (magic["IMG_COMMON"], magic[kind]):
        raise ProtocolError(f"{name} is not an image of that name: wrong magic")
    position = _HEAD.size
    while position < len(data):
        if position + _SIZE.size > len(data):
            raise ProtocolError(f"{name} is cut short")
        (size,) = _SIZE.unpack_from(data, position)
        position += _SIZE.size
        if size > len(data) - position:
            raise ProtocolError(f"{name} is cut short")
        try:
            with explained():
                entry = parse_entry(message, data[position:position + size])
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error.message}") from None
        position += size
        yield entry


def _read_ours(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Our own file, its form checked; {} where there is none."""
    if OURS not in files:
        return {}
    try:
        if len(files[OURS]) > _OURS_LIMIT:
            raise ProtocolError(f"{OURS} has {len(files[OURS])} bytes")
        ours = json.loads(files[OURS])
        if ours["version"] != VERSION:
            raise ProtocolError(f"{OURS} has version {ours['version']!r}, this program reads {VERSION}")
        for one in ours["connections"]:
            if not all(type(one[name]) is int for name in ("inode", "pid")) or type(one["process"]) is not str \
                    or not all(type(number) is int for number in one["descriptors"]) \
                    or type(one["extras"]) is not dict or type(one["extras"].get("scope_id")) is not int \
                    or not 0 <= one["extras"]["scope_id"] < tcp.MODULUS:
                raise ValueError("a field has the wrong form")
    except ProtocolError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"{OURS} cannot be read: {error}") from None
    return dict(ours)
