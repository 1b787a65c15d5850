"""A bad network as a program on the lab's gateway: `python -m criu_tcpcp.lab.relay --seed 7 --loss 0.05 ...`.

This kernel may have no netem. So the gateway's routing rules lead whatever goes between the peer's link and the
servers' into a TUN device; the program reads the packets there, and writes them back when `weather` says, or never.
What comes out of the device is routed as if nothing had been:

    peer --- to-peer --(rule: iif to-peer)--> [tun] relay [tun] --(table main)--> br0 --- servers     and the other way

Whole IP packets come and go: IPv4 and IPv6 are alike, and the hops are one more for both servers. `--offload`: as
the kernel hands them on, up to 64 KB at once with a header that says how they are to be cut (linux/virtio_net.h): a
stream is then quicker than this program could carry it segment by segment, and what is lost is the whole of one.

It prints `ready` once the packets come its way, and what it did (JSON) when stdin ends. The device, the routes over it
and with them all of its effect go when it ends, in whatever way. Between the servers nothing changes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import ipaddress
import json
import os
import select
import struct
import sys
import time

from .network import GATEWAY, PEER, places
from .network import ip as _ip
from .weather import IN, OUT, Line, Weather

DEVICE = "relay"
_TABLE = 7700
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_VNET_HEADER = 10  # bytes, struct virtio_net_hdr
_LARGEST = 1 << 17
_QUEUE_PACKETS = 20_000  # in the device, while this program does not run
_AT_ONCE = 64  # packets read before those that are due are looked at


class Relay:
    """Open in the gateway's network namespace; `run` until `stop` (a descriptor) ends."""

    def __init__(self, weather: Weather, *, offload: bool = False) -> None:
        self._skip = _VNET_HEADER if offload else 0
        self._lines = {IN: Line(weather, IN), OUT: Line(weather, OUT)}
        self._waiting: list[tuple[int, int, bytes]] = []
        self._order = 0
        self.latest_ns = 0  # how much after its time a packet was written, at worst
        peer, router = (places(())[name] for name in (PEER, GATEWAY))
        self._prefixes = {_prefix(network): direction for direction, place in ((OUT, peer), (IN, router))
                          for network in (place.ipv4.network, place.ipv6.network)}
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if offload else 0)
        fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        if offload:
            fcntl.ioctl(self._fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
        _lead_packets_here(peer.ipv4.network, peer.ipv6.network)

    def run(self, stop: int) -> None:
        while True:
            left_s = None
            if self._waiting:
                left_s = max(0, self._waiting[0][0] - time.monotonic_ns()) / 1e9
            readable, _, _ = select.select([self._fd, stop], [], [], left_s)
            if stop in readable and not os.read(stop, 4096):
                return
            if self._fd in readable:
                self._read()
            self._write()

    def _read(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(self._fd, _LARGEST)
            except BlockingIOError:
                return
            now = time.monotonic_ns()
            direction = self._direction(packet)
            if direction is None:
                continue
            copies, due = self._lines[direction].take(len(packet) - self._skip, now)
            for _ in range(copies):
                self._order += 1
                heapq.heappush(self._waiting, (due, self._order, packet))

    def _write(self) -> None:
        waiting = self._waiting
        while waiting and waiting[0][0] <= (now := time.monotonic_ns()):
            due, _, packet = heapq.heappop(waiting)
            self.latest_ns = max(self.latest_ns, now - due)
            with contextlib.suppress(BlockingIOError):
                os.write(self._fd, packet)

    def _direction(self, packet: bytes) -> str | None:
        """By where it goes; None for what is nobody's."""
        at = self._skip
        if packet[at] >> 4 == 4:
            return self._prefixes.get(packet[at + 16:at + 19])
        return self._prefixes.get(packet[at + 24:at + 32])

    def to_json(self) -> dict[str, object]:
        return {**{name: line.to_json() for name, line in self._lines.items()},
                "latest_ms": round(self.latest_ns / 1e6, 3)}


def _prefix(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bytes:
    """A /24, or a /64."""
    return network.network_address.packed[:network.prefixlen // 8]


def _lead_packets_here(peer4: ipaddress.IPv4Network, peer6: ipaddress.IPv6Network) -> None:
    _ip([], [f"link set {DEVICE} txqueuelen {_QUEUE_PACKETS} addrgenmode none", f"link set {DEVICE} up"])
    for family, network in (("-4", peer4), ("-6", peer6)):
        _ip([family], [f"route add default dev {DEVICE} table {_TABLE}",
                       f"rule add iif to-peer lookup {_TABLE} pref 100",
                       f"rule add iif br0 to {network} lookup {_TABLE} pref 100"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m criu_tcpcp.lab.relay")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="of every packet, one way")
    for name in ("loss", "duplicate", "reorder"):
        parser.add_argument(f"--{name}", type=float, default=0.0, metavar="SHARE", help="of the packets, 0 to 1")
    parser.add_argument("--late", type=float, default=2.0, metavar="MS", help="of what is reordered, at most")
    parser.add_argument("--rate", type=float, help="bytes a second, each way")
    parser.add_argument("--queue", type=float, default=100.0, metavar="MS", help="the longest wait for that")
    parser.add_argument("--spared", type=int, default=0, metavar="N", help="the first N of each way are only delayed")
    parser.add_argument("--offload", action="store_true", help="packets of up to 64 KB, not cut into segments")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        weather = Weather(arguments.seed, arguments.delay, arguments.loss, arguments.duplicate, arguments.reorder,
                          arguments.late, arguments.rate, arguments.queue, arguments.spared)
    except ValueError as error:
        parser.error(str(error))
    try:
        relay = Relay(weather, offload=arguments.offload)
    except (OSError, RuntimeError) as error:
        print(f"relay: {error}", file=sys.stderr)
        return 1
    print("ready", flush=True)
    relay.run(sys.stdin.fileno())
    print(json.dumps(relay.to_json()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
