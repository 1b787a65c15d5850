"""Load balancing after the fact: connections that all came to one host are spread over two.

    load_balancing.py serve --name A --port 7000 [--listen ADDRESS]    the server
    load_balancing.py [--clients 4]                                    the play, on this machine

A balancer decides when a connection is made; clients that stay for hours make that decision wrong. Here the busier host
passes connections on until both have the same number. The server counts each client's lines, which is its state for the
connection: it registers, is asked for the count at a clean point, and the other host counts on.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import threading

import criu_tcpcp
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.demo import example
from criu_tcpcp.demo.stage import stage

PORT = 7000


class Session:
    """One client: each line is answered with its number and the name of the server."""

    def __init__(self, sock: socket.socket, name: str, count: int = 0) -> None:
        self.sock, self.name, self.count = sock, name, count
        self.buffer = b""
        self.turn = threading.Lock()  # held while a line is answered, and while the connection is being passed
        self.gone = False
        self.registration = criu_tcpcp.register(sock, self.quiesce, resumed=self.turn.release, passed=self.leave)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.sock.recv(1, socket.MSG_PEEK)  # wait, and take nothing: what is not read travels by itself
                with self.turn:
                    if self.gone or not self.answer():
                        break
        self.registration.close()
        self.sock.close()

    def answer(self) -> bool:
        data = self.sock.recv(4096)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for _line in lines:
            self.count += 1
            self.sock.sendall(f"line {self.count}, says {self.name}\n".encode())
        return bool(data)

    def quiesce(self) -> bytes:
        if not self.turn.acquire(timeout=5):
            raise TimeoutError("a line is still being answered")
        return b"%d\n%b" % (self.count, self.buffer)

    def leave(self) -> None:
        self.gone = True
        self.turn.release()


def accept(arguments: argparse.Namespace) -> None:
    with socket.create_server((arguments.listen, arguments.port)) as listener:
        while True:
            Session(listener.accept()[0], arguments.name)


def serve(arguments: argparse.Namespace) -> None:
    with criu_tcpcp.Receiver(port=arguments.port) as receiver:
        if arguments.listen:
            threading.Thread(target=accept, args=(arguments,), daemon=True).start()
        print("ready", flush=True)
        for passed in receiver:
            count, _, buffer = passed.app_state.partition(b"\n")
            Session(passed.socket, arguments.name, int(count)).buffer = buffer


def play(arguments: argparse.Namespace) -> None:
    with stage(print) as here:
        servers = []
        for host in (here.lab.origin, here.lab.destination):
            servers.append(here.start(host, [sys.executable, __file__, "serve", "--name", host.name,
                                             "--port", str(PORT), "--listen", str(host.ipv4)]))
            servers[-1].wait_for("ready")
        clients = [example.Client(here, PORT) for _ in range(arguments.clients)]
        answers = [client.ask("hello") for client in clients]
        busy, idle = servers
        print(f"before: {len(here.descriptors(busy))} clients at the {busy.host.name}, none elsewhere")
        for descriptor in here.descriptors(busy)[:arguments.clients // 2]:
            here.pass_connection(busy, descriptor, idle.host)
        print(f"after: {len(here.descriptors(busy))} clients at the {busy.host.name}, "
              f"{len(here.descriptors(idle))} at the {idle.host.name}; they heard:")
        for client, before in zip(clients, answers, strict=True):
            after = client.ask("hello")
            print(f"  {client.name}: {before!r}, then {after!r}")
            if not after.startswith("line 2, "):
                raise Refused(f"the count of {client.name} went from {before!r} to {after!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description="connections of one host are spread over two")
    parser.add_argument("--clients", type=int, default=4, help="(%(default)s)")
    serving = parser.add_subparsers(metavar="serve").add_parser("serve", help="be the server")
    serving.add_argument("--name", required=True)
    serving.add_argument("--port", type=int, required=True)
    serving.add_argument("--listen", metavar="ADDRESS")
    serving.set_defaults(action=serve)
    arguments = parser.parse_args()
    if hasattr(arguments, "action"):
        arguments.action(arguments)
        return 0
    return example.run(lambda: play(arguments))


if __name__ == "__main__":
    sys.exit(main())
