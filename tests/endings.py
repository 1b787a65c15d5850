"""Programs that tell what became of a connection that is passed away under them.

    python tests/endings.py WAY PORT

One connection each: the thread waits for it in this WAY (recv, send, poll, epoll), or is somewhere else (idle), and
tells what that call and the next one say. JSON lines: listening; serving (process, thread, descriptor); ended (words).
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import sys
import threading
from collections.abc import Callable

from servers import say

MUCH = bytes(1 << 26)
_EVENTS = {select.POLLIN: "IN", select.POLLOUT: "OUT", select.POLLERR: "ERR", select.POLLHUP: "HUP"}


def result(call: Callable[[], object]) -> str:
    """What a call says, in a word."""
    try:
        said = call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "end of stream" if said == b"" else repr(said)


def events(said: list[tuple[int, int]]) -> str:
    return "+".join(name for bit, name in _EVENTS.items() if said[0][1] & bit)


def recv(sock: socket.socket) -> list[str]:
    return [result(lambda: sock.recv(100)) for _ in range(2)]


def send(sock: socket.socket) -> list[str]:
    """Without what was taken before."""
    said: list[str] = []
    while len(said) < 2:
        word = result(lambda: sock.send(MUCH))
        if not word.isdigit():
            said.append(word)
    return said


def poll(sock: socket.socket) -> list[str]:
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return [events(waiting.poll()), result(lambda: sock.recv(100))]


def epoll(sock: socket.socket) -> list[str]:
    with select.epoll() as waiting:
        waiting.register(sock, select.EPOLLIN)
        return [events(waiting.poll()), result(lambda: sock.recv(100))]


def idle(sock: socket.socket) -> list[str]:
    sys.stdin.readline()
    return [result(lambda: sock.send(b"x")), result(lambda: sock.recv(100))]


def streams(listener: socket.socket) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tell(writer.get_extra_info("socket").fileno())
        try:
            data = await reader.read(100)
            found = "end of stream" if data == b"" else repr(data)
        except OSError as error:
            found = type(error).__name__
        writer.write(b"x")
        try:
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            after = "nothing"
        except OSError as error:
            after = type(error).__name__
        say("ended", words=[found, after])

    async def run() -> None:
        async with await asyncio.start_server(serve, sock=listener) as server:
            await server.serve_forever()
    asyncio.run(run())


def tell(descriptor: int) -> None:
    say("serving", tid=threading.get_native_id(), fd=descriptor)


def main() -> None:
    way, port = sys.argv[1], int(sys.argv[2])
    with socket.create_server(("0.0.0.0", port)) as listener:
        say("listening")
        if way == "asyncio":
            streams(listener)
        sock = listener.accept()[0]
        tell(sock.fileno())
        say("ended", words={"recv": recv, "send": send, "poll": poll, "epoll": epoll, "idle": idle}[way](sock))
        threading.Event().wait()


if __name__ == "__main__":
    main()
