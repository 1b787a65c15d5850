"""A strict peer as a program: `python -m criu_tcpcp.lab.strict rr|stream HOST PORT --address OURS ...`.

    rr        one request at a time, at a fixed rate, as `lab.load rr-peer`
    stream    two streams at the same time, as `lab.load stream-peer`

It prints `ready LOCALPORT` once connected, and one JSON object at its end: counts, and `violation`: null, or the first
thing that no honest endpoint would have sent, with the packet and the numbers. Exit status 1 for a violation, 2 for bad
usage. SIGTERM (or, with --until-eof, the end of stdin) asks rr for an orderly end, and stream to stop soon, wherever it
is. `--address` is one that the host does not have, on the link of `--interface` (packets.py). Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import random
import sys
import time
from typing import Any

from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.verify.packet import IcmpError, Packet
from criu_tcpcp.verify.seq import MODULUS

from ..load import Stop
from .conversation import Conversation, RequestResponse, Streams
from .judge import Path, Violation
from .packets import Wire
from .segments import from_bytes, to_bytes, wrong_checksum
from .tcp import Settings, State, Tcp

_EPHEMERAL = (32768, 60999)


class Run:
    """One connection from its first packet to its last."""

    def __init__(self, wire: Wire, tcp: Tcp, conversation: Conversation, stop: Stop) -> None:
        self._wire, self._tcp, self._conversation, self._stop = wire, tcp, conversation, stop
        self._number = 0
        self._ready = False

    def run(self) -> Violation | None:
        """Until both have closed, or the other end said what cannot be."""
        try:
            self._tcp.connect(time.monotonic())
            while not self._conversation.done:
                self._send()
                self._stop.wait(self._wire.socket, self._timeout_s())
                if self._stop.asked:
                    self._conversation.stop()
                self._receive()
                now = time.monotonic()
                self._tcp.tick(now)
                self._conversation.step(now)
                if self._tcp.state is State.OPEN and not self._ready:
                    self._ready = True
                    print("ready", self._tcp.settings.local.port, flush=True)
            self._send()
        except Violation as violation:
            return violation
        return None

    def _timeout_s(self) -> float:
        now = time.monotonic()
        wanted = [at for at in (self._tcp.deadline(), self._conversation.deadline(now)) if at is not None]
        return max(min(wanted) - now, 0.0) if wanted else 1.0

    def _send(self) -> None:
        for packet in self._tcp.take():
            self._wire.send(to_bytes(packet), packet.dst.address)

    def _receive(self) -> None:
        settings = self._tcp.settings
        while (data := self._wire.receive()) is not None:
            self._number += 1
            packet = from_bytes(data, self._number, time.time_ns())
            if isinstance(packet, IcmpError) and packet.quoted_src == settings.local:
                raise Violation("icmp", "an ICMP error about the connection", packet)
            if not isinstance(packet, Packet) or (packet.src, packet.dst) != (settings.remote, settings.local):
                continue
            wrong = wrong_checksum(data)
            if wrong is not None:
                raise Violation("checksum", wrong, packet)
            now = time.monotonic()
            self._tcp.receive(packet, now)
            self._conversation.step(now)
            self._send()


def told(violation: Violation, tcp: Tcp) -> dict[str, Any]:
    """A violation for a program to read."""
    packet = violation.packet
    told: dict[str, Any] = {"rule": violation.rule, "reason": violation.reason, "packet": None,
                            "numbers": tcp.judge.numbers}
    if packet is not None:
        told["packet"] = {"text": str(packet), "number": packet.number, "time_ns": packet.time_ns}
    if isinstance(packet, Packet):
        told["packet"] |= {"seq": packet.seq, "ack": packet.ack, "flags": packet.flags, "window": packet.window,
                           "length": packet.payload_len, "tsval": packet.options.tsval,
                           "tsecr": packet.options.tsecr, "sack": packet.options.sack}
    return told


def _scale(text: str) -> int | None:
    if text == "none":
        return None
    value = int(text)
    if not 0 <= value <= 14:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m criu_tcpcp.lab.strict")
    programs = parser.add_subparsers(dest="program", required=True)
    for name in ("rr", "stream"):
        program = programs.add_parser(name)
        program.add_argument("host", type=ipaddress.ip_address)
        program.add_argument("port", type=int)
        program.add_argument("--address", type=ipaddress.ip_address, required=True, help="to speak from")
        program.add_argument("--interface", default="eth0")
        program.add_argument("--seed", type=int, default=1, help="of what this end sends; the other's is one more")
        program.add_argument("--no-timestamps", dest="timestamps", action="store_false")
        program.add_argument("--no-sack", dest="sack", action="store_false")
        program.add_argument("--window-scale", type=_scale, default=7, metavar="0..14|none")
        program.add_argument("--mss", type=int, default=1440, help="the largest segment that we take")
        program.add_argument("--buffer", type=int, default=1 << 18, help="bytes that may wait for us to read")
        program.add_argument("--ack-delay", type=float, default=0.04, metavar="SECONDS")
        program.add_argument("--iss", type=int, help="initial sequence number, else any")
        program.add_argument("--tsval", type=int, help="first timestamp, else any")
        program.add_argument("--lossless", action="store_true", help="the path loses nothing: a gap is a violation")
        program.add_argument("--patience", type=float, default=10.0, metavar="SECONDS",
                             help="how long nothing may move while the other end owes something")
        program.add_argument("--seconds", type=float)
        program.add_argument("--until-eof", action="store_true", help="end when stdin does")
        program.add_argument("--rate", type=float, help="requests, or bytes to send, a second")
        if name == "rr":
            program.add_argument("--size", type=int, default=100)
            program.add_argument("--answer-size", type=int)
        else:
            program.add_argument("--send", type=int, required=True)
            program.add_argument("--receive", type=int, required=True)
            program.add_argument("--read-rate", type=float, help="bytes a second to read")
    return parser


def _conversation(arguments: argparse.Namespace, tcp: Tcp) -> Conversation:
    if arguments.program == "rr":
        return RequestResponse(tcp, rate=arguments.rate or 100.0, size=arguments.size,
                               answer_size=arguments.answer_size, seed=arguments.seed, patience_s=arguments.patience)
    return Streams(tcp, send=arguments.send, receive=arguments.receive, rate=arguments.rate,
                   read_rate=arguments.read_rate, seed=arguments.seed, patience_s=arguments.patience)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        remote, local = (Endpoint(address, port) for address, port in (
            (arguments.host, arguments.port), (arguments.address, random.randint(*_EPHEMERAL))))
        if local.address.version != remote.address.version:
            raise ValueError("HOST and --address are of different families")
    except ValueError as error:
        parser.error(str(error))
    clock = int(time.monotonic() * 1000)
    tcp = Tcp(Settings(
        local, remote, iss=random.randrange(MODULUS) if arguments.iss is None else arguments.iss,
        tsval=(random.randrange(MODULUS) if arguments.tsval is None else arguments.tsval) - clock,
        timestamps=arguments.timestamps, sack=arguments.sack, window_scale=arguments.window_scale, mss=arguments.mss,
        buffer=arguments.buffer, ack_delay_s=arguments.ack_delay, path=Path(lossless=arguments.lossless)))
    stop = Stop(stdin=arguments.until_eof, seconds=arguments.seconds)
    conversation = _conversation(arguments, tcp)
    try:
        wire = Wire(arguments.interface, local.address)
    except OSError as error:
        print(f"strict: no packets on {arguments.interface}: {error.strerror}", file=sys.stderr)
        return 2
    with contextlib.closing(wire):
        violation = Run(wire, tcp, conversation, stop).run()
        report = {"program": f"strict-{arguments.program}", "dropped_here": wire.dropped,
                  "violation": told(violation, tcp) if violation is not None else None,
                  "error": str(violation) if violation is not None else None, **conversation.report()}
    print(json.dumps(report), flush=True)
    return 1 if violation is not None else 0


if __name__ == "__main__":
    sys.exit(main())
