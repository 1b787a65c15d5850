"""A static file server whose downloads can be passed to another host in the middle.

    file_server.py serve DIRECTORY --port 8080 [--listen ADDRESS] [--rate MB/S]

GET of a plain file, and nothing else of HTTP. What a download is, beyond its socket, is a file's name and a position:
that is what a pass hands over, and the same file must be at the other host. Without --listen it accepts nothing itself
and serves only what is passed to it. Without `serve`, all of it is played on this machine:

    file_server.py [--passes N] [--size MB]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import select
import socket
import sys
import termios
import threading
import time
from pathlib import Path

import criu_tcpcp

PIECE = 1 << 18
LONGEST_REQUEST = 8192
UNSENT = 1 << 17
LONGEST_WAIT_S = 0.2
_SO_MAX_PACING_RATE, _TCP_NOTSENT_LOWAT = 47, 25


class Download:
    """A file on its way to a client, in a thread. May be passed between any two pieces."""

    def __init__(self, sock: socket.socket, directory: Path, name: str, position: int = 0) -> None:
        self.sock, self.name, self.position = sock, name, position
        self.file = (directory / name).open("rb")
        self.size = os.fstat(self.file.fileno()).st_size
        self.finished = False
        self.pause, self.at_rest = os.eventfd(0), threading.Event()
        sock.setblocking(False)
        say(f"sends {name} from byte {position}")
        self.registration = criu_tcpcp.register(sock, self.quiesce, resumed=self.resume, passed=self.close)
        self.start()

    def start(self) -> None:
        threading.Thread(target=self.send).start()

    def send(self) -> None:
        problem = None
        try:
            while self.position < self.size:
                paused, _, _ = select.select([self.pause], [self.sock], [])
                if paused:
                    self.at_rest.set()
                    return
                with contextlib.suppress(BlockingIOError):
                    self.position += os.sendfile(self.sock.fileno(), self.file.fileno(), self.position, PIECE)
        except OSError as error:
            problem = error
        self.finished = True
        self.at_rest.set()
        say(f"sent {self.name}" if problem is None else f"{self.name} ended at byte {self.position}: {problem}")
        self.close()

    # The three callbacks of a pass.

    def quiesce(self) -> bytes:
        os.eventfd_write(self.pause, 1)
        self.at_rest.wait()
        if self.finished:
            raise RuntimeError("the download has just ended")
        # What the kernel still has would have to travel: let it go out, unless the client is slow to take it.
        deadline = time.monotonic() + LONGEST_WAIT_S
        while unacknowledged(self.sock) and time.monotonic() < deadline:
            time.sleep(0.001)
        return json.dumps({"name": self.name, "position": self.position}).encode()

    def resume(self) -> None:
        os.eventfd_read(self.pause)
        self.at_rest.clear()
        self.start()

    def close(self) -> None:
        self.registration.close()
        self.sock.close()
        self.file.close()
        os.close(self.pause)


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that the kernel still has: not sent, or not acknowledged."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def answer(sock: socket.socket, directory: Path) -> None:
    """Read one request, and start its download."""
    request = b""
    while b"\r\n\r\n" not in request:
        data = sock.recv(4096)
        request += data
        if not data or len(request) > LONGEST_REQUEST:
            sock.close()
            return
    method, _, rest = request.decode("latin-1").partition(" ")
    name = rest.split(" ")[0].removeprefix("/")
    if method != "GET" or "/" in name or name.startswith(".") or not (directory / name).is_file():
        sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        sock.close()
        return
    size = (directory / name).stat().st_size
    sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode())
    Download(sock, directory, name)


def accept(address: str, port: int, directory: Path, rate: float | None) -> None:
    """Serve what connects here."""
    with socket.create_server((address, port)) as listener:
        say(f"listens on {address}:{port}")
        while True:
            sock, _client = listener.accept()
            # What the kernel has not sent yet is part of the connection's state: keep it small.
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT)
            if rate is not None:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(rate * 1e6))
            threading.Thread(target=answer, args=(sock, directory), daemon=True).start()


def serve(arguments: argparse.Namespace) -> None:
    """Serve connections, accepted and passed ones alike."""
    with criu_tcpcp.Receiver(port=arguments.port) as receiver:
        say("takes what is passed")
        if arguments.listen:
            threading.Thread(target=accept, args=(arguments.listen, arguments.port, arguments.directory,
                                                  arguments.rate), daemon=True).start()
        for passed in receiver:
            try:
                state = json.loads(passed.app_state)
                Download(passed.socket, arguments.directory, state["name"], state["position"])
            except (ValueError, KeyError, OSError) as problem:
                say(f"cannot go on with {passed.peer}: {problem}")
                passed.socket.close()


def say(text: str) -> None:
    print(text, flush=True)


def play(arguments: argparse.Namespace) -> None:
    """On the lab's hosts, with a real curl."""
    from criu_tcpcp.demo import download
    result = download.play(passes=arguments.passes, size=arguments.size << 20, rate=arguments.rate or 20.0, say=say)
    before, after = result.bytes_by_host["origin"], result.bytes_by_host["destination"]
    say(f"curl got {result.downloaded} bytes ({before} bytes came from the origin, {after} from the destination)")
    say(f"SHA-256 of what curl got  {result.sha256['peer']}")
    say(f"SHA-256 of the file       {result.sha256['origin']}")
    say(f"passes: {len(result.reports)}; the longest silence that the peer saw: {result.gap_ms:.1f} ms; "
        f"wire assertions violated: {len(result.verdict.violations)}")
    result.require_ok()


def main() -> int:
    parser = argparse.ArgumentParser(description="a static file server whose downloads can be passed on")
    parser.add_argument("--passes", type=int, default=1, help="there and back, spread over the download (%(default)s)")
    parser.add_argument("--size", type=int, default=256, metavar="MB", help="of the file (%(default)s)")
    parser.add_argument("--rate", type=float, metavar="MB/S", help="of each download")
    serving = parser.add_subparsers(metavar="serve").add_parser("serve", help="be the server")
    serving.add_argument("directory", type=Path)
    serving.add_argument("--port", type=int, required=True)
    serving.add_argument("--listen", metavar="ADDRESS")
    serving.add_argument("--rate", type=float, metavar="MB/S", help="of each download")
    serving.set_defaults(action=serve)
    arguments = parser.parse_args()
    if hasattr(arguments, "action"):
        arguments.action(arguments)
        return 0
    from criu_tcpcp.demo import example
    return example.run(lambda: play(arguments))


if __name__ == "__main__":
    sys.exit(main())
