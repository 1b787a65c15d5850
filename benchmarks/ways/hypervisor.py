"""A hypervisor with no machine in it, for passt.py: a TAP device of this network namespace is the guest's network card.

    python hypervisor.py TAP SOCKET --stream DESCRIPTOR DESCRIPTOR --gateway DESCRIPTOR DESCRIPTOR

The guest is the namespace: its kernel's own TCP, and programs of it. Frames go between the device and the queues of a
vhost-user back end, first the one that listens on SOCKET. As QEMU does, a move stops the queues, asks the back end for
its state, sends that to the other host (over the two ends of one connection, `--stream`), loads it into the back end
there, and starts the queues there. What QEMU has to do besides, to send the memory that the guest still changed, and
the guest's own state, takes no time here, since nothing of the guest moves.

The guest's address moves with it: `--gateway` is the input and the output of an `ip -batch -` at the gateway, which
drops what goes to the address while no host can take it.

Lines on stdin: `prepare SOCKET` connects to the next back end, as the hypervisor there does when it starts;
`move ADDRESS HOST` moves the guest to it, and leads ADDRESS to HOST. As `lab.node` does, it tells what happens:
running, prepared, moved, with what each step took in ms.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import mmap
import os
import select
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from criu_tcpcp.lab.node import say
from ways.vhostuser import RECEIVE, TRANSMIT, BackEnd, Shared
from ways.virtqueue import Layout, Virtqueue

_TUNSETIFF = 0x400454ca                   # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 2, 0x1000
_BASE = 1 << 30                           # where the guest's memory begins; any number but 0 will do
_QUEUE = 256
_ROOM = 2048                              # a frame of 1514 bytes, and what comes before it
_NET_HEADER = 12                          # struct virtio_net_hdr_v1: no offload, so that all of it is 0
_LENGTH = struct.Struct("!Q")
STEPS = ("stop the queues", "save", "copy and load", "start the queues")


class Guest:
    """The network card of the guest, and the device that stands for its driver."""

    def __init__(self, tap: str) -> None:
        self.tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self.tap, _TUNSETIFF, struct.pack("16sH22x", tap.encode(), _IFF_TAP | _IFF_NO_PI))
        layouts = [Layout(0, _QUEUE, _ROOM)]
        layouts.append(Layout(layouts[0].end, _QUEUE, _ROOM))
        size = layouts[1].end
        memory = os.memfd_create("guest")
        os.ftruncate(memory, size)
        view = memoryview(mmap.mmap(memory, size))
        self.receiving, self.sending = (
            Virtqueue(view, layout, _BASE, writable=number == RECEIVE) for number, layout in enumerate(layouts))
        for _ in range(_QUEUE):
            self.receiving.offer()
        self.shared = Shared(memory, size, _BASE, (self.receiving, self.sending),
                             (os.eventfd(0), os.eventfd(0)), (os.eventfd(0), os.eventfd(0)))

    def deliver(self) -> None:
        """What the back end sent to the guest; the buffers go back to it."""
        while (found := self.receiving.take()) is not None:
            index, length = found
            with self.receiving.buffer(index) as buffer:
                os.write(self.tap, buffer[_NET_HEADER:length])
            self.receiving.offer()

    def send(self) -> None:
        """What the guest has to send, as far as there are buffers."""
        sent = False
        while (index := self._free()) is not None:
            with self.sending.buffer(index) as buffer:
                try:
                    length = os.readv(self.tap, [buffer[_NET_HEADER:]])
                except BlockingIOError:
                    break
            self.sending.offer(_NET_HEADER + length)
            sent = True
        if sent:
            os.eventfd_write(self.shared.kicks[TRANSMIT], 1)

    def _free(self) -> int | None:
        if (index := self.sending.free()) is None:
            while self.sending.take() is not None:
                pass
            index = self.sending.free()
        return index


class Gateway:
    """Leads an address to a host, or drops what goes there, in some 0.1 ms."""

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading = writing, os.fdopen(reading)

    def replace(self, route: str, address: str) -> None:
        """Until it is done: what is shown then is the answer."""
        os.write(self._writing, f"route replace {route}\nroute show {address}\n".encode())
        shown = self._reading.readline()
        if not shown.startswith(route):
            raise SystemExit(f"the gateway has not taken the route {route}: {shown!r}")


class Hypervisor:
    def __init__(self, guest: Guest, first: str, stream: tuple[socket.socket, socket.socket], gateway: Gateway) -> None:
        self._guest, self._stream, self._gateway = guest, stream, gateway
        self._here = BackEnd(first)
        self._there: BackEnd | None = None
        self._here.start(guest.shared, (0, 0))
        say("running")

    def run(self) -> None:
        """Until stdin ends."""
        guest, stdin = self._guest, sys.stdin.fileno()
        called = guest.shared.calls[RECEIVE]
        poll = select.poll()
        for descriptor in (stdin, guest.tap, called):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _events in poll.poll():
                if descriptor == guest.tap:
                    guest.send()
                elif descriptor == called:
                    os.eventfd_read(called)
                    guest.deliver()
                elif line := os.read(stdin, 4096).decode():
                    command, *arguments = line.split()
                    {"prepare": self.prepare, "move": self.move}[command](*arguments)
                else:
                    return

    def prepare(self, path: str) -> None:
        self._there = BackEnd(path)
        say("prepared")

    def move(self, address: str, host: str) -> None:
        """The guest stands still: nobody reads what it sends, or gives it anything."""
        assert self._there is not None
        times = [time.monotonic()]
        bases = self._here.stop()
        self._guest.deliver()      # what came before that
        times.append(time.monotonic())
        self._gateway.replace(f"blackhole {address}", address)
        state = self._here.save()
        times.append(time.monotonic())
        self._there.load(self._sent(state))
        self._gateway.replace(f"{address} via {host}", address)
        times.append(time.monotonic())
        self._there.start(self._guest.shared, bases)
        # The device looks at its queue: what lies there was told to the other one.
        os.eventfd_write(self._guest.shared.kicks[TRANSMIT], 1)
        times.append(time.monotonic())
        self._here.close()
        self._here, self._there = self._there, None
        took = [round((after - before) * 1e3, 3) for before, after in itertools.pairwise(times)]
        say("moved", bytes=len(state), steps=dict(zip(STEPS, took, strict=True)))

    def _sent(self, state: bytes) -> bytes:
        """The state as the other host gets it."""
        sending, receiving = self._stream
        sending.sendall(_LENGTH.pack(len(state)) + state)
        size = _LENGTH.unpack(receiving.recv(_LENGTH.size, socket.MSG_WAITALL))[0]
        return receiving.recv(size, socket.MSG_WAITALL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="hypervisor.py")
    parser.add_argument("tap")
    parser.add_argument("socket")
    parser.add_argument("--stream", type=int, nargs=2, required=True)
    parser.add_argument("--gateway", type=int, nargs=2, required=True)
    arguments = parser.parse_args()
    sending, receiving = arguments.stream
    with socket.socket(fileno=sending) as there, socket.socket(fileno=receiving) as back:
        Hypervisor(Guest(arguments.tap), arguments.socket, (there, back), Gateway(*arguments.gateway)).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
