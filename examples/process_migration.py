"""Process migration by an application that takes part: all that a process does moves to a new one on another host.

    process_migration.py serve --port 7000 [--listen ADDRESS]     the server
    process_migration.py [--clients 3]                            the move, on this machine

A calculator with sessions ("x = 6", then "x * 7"): an asyncio program, in which a connection is a transport and a
protocol object. What must move is a session's variables and the half line that was read; the rest of the process need
not: the new one is simply started, and may be a newer version. With its last session the old process ends by itself.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import operator
import sys

import criu_tcpcp
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.demo import example
from criu_tcpcp.demo.stage import stage

PORT = 7000
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class Session(asyncio.Protocol):
    """One client's connection and its variables."""

    alive = 0

    def __init__(self, finished: asyncio.Event, variables: dict[str, int] | None = None, buffer: bytes = b"") -> None:
        self.finished, self.variables, self.buffer = finished, variables or {}, buffer
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        Session.alive += 1
        # The callbacks come in a thread of the library; the transport belongs to the loop.
        self.registration = criu_tcpcp.register(transport.get_extra_info("socket"), self.quiesce,
                                                resumed=lambda: self.in_loop(transport.resume_reading),
                                                passed=lambda: self.in_loop(transport.abort))

    def data_received(self, data: bytes) -> None:
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self.transport.write(f"{self.calculate(line.decode())}\n".encode())

    def connection_lost(self, error: Exception | None) -> None:
        self.registration.close()
        Session.alive -= 1
        if not Session.alive:
            self.finished.set()

    def in_loop(self, call: object) -> None:
        self.loop.call_soon_threadsafe(call)  # type: ignore[arg-type]

    def quiesce(self) -> bytes:
        return asyncio.run_coroutine_threadsafe(self.rest(), self.loop).result(5)

    async def rest(self) -> bytes:
        """In the loop, between two of its events."""
        if self.transport.get_write_buffer_size():
            raise RuntimeError("the client is slow to take its answers")
        self.transport.pause_reading()
        return json.dumps([self.variables, self.buffer.decode("latin-1")]).encode()

    def calculate(self, line: str) -> str:
        try:
            statement = ast.parse(line.strip()).body[0]
            assert isinstance(statement, ast.Assign | ast.Expr)
            value = self.value(statement.value)
            if isinstance(statement, ast.Assign):
                assert isinstance(statement.targets[0], ast.Name)
                self.variables[statement.targets[0].id] = value
        except (AssertionError, IndexError, KeyError, SyntaxError, ValueError):
            return "what?"
        return str(value)

    def value(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return self.variables[name]
            case ast.BinOp(left, kind, right):
                return int(OPERATORS[type(kind)](self.value(left), self.value(right)))
        raise ValueError(node)


async def serve(arguments: argparse.Namespace) -> None:
    loop, finished = asyncio.get_running_loop(), asyncio.Event()
    with criu_tcpcp.Receiver(port=arguments.port) as receiver:
        arrived: set[asyncio.Task[object]] = set()

        def take() -> None:
            passed = receiver.accept()
            variables, buffer = json.loads(passed.app_state)
            passed.socket.setblocking(False)
            arrived.add(asyncio.create_task(loop.connect_accepted_socket(
                lambda: Session(finished, variables, buffer.encode("latin-1")), passed.socket)))

        loop.add_reader(receiver.fileno(), take)
        if arguments.listen:
            await loop.create_server(lambda: Session(finished), arguments.listen, arguments.port)
        print("ready", flush=True)
        await finished.wait()
        print("the last session has gone: the process ends", flush=True)
        loop.remove_reader(receiver.fileno())


def play(arguments: argparse.Namespace) -> None:
    with stage(print) as here:
        old, new = (here.start(host, [sys.executable, __file__, "serve", "--port", str(PORT), *accepting])
                    for host, accepting in ((here.lab.origin, ["--listen", str(here.lab.origin.ipv4)]),
                                            (here.lab.destination, [])))
        old.wait_for("ready")
        new.wait_for("ready")
        clients = [example.Client(here, PORT) for _ in range(arguments.clients)]
        for number, client in enumerate(clients):
            client.ask(f"x = {number}")
        for descriptor in here.descriptors(old):
            here.pass_connection(old, descriptor, here.lab.destination)
        print(f"the old process has ended with status {old.wait()}")
        for number, client in enumerate(clients):
            answer = client.ask("x + 100")
            print(f"  {client.name}: 'x = {number}' at the old one, 'x + 100' at the new one: {answer}")
            if answer != str(number + 100):
                raise Refused(f"{client.name} should have heard {number + 100}")


def main() -> int:
    parser = argparse.ArgumentParser(description="all sessions of a process move to a new one on another host")
    parser.add_argument("--clients", type=int, default=3, help="(%(default)s)")
    serving = parser.add_subparsers(metavar="serve").add_parser("serve", help="be the server")
    serving.add_argument("--port", type=int, required=True)
    serving.add_argument("--listen", metavar="ADDRESS")
    serving.set_defaults(action=serve)
    arguments = parser.parse_args()
    if hasattr(arguments, "action"):
        asyncio.run(arguments.action(arguments))
        return 0
    return example.run(lambda: play(arguments))


if __name__ == "__main__":
    sys.exit(main())
