"""An echo server that two hosts play ping-pong with: its connections go to and fro between them.

    ping_pong.py serve --port 7000 [--listen ADDRESS]      the server
    ping_pong.py [--passes 6 | --forever]                  the game, on this machine

The simplest application that can be passed: it keeps nothing of its own between two lines, so there is nothing to hand
over, and nothing to register. The pass waits for an instant at which the program waits, too.
"""

from __future__ import annotations

import argparse
import itertools
import socket
import sys
import threading

import criu_tcpcp
from criu_tcpcp.demo import example
from criu_tcpcp.demo.stage import stage

PORT = 7000


def echo(sock: socket.socket) -> None:
    try:
        while data := sock.recv(4096):
            sock.sendall(data)
    except OSError:
        pass  # it was passed away: the descriptor is dead
    sock.close()


def accept(address: str, port: int) -> None:
    with socket.create_server((address, port)) as listener:
        while True:
            sock, _client = listener.accept()
            threading.Thread(target=echo, args=(sock,), daemon=True).start()


def serve(arguments: argparse.Namespace) -> None:
    with criu_tcpcp.Receiver(port=arguments.port) as receiver:
        if arguments.listen:
            threading.Thread(target=accept, args=(arguments.listen, arguments.port), daemon=True).start()
        print("ready", flush=True)
        for passed in receiver:
            threading.Thread(target=echo, args=(passed.socket,), daemon=True).start()


def play(arguments: argparse.Namespace) -> None:
    with stage(print) as here:
        hosts = (here.lab.origin, here.lab.destination)
        servers = []
        for host in hosts:
            servers.append(here.start(host, [sys.executable, __file__, "serve", "--port", str(PORT), "--listen",
                                             str(host.ipv4)]))
            servers[-1].wait_for("ready")
        client = example.Client(here, PORT)
        print(f"the client says {client.ask('hello')!r}")
        for number in itertools.count() if arguments.forever else range(arguments.passes):
            here.pass_connection(servers[number % 2], here.descriptors(servers[number % 2])[0], hosts[1 - number % 2])
            word = "pong" if number % 2 else "ping"
            print(f"the client says {word!r}, and hears {client.ask(word)!r} from the {hosts[1 - number % 2].name}")
        print(f"{arguments.passes} passes, one connection: {client.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description="an echo server whose connections go to and fro")
    parser.add_argument("--passes", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--forever", action="store_true", help="until Ctrl-C")
    serving = parser.add_subparsers(metavar="serve").add_parser("serve", help="be the server")
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
