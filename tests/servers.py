"""Servers that know nothing of passes, one for every way in which programs wait for connections and for bytes.

    python tests/servers.py MODEL ADDRESS PORT [--backlog N] [--defer] [--only-ipv6] [--user UID]

Each sends back what it gets. What happens is told as JSON lines: listening; serving (process, descriptor, what accept
said of the peer) for each connection; end, or error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

_CHUNK = 1 << 16
_lock = threading.Lock()


def say(event: str, **facts: Any) -> None:
    line = json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n"
    with _lock:
        os.write(1, line.encode())


class Served:
    """One connection, whichever loop drives it."""

    def __init__(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        self.sock = sock
        say("serving", fd=sock.fileno(), accepted=list(address[:2]))

    def step(self) -> bool:
        """Once it is readable; False at its end."""
        data = b""
        try:
            data = self.sock.recv(_CHUNK)
            if data:
                self.sock.sendall(data)
                return True
            say("end")
        except BlockingIOError:
            return True
        except OSError as error:
            say("error", error=str(error), doing="answer" if data else "read")
        self.sock.close()
        return False

    def all_of_it(self) -> None:
        while self.step():
            pass


def blocking(listener: socket.socket) -> None:
    while True:
        Served(*listener.accept()).all_of_it()


def threads(listener: socket.socket) -> None:
    """A thread for each connection."""
    while True:
        threading.Thread(target=Served(*listener.accept()).all_of_it, daemon=True).start()


def handing(listener: socket.socket) -> None:
    """Accept in one thread, service in others."""
    waiting: queue.Queue[Served] = queue.Queue()

    def work() -> None:
        while True:
            waiting.get().all_of_it()
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    while True:
        waiting.put(Served(*listener.accept()))


def accepting(listener: socket.socket) -> None:
    """Several threads that accept."""
    for _ in range(3):
        threading.Thread(target=blocking, args=(listener,), daemon=True).start()
    blocking(listener)


def by_select(listener: socket.socket) -> None:
    connections: dict[int, Served] = {}
    while True:
        for number in select.select([listener.fileno(), *connections], [], [])[0]:
            if number == listener.fileno():
                served = Served(*listener.accept())
                connections[served.sock.fileno()] = served
            elif not connections[number].step():
                del connections[number]


def by_poll(listener: socket.socket) -> None:
    connections: dict[int, Served] = {}
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while True:
        for number, _events in poller.poll():
            if number == listener.fileno():
                served = Served(*listener.accept())
                connections[served.sock.fileno()] = served
                poller.register(served.sock, select.POLLIN)
            elif not connections[number].step():
                poller.unregister(number)
                del connections[number]


def by_epoll(listener: socket.socket, edge: int = 0, exclusive: int = 0) -> None:
    connections: dict[int, Served] = {}
    listener.setblocking(False)
    poller = select.epoll()
    poller.register(listener, select.EPOLLIN | exclusive)
    while True:
        for number, _events in poller.poll():
            if number != listener.fileno():
                if not connections[number].step():
                    del connections[number]
                continue
            try:
                served = Served(*listener.accept())
            except BlockingIOError:  # another worker was quicker
                continue
            served.sock.setblocking(False)
            connections[served.sock.fileno()] = served
            poller.register(served.sock, select.EPOLLIN | edge)


def by_asyncio(listener: socket.socket) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        say("serving", fd=sock.fileno(), accepted=list(writer.get_extra_info("peername")[:2]))
        try:
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()
            say("end")
        except OSError as error:
            say("error", error=str(error))
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(serve, sock=listener) as server:
            await server.serve_forever()
    asyncio.run(run())


def forking(listener: socket.socket) -> None:
    """A process for each connection."""
    while True:
        sock, address = listener.accept()
        if os.fork() == 0:
            listener.close()
            Served(sock, address).all_of_it()
            os._exit(0)
        sock.close()


def workers(serve: Callable[[socket.socket], None], listeners: list[socket.socket]) -> None:
    """A process for each of the listeners, which may all be the same."""
    for number, listener in enumerate(listeners):
        if os.fork() == 0:
            for other in listeners:
                if other is not listener:
                    other.close()
            say("worker", number=number)
            serve(listener)
    for one in listeners:
        one.close()
    while True:
        os.wait()


MODELS: dict[str, Callable[[socket.socket], None]] = {
    "blocking": blocking, "threads": threads, "handing": handing, "accepting": accepting, "select": by_select,
    "poll": by_poll, "epoll": by_epoll, "epoll-et": lambda one: by_epoll(one, select.EPOLLET), "asyncio": by_asyncio,
    "forking": forking,
    "prefork": lambda one: workers(lambda own: by_epoll(own, select.EPOLLET, select.EPOLLEXCLUSIVE), [one] * 3)}


def shut(listener: socket.socket) -> None:
    """Accepts, and wants nothing of it."""
    while True:
        listener.accept()[0].close()


def greet(listener: socket.socket) -> None:
    """Speaks first."""
    while True:
        sock, address = listener.accept()
        sock.sendall(b"220 welcome\r\n")
        threading.Thread(target=Served(sock, address).all_of_it, daemon=True).start()


def idle(_listener: socket.socket) -> None:
    """Accepts nobody."""
    threading.Event().wait()


def stepping_out(listener: socket.socket) -> None:
    """Ends as soon as it has accepted."""
    listener.accept()
    os._exit(0)


def deaf(listener: socket.socket) -> None:
    """Reads nothing."""
    held = []
    while True:
        held.append(Served(*listener.accept()))


def talkative(listener: socket.socket) -> None:
    """Has always something to say to whoever says something."""
    while True:
        served = Served(*listener.accept())
        if served.step():
            with contextlib.suppress(OSError):
                while True:
                    served.sock.sendall(b"and ")
                    time.sleep(0.01)
        served.sock.close()


def leaving(listener: socket.socket) -> None:
    """Says goodbye, and closes."""
    while True:
        served = Served(*listener.accept())
        served.step()
        served.sock.close()


def late(listener: socket.socket) -> None:
    """Reads lines in pieces, and answers one only when another client has said "go"."""
    go = threading.Event()

    def serve(served: Served) -> None:
        line = b""
        while piece := served.sock.recv(3):
            say("read", text=piece.decode())
            line += piece
            if line == b"go\n":
                go.set()
            elif line.endswith(b"\n"):
                go.wait()
                go.clear()
                served.sock.sendall(line)
                line = b""
        say("end")
        served.sock.close()
    while True:
        threading.Thread(target=serve, args=(Served(*listener.accept()),), daemon=True).start()


def spare(listener: socket.socket, edge: int = 0) -> None:
    """Accepts nobody, and serves a descriptor whose other end is silent, which waits in two epoll instances; one tells
    of it as 5 << 40. The other end, and a copy of the descriptor's file, stay open."""
    silent, spared = socket.socketpair()
    spared.setblocking(False)
    copy, number = spared.dup(), spared.fileno()
    poller, other = select.epoll(), select.epoll()
    other.register(spared, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    libc = ctypes.CDLL(None)
    libc.epoll_ctl(poller.fileno(), 1, number, struct.pack("=IQ", select.EPOLLIN | edge, 5 << 40))
    say("spare", fd=number, epolls=[poller.fileno(), other.fileno()])
    events = ctypes.create_string_buffer(12)
    serving = True
    while serving:
        if libc.epoll_wait(poller.fileno(), events, 1, -1) != 1:
            continue  # EINTR
        assert struct.unpack("=IQ", events)[1] == 5 << 40
        told_too = other.poll(0)
        assert told_too == [(number, told_too[0][1])]
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(number, _CHUNK)
            serving = bool(data)
        os.write(number, data) if data else None
    say("end")
    os.close(number)
    assert copy.fileno() != silent.fileno() != -1
    threading.Event().wait()


def told(listener: socket.socket) -> None:
    """A client may name a descriptor ("serve 7"), which is then served as any other connection."""
    while True:
        with listener.accept()[0] as client:
            words = client.recv(_CHUNK).split()
            if words[:1] == [b"serve"]:
                sock = socket.socket(fileno=int(words[1]))
                threading.Thread(target=Served(sock, sock.getpeername()).all_of_it, daemon=True).start()
            client.sendall(b"yes")


MODELS |= {"late": late, "shut": shut, "greet": greet, "told": told, "idle": idle, "stepping-out": stepping_out,
           "deaf": deaf, "talkative": talkative, "leaving": leaving}


MODELS |= {"spare": spare, "spare-et": lambda one: spare(one, select.EPOLLET)}


def listen(arguments: argparse.Namespace) -> socket.socket:
    if arguments.address.startswith("/"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(arguments.address)
        listener.listen()
        return listener
    family = socket.AF_INET6 if ":" in arguments.address else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if arguments.model == "reuseport":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, arguments.only_ipv6)
    if arguments.defer:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    listener.bind((arguments.address, arguments.port))
    listener.listen(arguments.backlog)
    return listener


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=[*MODELS, "reuseport"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--backlog", type=int, default=64)
    parser.add_argument("--defer", action="store_true")
    parser.add_argument("--only-ipv6", action="store_true")
    parser.add_argument("--user", type=int)
    arguments = parser.parse_args()
    listeners = [listen(arguments) for _ in range(3 if arguments.model == "reuseport" else 1)]
    if arguments.user is not None:
        os.setgroups([])
        os.setgid(arguments.user)
        os.setuid(arguments.user)
    say("listening")
    if arguments.model == "reuseport":
        workers(by_epoll, listeners)
    MODELS[arguments.model](listeners[0])


if __name__ == "__main__":
    main()
