"""The application's half: `Receiver` at a destination, `register` at an origin. Light: needs no root, imports neither
paramiko nor pycriu.

    with criu_tcpcp.Receiver(port=9000) as receiver:
        for passed in receiver:
            serve(passed.socket, passed.app_state)

    registration = criu_tcpcp.register(sock, quiesce=callback)

Each has one thread, which talks to the tool (apps.py) and calls the callbacks; a `Receiver` hands connections over to
whatever thread iterates it or calls `accept`, and `fileno()` is readable while one waits.

A connection reaches a receiver dormant (in repair) before the pass is committed and is handed out after it. When the
tool dies in between, the dormant socket is closed, which sends nothing: the pass is settled elsewhere. One that had
left repair already is alive, so it is kept for the tool to claim; and of one that was handed out, the tool is told so.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from . import apps
from .core.endpoint import Endpoint, Flow, Protocol
from .core.errors import ProtocolError, Refused, UsageError

_log = logging.getLogger(__name__)
_TCP_REPAIR = 19
_TCP_CLOSE = 7
_SO_COOKIE = 57
_REMEMBERED = 4096  # passes that a tool which was interrupted may still ask about


@dataclass(frozen=True)
class Passed:
    """A connection that has arrived: blocking, with the options that it had at the origin. `app_state`: what the origin
    application handed over for it, or b""."""

    socket: socket.socket
    app_state: bytes = field(repr=False)
    peer: Endpoint
    local: Endpoint
    id: str


class _Listener:
    """A unix socket and the thread that serves it: one conversation each for every tool process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listening = apps.listen(path)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._conversations: dict[int, apps.Conversation] = {}
        self._thread = threading.Thread(target=self._run, name="criu-tcpcp", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # only here: until then they are polled
            self._listening.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._listening, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            for number, _events in poller.poll():
                if number == self._wake_read:
                    for conversation in list(self._conversations.values()):
                        self.ended(conversation)
                        conversation.close()
                    return
                if number == self._listening.fileno():
                    self._accept(poller)
                    continue
                conversation = self._conversations[number]
                try:
                    packet, descriptors = conversation.receive()
                    self.handle(conversation, packet, descriptors)
                except apps.Gone:
                    poller.unregister(number)
                    del self._conversations[number]
                    self.ended(conversation)
                    conversation.close()
                except Exception:  # noqa: BLE001 - a callback of the application must not end the others' conversations
                    _log.exception("criu-tcpcp: a callback of the application failed")

    def _accept(self, poller: select.poll) -> None:
        with contextlib.suppress(OSError):
            sock, _address = self._listening.accept()
            conversation = apps.Conversation(sock, 10)
            if conversation.peer()[1] not in (0, os.geteuid()):
                conversation.close()
                return
            self._conversations[sock.fileno()] = conversation
            poller.register(sock, select.POLLIN)

    def handle(self, conversation: apps.Conversation, packet: apps.Packet, descriptors: list[int]) -> None:
        raise NotImplementedError

    def ended(self, conversation: apps.Conversation) -> None:
        raise NotImplementedError

    def close(self, *, wait: bool = True) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.write(self._wake_write, b"x")
        if wait and self._thread is not threading.current_thread():
            self._thread.join()


@dataclass
class _Dormant:
    sock: socket.socket
    app_state: bytes
    flow: Flow
    conversation: apps.Conversation | None


class Receiver:
    """Takes connections that are passed to a local port (`port`) or to this very receiver (`path`, which the other side
    names as `--into receiver:PATH`), of one `protocol`, "tcp" or "udp". A context manager and an iterator; iteration
    ends when it is closed."""

    def __init__(self, port: int | None = None, *, path: str | os.PathLike[str] | None = None,
                 protocol: str = "tcp") -> None:
        if (port is None) == (path is None):
            raise UsageError("a Receiver takes either port=... or path=...")
        kinds = {one.label: one for one in Protocol}
        if protocol not in kinds:
            raise UsageError('a Receiver is of protocol="tcp" or "udp"')
        self.protocol = kinds[protocol]
        self._ready: collections.deque[Passed] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._signal_read, self._signal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._listener = _ReceiverListener(
                Path(path) if path is not None else apps.receiver_path(port or 0, self.protocol), self)
        except BaseException:
            os.close(self._signal_read)
            os.close(self._signal_write)
            raise

    @property
    def path(self) -> Path:
        return self._listener.path

    def fileno(self) -> int:
        """Readable while a connection waits for `accept`: for select, poll, epoll, asyncio."""
        return self._signal_read

    def accept(self, timeout_s: float | None = None) -> Passed:
        """The next connection. Raises TimeoutError, or EOFError once the receiver is closed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._closed, timeout_s):
                raise TimeoutError("no connection was passed in time")
            if not self._ready:
                raise EOFError("the receiver is closed")
            with contextlib.suppress(BlockingIOError):
                os.read(self._signal_read, 1)
            return self._ready.popleft()

    def _deliver(self, passed: Passed) -> None:
        with self._changed:
            self._ready.append(passed)
            with contextlib.suppress(BlockingIOError):
                os.write(self._signal_write, b"x")
            self._changed.notify()

    def __iter__(self) -> Iterator[Passed]:
        with contextlib.suppress(EOFError):
            while True:
                yield self.accept()

    def close(self) -> None:
        """Take no more. Connections that were handed out are the application's."""
        if self._closed:
            return
        self._listener.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        os.close(self._signal_read)
        os.close(self._signal_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


class _ReceiverListener(_Listener):
    def __init__(self, path: Path, receiver: Receiver) -> None:
        self._receiver = receiver
        self._dormant: dict[str, _Dormant] = {}
        self._delivered: collections.deque[str] = collections.deque(maxlen=_REMEMBERED)
        super().__init__(path)

    def handle(self, conversation: apps.Conversation, packet: apps.Packet, descriptors: list[int]) -> None:
        pass_id = str(packet.get("id", ""))
        offered = packet.get("op") == "offer" and len(descriptors) == 2
        if not offered:
            for descriptor in descriptors:
                os.close(descriptor)
        match packet.get("op"):
            case "ping":
                kind = self._receiver.protocol
                conversation.send({"op": "pong", **({} if kind is Protocol.TCP else {"protocol": kind.label})})
            case "offer" if offered:
                try:
                    sock = apps.connection_socket(descriptors[0])
                except apps.Gone:
                    os.close(descriptors[1])
                    raise
                try:
                    state = apps.unwrap_state(descriptors[1])
                    flow = Flow.from_json(packet.get("flow"))
                    if not flow.protocol.socket_type == sock.type == self._receiver.protocol.socket_type:
                        raise ProtocolError(f"it takes {self._receiver.protocol.label} connections only")
                except (ProtocolError, apps.Gone) as error:
                    sock.close()
                    raise apps.Gone(str(error)) from error
                if pass_id in self._dormant:
                    self._dormant[pass_id].sock.close()
                self._dormant[pass_id] = _Dormant(sock, state, flow, conversation)
            case "active" if pass_id in self._dormant:
                dormant = self._dormant.pop(pass_id)
                self._delivered.append(pass_id)
                dormant.sock.settimeout(None)
                self._receiver._deliver(Passed(dormant.sock, dormant.app_state, dormant.flow.peer, dormant.flow.local,
                                               pass_id))
            case "abort" if pass_id in self._dormant:
                self._dormant.pop(pass_id).sock.close()
            case "claim":
                held = self._dormant.get(pass_id)
                if held is None:
                    conversation.send({"op": "delivered" if pass_id in self._delivered else "unknown"})
                else:
                    held.conversation = conversation
                    conversation.send({"op": "held"}, [held.sock.fileno()])

    def ended(self, conversation: apps.Conversation) -> None:
        for pass_id, dormant in list(self._dormant.items()):
            if dormant.conversation is not conversation:
                continue
            if _is_dormant(dormant.sock):
                del self._dormant[pass_id]
                dormant.sock.close()
            else:
                dormant.conversation = None  # alive: a later serve will claim it


def _is_dormant(sock: socket.socket) -> bool:
    """In repair; a UDP socket, which has no such mode, is deaf."""
    if sock.type == socket.SOCK_DGRAM:
        from .kernel import datagrams
        return datagrams.is_deaf(sock)
    return bool(sock.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR))


@dataclass
class Registration:
    """A connection that may be passed away at any time, at a point that the application chooses. `close` ends it."""

    _owner: _RegistrationListener
    _cookie: int

    def close(self) -> None:
        self._owner.remove(self._cookie)


@dataclass
class _Registered:
    sock: socket.socket
    quiesce: Callable[[], bytes]
    resumed: Callable[[], None] | None
    passed: Callable[[], None] | None
    conversation: apps.Conversation | None = None


def register(sock: socket.socket, quiesce: Callable[[], bytes], *, resumed: Callable[[], None] | None = None,
             passed: Callable[[], None] | None = None) -> Registration:
    """Let this connection be passed at a clean point.

    At a pass, `quiesce()` is called in a thread of the library: it returns the application's state for the connection
    once nothing of the application will read or write it any more. Then either `passed()` is called, the connection
    lives elsewhere and `sock` is dead; or `resumed()`, and it is the application's again as it was.
    """
    cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
    return _RegistrationListener.of_this_process().add(cookie, _Registered(sock, quiesce, resumed, passed))


class _RegistrationListener(_Listener):
    _instance: _RegistrationListener | None = None
    _lock = threading.Lock()

    @classmethod
    def of_this_process(cls) -> _RegistrationListener:
        with cls._lock:
            if cls._instance is None or cls._instance.path != apps.registration_path(os.getpid()):
                cls._instance = cls(apps.registration_path(os.getpid()))
            return cls._instance

    def __init__(self, path: Path) -> None:
        self._registered: dict[int, _Registered] = {}
        super().__init__(path)

    def add(self, cookie: int, registered: _Registered) -> Registration:
        if cookie in self._registered:
            raise Refused("this connection is registered already")
        self._registered[cookie] = registered
        return Registration(self, cookie)

    def remove(self, cookie: int) -> None:
        self._registered.pop(cookie, None)
        with self._lock:
            if not self._registered and _RegistrationListener._instance is self:
                _RegistrationListener._instance = None
                self.close(wait=False)  # its thread may be in a quiesce that waits for the one that is here

    def handle(self, conversation: apps.Conversation, packet: apps.Packet, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        cookie = packet.get("cookie")
        registered = self._registered.get(cookie) if isinstance(cookie, int) else None
        match packet.get("op"):
            case "registered":
                conversation.send({"op": "yes" if registered else "no"})
            case "quiesce" if registered is not None:
                self._quiesce(conversation, registered)
            case "passed" | "resumed" if registered is not None and registered.conversation is conversation:
                self._settle(registered, packet["op"] == "passed")
            case _:
                conversation.send({"op": "error", "error": "not registered"})

    def _quiesce(self, conversation: apps.Conversation, registered: _Registered) -> None:
        registered.conversation = conversation
        try:
            descriptor = apps.wrap_state(registered.quiesce())
        except Exception as error:  # noqa: BLE001 - the application's own code: whatever it raises means "not now"
            registered.conversation = None
            conversation.send({"op": "error", "error": f"{type(error).__name__}: {error}"})
            return
        try:
            conversation.send({"op": "quiesced"}, [descriptor])
        finally:
            os.close(descriptor)

    def _settle(self, registered: _Registered, gone: bool) -> None:
        registered.conversation = None
        callback = registered.passed if gone else registered.resumed
        if callback is not None:
            callback()

    def ended(self, conversation: apps.Conversation) -> None:
        """The tool has gone without a word: the socket itself tells how it ended."""
        for registered in list(self._registered.values()):
            if registered.conversation is conversation:
                self._settle(registered, _has_gone(registered.sock))


def _has_gone(sock: socket.socket) -> bool:
    """Its end of the connection was ended: closed, or, of UDP, connected to itself."""
    if sock.type == socket.SOCK_DGRAM:
        with contextlib.suppress(OSError):  # the application has disconnected it by itself
            return bool(sock.getsockname() == sock.getpeername())
        return True
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0] == _TCP_CLOSE)
