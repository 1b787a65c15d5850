"""How the tool and a cooperating application of the same host talk: one JSON object a packet over a unix socket.

Both halves are here: `serve` uses it to hand a connection to a `Receiver`, the keeper to quiesce a registered origin
application. Descriptors travel as SCM_RIGHTS; an application's state, which may be large, as a sealed memfd beside
them, so no payload ever has a name in the file system. A socket's file in RUN_DIR/apps is named after the
application's process: `port-9000.PID.sock` (receiver; of UDP `udp-port-9000.PID.sock`), `process.PID.sock` (registered
origin). Whoever connects is told apart by SO_PEERCRED: an application listens to root and to its own user, the tool
trusts no name but checks the pid.

To a receiver (serve -> application):
    ping -> pong [PROTOCOL]                   it is alive, and takes this (tcp); asked before anything is stopped
    offer ID + connection + state             dormant, in repair: kept, not used; no answer is awaited
    active ID                                 now it is the application's
    abort ID                                  close it: silent, since it is in repair
    claim ID -> held + connection | unknown   a later serve continues what an earlier one began
To a registered origin application (keeper -> application):
    registered COOKIE -> yes | no
    quiesce COOKIE -> quiesced + state | error
    resumed COOKIE | passed COOKIE
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .core.endpoint import Protocol
from .core.errors import Refused
from .journal import applications_directory

_PACKET_LIMIT = 1 << 16
_STATE_LIMIT = 1 << 28
_F_ADD_SEALS, _F_GET_SEALS, _F_SEAL_ALL = 1033, 1034, 0xF  # linux/fcntl.h

_PREFIX = {Protocol.TCP: "port", Protocol.UDP: "udp-port"}

Packet = dict[str, Any]


class Gone(Exception):
    """The other half has closed, died, or does not answer."""


class Conversation:
    """One connected SOCK_SEQPACKET socket."""

    def __init__(self, sock: socket.socket, timeout_s: float | None) -> None:
        self.socket = sock
        sock.settimeout(timeout_s)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, packet: Packet, descriptors: Sequence[int] = ()) -> None:
        """Raises Gone where nobody will read it."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self.socket.sendmsg([json.dumps(packet).encode()], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self) -> tuple[Packet, list[int]]:
        """A packet and the descriptors that came with it (the caller's to close). Raises Gone."""
        try:
            data, rights, flags, _address = self.socket.recvmsg(_PACKET_LIMIT, socket.CMSG_SPACE(4 * 4),
                                                                socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise Gone(str(error)) from error
        descriptors: list[int] = []
        for level, kind, payload in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors += struct.unpack(f"={len(payload) // 4}i", payload[:len(payload) // 4 * 4])
        try:
            packet = json.loads(data) if data else None
        except (ValueError, RecursionError):
            packet = None
        if not isinstance(packet, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for descriptor in descriptors:
                os.close(descriptor)
            raise Gone("closed" if not data else "not a packet of ours")
        return packet, descriptors

    def ask(self, packet: Packet) -> tuple[Packet, list[int]]:
        self.send(packet)
        return self.receive()

    def peer(self) -> tuple[int, int]:
        """(pid, uid) of the other process when it connected or listened (SO_PEERCRED)."""
        pid, uid, _gid = struct.unpack("=3i", self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid

    def close(self) -> None:
        self.socket.close()


def wrap_state(state: bytes) -> int:
    """The bytes as a sealed memfd; the descriptor is the caller's to close."""
    descriptor = os.memfd_create("tcpcp-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(state)
        while view:
            view = view[os.write(descriptor, view):]
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _F_SEAL_ALL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unwrap_state(descriptor: int) -> bytes:
    """The bytes of a sealed memfd, which is closed. Raises Gone where they are more than an application may hand over,
    and for any other file: one of a FUSE, say, could let its reader wait for ever."""
    try:
        if fcntl.fcntl(descriptor, _F_GET_SEALS) & _F_SEAL_ALL != _F_SEAL_ALL:  # EINVAL of what is no memfd
            raise Gone("the application's state can still be changed")
        size = os.fstat(descriptor).st_size
        if size > _STATE_LIMIT:
            raise Gone("the application's state is over 256 MiB")
        return os.pread(descriptor, size, 0)
    except OSError as error:
        raise Gone(f"the application's state cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def connection_socket(descriptor: int) -> socket.socket:
    """What came as a descriptor, if it is a TCP or UDP socket; Gone for anything else, which is closed."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise Gone("not a socket") from None
    if (sock.proto, sock.type) not in [(protocol, protocol.socket_type) for protocol in Protocol]:
        sock.close()
        raise Gone("neither a TCP nor a UDP socket")
    return sock


def connect(path: Path, timeout_s: float) -> Conversation:
    """Raises Gone where nobody listens there. A link is not followed: in a directory where any user may make files it
    could lead to another application, which would be taken for the one that the name says."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(file).st_mode):
                raise Gone("not a socket")
            sock.connect(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
    except (OSError, Gone) as error:
        sock.close()
        raise Gone(str(error)) from error
    return Conversation(sock, timeout_s)


def listen(path: Path) -> socket.socket:
    """A listening socket with this file, readable by its owner and root. Refused says what is in the way."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket() and not path.is_symlink() and not _someone_listens(path):
            path.unlink()  # its process was killed
        old = os.umask(0o077)
        try:
            sock.bind(str(path))
        finally:
            os.umask(old)
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise Refused(f"cannot listen at {path}: {error.strerror or error}", hint=_hint(path)) from error
    return sock


def _hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} is made by root: criu-tcpcp check"
    return "another path can be given with path=..."


def _someone_listens(path: Path) -> bool:
    with contextlib.suppress(Gone):
        connect(path, 0.2).close()
        return True
    return False


def receiver_path(port: int, protocol: Protocol = Protocol.TCP) -> Path:
    """Where this process's receiver for a local port listens."""
    return applications_directory() / f"{_PREFIX[protocol]}-{port}.{os.getpid()}.sock"


def registration_path(pid: int) -> Path:
    """Where a registered origin application listens."""
    return applications_directory() / f"process.{pid}.sock"


def receivers(port: int, protocol: Protocol = Protocol.TCP) -> Iterator[Path]:
    """The files of receivers for a local port whose process still listens; others are deleted."""
    for path in sorted(applications_directory().glob(f"{_PREFIX[protocol]}-{port}.*.sock")):
        if _someone_listens(path):
            yield path
        else:
            with contextlib.suppress(OSError):
                path.unlink()
