"""What a packet costs on its way through the origin host: `forward` against plain IP forwarding of the same path.

    ./dev bench forward [--pairs 10] [--seconds 2] [--version 4] [--merged] [--json]

In turn, two streams from the peer through the origin host to the destination, whose answers go directly:

    plain     to an address that the destination has, and that the gateway's and the origin's routes lead to it
    forward   to the origin's own address: a connection that was passed

As fast as the machine can, so what a packet costs is what limits them. The peer's kernel counts the bytes that were
acknowledged, the origin host its packets, the machine the time in which a processor was busy. Packets are as large as
the link allows; with --merged those of 64 kB, as network cards are given them. Ends with the medians of the
pairs' ratios; exit status 1 where `forward` has less than 90 % of the throughput.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from world import PORT, Program, World, world

GOAL = 0.9
_OTHER = {4: "10.77.9.9", 6: "fd00:77:9::9"}  # the destination's own, on the plain way
_LENGTH = {4: 32, 6: 128}
_WARM_UP_S = 0.5
_ACKED = struct.Struct("=120xQ")  # struct tcp_info: tcpi_bytes_acked
_CHUNK = bytes(1 << 18)
_SINK = f"""if True:
    import socket, sys, threading
    from criu_tcpcp import Receiver
    def swallow(sock):
        room = bytearray({len(_CHUNK)})
        with sock:
            while sock.recv_into(room):
                pass
    def listen(listener):
        while True:
            threading.Thread(target=swallow, args=listener.accept()[:1], daemon=True).start()
    kind = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    listener = socket.create_server((sys.argv[1], {PORT}), family=kind)
    threading.Thread(target=listen, args=(listener,), daemon=True).start()
    with Receiver(port={PORT}) as receiver:
        print("ready", flush=True)
        for passed in receiver:
            print("serving", flush=True)
            threading.Thread(target=swallow, args=(passed.socket,), daemon=True).start()
"""


@dataclass(frozen=True)
class Run:
    """Of one stream: bytes a second, processor seconds of the machine for a packet of the origin host."""

    bytes_s: float
    packets: int
    cpu_s: float

    @property
    def cpu_ns_a_packet(self) -> float:
        return self.cpu_s / self.packets * 1e9


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench forward", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--version", type=int, default=4, choices=[4, 6])
    parser.add_argument("--merged", action="store_true", help="packets of 64 kB, as network cards are given them")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    version: int = arguments.version
    with world("echo", version=version, captured=False, register=False) as here:
        here.nodes["destination"].end()  # its place is the sink's
        lead_to_destination(here)
        if not arguments.merged:
            here.lab.peer.run(["ip", "link", "set", "eth0", "gso_max_segs", "1"])
        sink = here.nodes["destination"] = Program(here.lab.destination,
                                                   [sys.executable, "-c", _SINK, _OTHER[version]])
        sink.wait_for("ready")
        pairs = []
        for number in range(arguments.pairs):
            ways = {"plain": plain, "forward": passed}
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            pairs.append({way: measured(here, ways[way], arguments.seconds) for way in order})
        here.release()
    return told(pairs, arguments)


def lead_to_destination(here: World) -> None:
    """The plain way: a router's, not a link's, so nobody is told of a shorter one."""
    lab, other = here.lab, f"{_OTHER[here.version]}/{_LENGTH[here.version]}"
    lab.destination.run(["ip", "address", "add", other, "dev", "lo"])
    lab.gateway.run(["ip", "route", "add", other, "via", str(lab.origin.address(here.version))])
    lab.origin.run(["ip", "route", "add", other, "via", str(lab.destination.address(here.version))])
    with lab.origin.enter():
        for name in ("ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", name).write_text("1")
        for place in ("all", "eth0"):
            Path(f"/proc/sys/net/ipv4/conf/{place}/send_redirects").write_text("0")
    with lab.gateway.enter():
        Path("/proc/sys/net/ipv6/conf/br0/accept_redirects").write_text("0")


def connect(here: World, address: str) -> socket.socket:
    with here.lab.peer.enter():
        return socket.create_connection((address, PORT), timeout=20)


@contextmanager
def plain(here: World) -> Iterator[socket.socket]:
    with connect(here, _OTHER[here.version]) as sock:
        yield sock


@contextmanager
def passed(here: World) -> Iterator[socket.socket]:
    here.owner = here.lab.origin
    served = here.node.count("serving")
    with connect(here, str(here.lab.origin.address(here.version))) as sock:
        here.node.wait_for("serving", served + 1)
        here.pass_once("--into", "receiver", attempts=3)
        yield sock


def measured(here: World, way: Callable[[World], AbstractContextManager[socket.socket]], seconds: float) -> Run:
    with way(here) as sock:
        sock.settimeout(None)
        ended = threading.Event()
        sender = threading.Thread(target=send, args=(sock, ended))
        sender.start()
        try:
            ended.wait(_WARM_UP_S)
            begin = look(here, sock)
            ended.wait(seconds)
            end = look(here, sock)
        finally:
            ended.set()
            sender.join()
    took, acked, packets, cpu = (after - before for before, after in zip(begin, end, strict=True))
    return Run(acked / took, int(packets), cpu)


def send(sock: socket.socket, ended: threading.Event) -> None:
    while not ended.is_set():
        sock.sendall(_CHUNK)


def look(here: World, sock: socket.socket) -> tuple[float, float, float, float]:
    """(seconds, bytes acknowledged, packets that came to the origin host, seconds in which a processor was busy)."""
    (acked,) = _ACKED.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192))
    with here.lab.origin.enter():
        devices = Path("/proc/thread-self/net/dev").read_text().splitlines()
    received = next(line.split()[2] for line in devices if line.lstrip().startswith("eth0:"))
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return time.monotonic(), acked, int(received), (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def told(pairs: list[dict[str, Run]], arguments: argparse.Namespace) -> int:
    throughput = [one["forward"].bytes_s / one["plain"].bytes_s for one in pairs]
    cost = [one["forward"].cpu_ns_a_packet / one["plain"].cpu_ns_a_packet for one in pairs]
    found = {"version": arguments.version, "merged": arguments.merged, "throughput": statistics.median(throughput),
             "cpu": statistics.median(cost), "pairs": [{way: asdict(run) for way, run in one.items()} for one in pairs]}
    if arguments.json:
        print(json.dumps(found))
    else:
        print(f"IPv{arguments.version}, {'packets of 64 kB' if arguments.merged else 'packets as on the link'}\n"
              f"{'':10}{'MB/s':>10}{'packets/s':>12}{'CPU ns a packet':>18}")
        for way in pairs[0]:
            runs = [one[way] for one in pairs]
            print(f"{way:10}{statistics.median(one.bytes_s for one in runs) / 1e6:10.1f}"
                  f"{statistics.median(one.packets for one in runs) / arguments.seconds:12.0f}"
                  f"{statistics.median(one.cpu_ns_a_packet for one in runs):18.0f}")
        print(f"forward / plain, median of {len(pairs)} pairs: throughput {found['throughput']:.3f} "
              f"({min(throughput):.3f} to {max(throughput):.3f}), CPU a packet {found['cpu']:.3f}")
    return int(found["throughput"] < GOAL)


if __name__ == "__main__":
    sys.exit(main())
