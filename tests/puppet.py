"""A program that does with one connection what a test tells it, and nothing else: the connection was accepted, or
passed to it. `Puppet` speaks to it over a socket in the file system, which leads into any network namespace."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from waiting import until


def argv(control: Path, *arguments: str) -> list[str]:
    """Its command line: `accept ADDRESS PORT`, or `receive PORT`."""
    return [sys.executable, __file__, str(control), *arguments]


class Puppet:
    """Whoever waits at `control`."""

    def __init__(self, control: Path) -> None:
        until(control.exists, "the program to wait for orders")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(60)
        self._sock.connect(str(control))

    def __call__(self, order: str, *arguments: Any) -> Any:
        """Its answer. What fails there is an OSError's number, negative."""
        self._sock.send(json.dumps([order, *arguments]).encode())
        return json.loads(self._sock.recv(1 << 16))

    def close(self) -> None:
        self._sock.close()


def obey(sock: socket.socket, order: str, *arguments: Any) -> Any:
    from cells import blob
    match order, arguments:
        case "send", [size]:
            sock.sendall(blob(size))
        case "receive", [size]:
            # How many came before the end, and whether they are the right ones.
            data = bytearray()
            while len(data) < size and (more := sock.recv(size - len(data))):
                data += more
            return [len(data), bytes(data) == blob(size)[:len(data)]]
        case "shutdown", [how]:
            sock.shutdown(how)
        case "cork", [value]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, value)
        case "send_buffer", [size]:
            sock.setsockopt(socket.SOL_SOCKET, 32, size)  # SO_SNDBUFFORCE
        case "receive_buffer", [size]:
            sock.setsockopt(socket.SOL_SOCKET, 33, size)  # SO_RCVBUFFORCE
        case _:
            raise ValueError(order)
    return 0


def main() -> None:
    control, way, *arguments = sys.argv[1:]
    waits = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waits.bind(control)
    waits.listen()
    if way == "accept":
        address, port = arguments
        listener = socket.create_server((address, int(port)), dualstack_ipv6=address == "::",
                                        family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        print(json.dumps({"event": "listening"}), flush=True)
        sock, _peer = listener.accept()
    else:
        from criu_tcpcp.application import Receiver
        receiver = Receiver(port=int(arguments[0]))
        print(json.dumps({"event": "listening"}), flush=True)
        sock = next(iter(receiver)).socket
        sock.setblocking(True)
    print(json.dumps({"event": "serving", "fd": sock.fileno()}), flush=True)
    orders, _nobody = waits.accept()
    while data := orders.recv(1 << 16):
        try:
            answer = obey(sock, *json.loads(data))
        except OSError as error:
            answer = -(error.errno or 0)
        orders.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
