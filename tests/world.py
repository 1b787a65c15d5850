"""A lab with a program at each host, a peer that talks, captures that see all, and the real command that passes.

`World` is what every test of a pass starts from. It ends every test with the same questions: did the wire assertions
hold, and is anything left on a host?
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from closing import until_closed
from criu_tcpcp import journal, verify
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.kernel.process import run_state
from criu_tcpcp.lab import Host, Lab, leftovers
from waiting import PATIENCE_S, until

COMMAND = str(Path(sys.executable).parent / "criu-tcpcp")
PORT = 9000
TIMER_MS = 150  # the shortest retransmission timer is 200 ms (TCP_RTO_MIN)


class Program:
    """A process in a host that tells events as JSON lines."""

    def __init__(self, host: Host, argv: list[str], **options: Any) -> None:
        self.host = host
        self.process = host.spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                words = line.split()
                self.events.append(json.loads(line) if line.startswith("{") else {"event": words[0], "words": words})
                self._changed.notify_all()

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The `count`th event of this name."""
        def found() -> list[dict[str, Any]]:
            return [one for one in self.events if one.get("event") == event]
        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, PATIENCE_S), (event, self.events, self.words())
            return found()[count - 1]

    def count(self, event: str) -> int:
        return sum(one.get("event") == event for one in self.events)

    def words(self) -> str:
        """What it said on stderr, once it has ended."""
        if self.process.poll() is None or self.process.stderr is None:
            return ""
        return self.process.stderr.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def _run_directory(path: Path) -> Iterator[None]:
    """This process takes `path` for the run directory inside the `with`."""
    before = os.environ.get("CRIU_TCPCP_RUN_DIR")
    os.environ["CRIU_TCPCP_RUN_DIR"] = str(path)
    try:
        yield
    finally:
        os.environ.pop("CRIU_TCPCP_RUN_DIR")
        if before is not None:
            os.environ["CRIU_TCPCP_RUN_DIR"] = before


def capturing(host: Host, path: Path, length: int = 200, what: str = "tcp",
              interface: str = "") -> subprocess.Popen[bytes]:
    """A tcpdump that sees all from now on; `length` bytes of each packet (0: all) go to `path`."""
    process = host.spawn(["tcpdump", "-i", interface or host.interface, "-s", str(length), "-B", "65536", "-U",
                          "--immediate-mode", "-w", str(path), f"{what} or icmp or icmp6"], stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert any(b"listening" in line for line in process.stderr)  # of `any` it first says more
    return process


def captured(process: subprocess.Popen[bytes], path: Path) -> bytes:
    """What `capturing` has seen: everything, once it waits for more. Ended before, it leaves the rest unread."""
    until(lambda: run_state(process.pid) == "S", "tcpdump to have read everything")
    process.terminate()
    process.wait()
    return path.read_bytes()


class World:
    """Origin and destination with a `lab.node` each; use `world(...)`. `own_processors`: applications and peer do not
    wait for the tool's processes, as on hosts of their own: they have precedence on the processors that all share."""

    equally_far = True  # both programs are as many hops from the peer

    def __init__(self, lab: Lab, kind: str = "echo", *, version: int = 4, listen: str | None = None,
                 register: bool = True, node_options: tuple[str, ...] = (),
                 destination_options: tuple[str, ...] = (), captured: bool = True, own_processors: bool = False,
                 whole: bool = False, programs: Mapping[str, Sequence[str]] | None = None, port: int = PORT,
                 waiting: bool = True, container: str = "", boxes: Mapping[str, str] | None = None,
                 everywhere: bool = False) -> None:
        """`whole`: capture every byte, and have a network in which none needs a reservation: no packet overtakes
        another, and none is cut by a network card. `programs`: what runs at each of the two hosts instead, and knows
        nothing of passes; it need not tell events. The destination's listens on `port`; `waiting`: until both do.
        `container`: the place in the lab that is the network of a container at the destination; there its program
        runs. `boxes`: the same, by the name of either host, for one that is behind it. `everywhere`: what the
        destination says is captured on whatever interface it leaves, a tunnel too."""
        self.lab, self.version, self.kind = lab, version, kind
        self._boxes = boxes or {}
        #: Where each host's program is.
        self.homes = {lab.origin.name: lab.origin, lab.destination.name: lab.hosts[container or lab.destination.name]}
        for name, box in self._boxes.items():
            self.homes[name] = lab.hosts[box]
        self.clean = {host.name: leftovers(host) for host in self.places}
        for host in (lab.origin, lab.destination):
            with _run_directory(host.run_dir):
                journal.prepare_run_directory()
        self.prefix = ["chrt", "--rr", "1"] if own_processors else []
        common = [*self.prefix, sys.executable, "-m", "criu_tcpcp.lab.node", "--port", str(PORT), "--kind", kind,
                  *(["--register"] if register else []), *node_options]
        address = listen or ("0.0.0.0" if version == 4 else "::")
        self.unmodified = programs is not None
        argv = programs or {lab.origin.name: [*common, "--listen", address],
                            lab.destination.name: [*common, *destination_options]}
        self.nodes = {name: Program(home, [*argv[name]]) for name, home in self.homes.items()}
        for host in (lab.origin, lab.destination):
            if not self.unmodified:
                self.nodes[host.name].wait_for("listening")
            elif waiting:
                self._until_it_listens(host, port if host is lab.destination else PORT)
        self.owner = lab.origin
        self.undone: list[str] = []  # why attempts of the last pass left the connection with its owner
        self.ssh_options: list[str] = []  # of another way to the other host than the lab's
        self.flow: Flow | None = None
        self._slow: list[tuple[int, int]] = []  # passes that held packets for as long as a peer's timer: began, over
        self._owners: list[tuple[int, int, Host, Host]] = []  # of each pass: began, ended (wall clock, ns), from, to
        self._captures: list[tuple[str, verify.Role, subprocess.Popen[bytes], Path]] = []
        self.whole, self._everywhere = whole, everywhere
        if whole:
            lab.keep_order()
        if captured:
            self._captures_on()

    @property
    def places(self) -> list[Host]:
        """Wherever a pass may leave something."""
        return list(dict.fromkeys([self.lab.origin, self.lab.destination, *self.homes.values()]))

    def _seen_at(self, host: Host) -> Host:
        """Where what leaves a host can be seen: a container with a link of its own is one."""
        return host if host.name in self._boxes else self.homes[host.name]

    # -- captures ------------------------------------------------------------------------------------------------------

    def _captures_on(self) -> None:
        for host, role in ((self.lab.peer, verify.Role.PEER), (self.lab.origin, verify.Role.ORIGIN),
                           (self._seen_at(self.lab.destination), verify.Role.DESTINATION)):
            path = self.lab.directory / f"{role.value}.pcap"
            if self.whole:
                host.run(["ip", "link", "set", "dev", host.interface, "gso_max_segs", "1"])
            anywhere = "any" if self._everywhere and role is verify.Role.DESTINATION else ""
            process = capturing(host, path, 0 if self.whole else 200, interface=anywhere)
            self._captures.append((role.value, role, process, path))

    def prove(self, before: dict[str, int] | None = None, *, loss_free: bool = True,
              application: dict[str, Any] | None = None, changes: bool = True,
              passes: int | None = None, reorders: bool = False,
              captures: list[verify.Capture] | None = None) -> verify.Verdict:
        """That the peer could not tell: every assertion over the whole life of the connection, and nothing unjudged but
        what is named here. `application`: what the peer's program reported; `changes`: the owner spoke between any two
        passes, so that every pass can be seen; `passes`: how many there were, where `pass_once` did not do them;
        `captures`: of an earlier call of that name, where several connections are in them."""
        counters = (before, self.counters()) if before is not None else None
        captures = self.captures() if captures is None else captures
        verdict = self._judged(captures, loss_free=loss_free, counters=counters, application=application,
                               passes=passes, reorders=reorders)
        found = [one for one in verdict.violations if not self._was_too_slow(one)]
        assert not found, "\n".join(map(str, found[:20]))
        accepted = ["10: the peer's application: no report" if application is None else None,
                    "9: the peer's kernel counters: not given" if before is None else None,
                    "9: retransmissions are counted, not judged" if not loss_free else None,
                    *(["7: the MSS of ", "3: "] if not self.whole else []),
                    "8: the TTL between the hosts" if not self.equally_far else None]
        unjudged = [text for text in verdict.not_checked if not text.startswith(tuple(filter(None, accepted)))]
        assert unjudged == []
        if passes is None:
            self._spoke_in_turn(captures)
        if changes:
            assert len(verdict.turns) == (self.passes if passes is None else passes) + 1, verdict.turns
        return verdict

    def verdict(self, before: dict[str, int] | None = None, *, loss_free: bool = True,
                reorders: bool = False) -> verify.Verdict:
        """The wire assertions over the whole life of the connection."""
        counters = (before, self.counters()) if before is not None else None
        return self._judged(self.captures(), loss_free=loss_free, counters=counters, application=None,
                            reorders=reorders)

    def _judged(self, captures: list[verify.Capture], *, loss_free: bool,
                counters: tuple[dict[str, int], dict[str, int]] | None,
                application: dict[str, Any] | None, passes: int | None = None,
                reorders: bool = False) -> verify.Verdict:
        """The peer's program closes, and the passed one closes then: who was asked for a FIN is known."""
        assert self.flow is not None
        expect = verify.Expectations(loss_free=loss_free, passes=self.passes if passes is None else passes,
                                     offload=not self.whole, fin_passed=True, fin_peer=True,
                                     equal_hops=self.equally_far,
                                     reorders=reorders)
        record = verify.PeerRecord.from_json(application) if application is not None else None
        if reorders:  # such a network doubles packets, too: the last one, to an end that has closed
            captures = [until_closed(capture, self.flow) for capture in captures]
        return verify.verify(captures, self.flow, expect, counters=counters, application=record)

    def as_said(self, captures: list[verify.Capture]) -> list[verify.Capture]:
        """Where what the destination says comes back through the origin: each packet at the host that said it, and as
        it leaves the network of the two hosts. Without what tried the way, and what the origin host only sent on."""
        assert self.flow is not None
        said = {capture.role: [packet for packet in capture.packets if packet.flags or packet.src != self.flow.local]
                for capture in captures}
        there = {_content(packet) for packet in said[verify.Role.DESTINATION] if packet.src == self.flow.local}
        left_with = {_content(packet): packet.ttl for packet in said[verify.Role.ORIGIN]}  # in and out: the last is out
        said[verify.Role.ORIGIN] = [packet for packet in said[verify.Role.ORIGIN] if _content(packet) not in there]
        said[verify.Role.DESTINATION] = [dataclasses.replace(packet, ttl=left_with.get(_content(packet), packet.ttl))
                                         for packet in said[verify.Role.DESTINATION]]
        return [dataclasses.replace(capture, packets=tuple(said[capture.role])) for capture in captures]

    def _was_too_slow(self, violation: verify.Violation) -> bool:
        """The peer's timer rang because this machine took longer for a pass than any timer waits: not the tool's
        doing."""
        packet = violation.packet
        return violation.assertion == 9 and any(
            not isinstance(packet, verify.Packet) or began <= packet.time_ns <= over for began, over in self._slow)

    def _spoke_in_turn(self, captures: list[verify.Capture]) -> None:
        """Between two passes only the owner spoke, by what left the hosts; within one, both may have."""
        assert self.flow is not None
        for capture in captures:
            if capture.role is verify.Role.PEER:
                continue
            for packet in capture.packets:
                if (packet.src, packet.dst) == (self.flow.local, self.flow.peer):
                    number = bisect.bisect_right(self._owners, packet.time_ns, key=lambda one: one[0])
                    _began, ended, old, new = self._owners[number - 1] if number else (0, 0, None, self.lab.origin)
                    may = {new.name} if packet.time_ns > ended or old is None else {old.name, new.name}
                    assert capture.role.value in may, f"{packet}: after {number} passes {new.name} has the connection"

    @property
    def passes(self) -> int:
        return len(self._owners)

    def captures(self) -> list[verify.Capture]:
        """Stop capturing, and what was captured."""
        found = []
        for name, role, process, path in self._captures:
            found.append(verify.parse(captured(process, path), name, role))
        self._captures = []
        return found

    @property
    def seen(self) -> tuple[str, int]:
        """Whom the peer speaks to."""
        return str(self.lab.origin.address(self.version)), PORT

    def knows_peer(self, port: int, address: object = None) -> None:
        """The connection under test is the one from this port of the peer, or of another address there."""
        addresses = [self.lab.origin.address(self.version), address or self.lab.peer.address(self.version)]
        self.flow = Flow(Endpoint(ipaddress.ip_address(str(addresses[0])), PORT),
                         Endpoint(ipaddress.ip_address(str(addresses[1])), port))
        if self.unmodified:
            until(lambda: self.serving(self.owner), "the connection to be accepted", every_s=0.02)
        else:
            self.node.wait_for("serving")

    def serving(self, host: Host) -> list[tuple[int, int]]:
        """(process, descriptor) of whoever has the connection at this host, by ss."""
        assert self.flow is not None
        chosen = ["sport", "=", str(self.flow.local.port), "dport", "=", str(self.flow.peer.port)]
        return users(self.homes[host.name].run(["ss", "-tnpH", "state", "all", *chosen]).stdout)

    def _until_it_listens(self, host: Host, port: int) -> None:
        home = self.homes[host.name]
        until(lambda: home.run(["ss", "-tlnH", "sport", "=", str(port)]).stdout, f"{host.name}'s program to listen",
              every_s=0.02)

    # -- the pass ------------------------------------------------------------------------------------------------------

    @property
    def node(self) -> Program:
        """The program that has the connection."""
        return self.nodes[self.owner.name]

    @property
    def other(self) -> Host:
        return self.lab.destination if self.owner is self.lab.origin else self.lab.origin

    def descriptor(self) -> int:
        """Of the connection, in the program that has it."""
        if self.unmodified:
            return self.serving(self.owner)[0][1]
        return int(self.node.wait_for("serving", max(1, self.node.count("serving")))["fd"])

    def pass_argv(self, *options: str) -> list[str]:
        pid = self.serving(self.owner)[0][0] if self.unmodified else self.node.process.pid
        return [COMMAND, "pass", "--json", "--pid", str(pid), "--fd", str(self.descriptor()),
                *(self.ssh_options or self.lab.ssh_options(self.other, self.version)), *options]

    def queued(self) -> tuple[int, int]:
        """(bytes in the receive queue, bytes in the send queue) of the connection, at its owner. Asked often, while
        they fill and empty: `ss` takes some milliseconds, `list` a second on a busy machine."""
        said = self.owner.run(["ss", "-tnH", "state", "established", "sport", "=", str(PORT)]).stdout.split()
        return int(said[0]), int(said[1])

    def listed(self, *options: str) -> str:
        """What `list` says of the program that has the connection."""
        return self.owner.run([COMMAND, "list", *options, "--pid", str(self.node.process.pid)]).stdout

    def pass_once(self, *options: str, env: Mapping[str, str] | None = None, attempts: int = 1) -> dict[str, Any]:
        """Pass the connection to the other host, over real SSH; returns the report. `attempts`: on a machine that has
        much else to do, one may be undone for want of time, which the peer must not notice either."""
        served = self.nodes[self.other.name].count("serving")
        self.undone = []
        for left in reversed(range(attempts)):
            began = time.time_ns()
            done = self.owner.run(self.pass_argv(*options), check=False, env=env)
            assert done.stdout, done.stderr
            report = json.loads(done.stdout)
            if (report.get("stall_ms") or 0) > TIMER_MS:  # a refusal has none
                self._slow.append((began, time.time_ns() + 10**9))
            undone = report["owner"] == "origin" and re.search("in time|max-stall", str(report["error"]))
            if not (left and undone):
                break
            self.undone.append(str(report["error"]))
        assert done.returncode == report["exit"] == 0, (report, done.stderr)
        self._owners.append((began, time.time_ns(), self.owner, self.other))
        self.owner = self.other
        if not self.unmodified:
            self.node.wait_for("serving", served + 1)
        return dict(report)

    # -- the end -------------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The peer's kernel counters."""
        return verify.parse_netstat(self.lab.peer.run(["cat", "/proc/thread-self/net/netstat"]).stdout
                                    + self.lab.peer.run(["cat", "/proc/thread-self/net/snmp"]).stdout)

    def release(self) -> list[str]:
        """`release` at both hosts, and what is left there afterwards."""
        left: list[str] = []
        for host in (self.lab.origin, self.lab.destination):
            said = host.run([COMMAND, "release"]).stdout
            left += [f"{host.name}: {line}" for line in said.splitlines() if line.startswith("kept")]
        for node in self.nodes.values():
            node.end()
        for host in self.places:
            left += [f"{host.name}: {line}" for line in self.left_at(host)]
        return left

    def left_at(self, host: Host) -> list[str]:
        """What a pass has left there, in files, rules, routes and processes."""
        now = [line for line in leftovers(host) if "apps" not in line and line != "file d passes"]
        return [line for line in now if line not in self.clean[host.name]]


def _content(packet: verify.Packet) -> tuple[object, ...]:
    return packet.src, packet.seq, packet.ack, packet.flags, packet.window, packet.payload_len, packet.options


def users(listed: str) -> list[tuple[int, int]]:
    return [(int(pid), int(fd)) for pid, fd in re.findall(r"pid=(\d+),fd=(\d+)", listed)]


@contextlib.contextmanager
def world(kind: str = "echo", **options: Any) -> Iterator[World]:
    with Lab() as lab:
        yield World(lab, kind, **options)


class Peer:
    """A `lab.load` program at the peer."""

    def __init__(self, here: World, *argv: str, address: str | None = None) -> None:
        name, *rest = argv
        target, port = here.seen
        argv_ = [*here.prefix, sys.executable, "-m", "criu_tcpcp.lab.load", name, address or target, str(port), *rest]
        self.program = Program(here.lab.peer, argv_, stdin=subprocess.PIPE)
        here.knows_peer(int(self.program.wait_for("ready")["words"][1]))

    def finish(self) -> dict[str, Any]:
        """Ask it to end in order; its report."""
        process = self.program.process
        if process.stdin is not None:
            process.stdin.close()
        return self.result()

    def result(self) -> dict[str, Any]:
        until(lambda: any("program" in one for one in self.program.events), "the peer's report")
        return next(one for one in self.program.events if "program" in one)
