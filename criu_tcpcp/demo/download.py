"""The scene of `criu-tcpcp demo`: a peer downloads with curl, the connection is passed meanwhile, and all is judged.

    peer         curl http://origin:8080/big.bin | sha256sum
    origin       file_server, which accepts; destination: file_server, which takes what is passed to it

The file's content follows from a seed. Both hosts have it under their own name for it; it has none in the machine's
file system, so nothing of it can stay. What is said of the peer comes from the peer: curl's own words, the sha256sum
behind it, tcpdump, the kernel's counters. How far curl is, /proc/PID/io tells (what it has written).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .. import verify
from ..core.endpoint import Endpoint, Flow
from ..core.errors import Refused
from ..lab import Host
from ..lab.streams import BLOCK, Stream
from ..verify.judgement import NAMES
from .sightings import Record, Switch, record
from .stage import Program, Say, Stage, stage

SCHEMA = 1
PORT = 8080
NAME = "big.bin"
SEED = 2004
_STALLED_S = 20.0
_WORDS = "%{stderr}%{http_code} %{size_download} %{size_header} %{local_port}\\n"


@dataclass(frozen=True)
class Result:
    """What happened. `gap_ms`: the longest time in which the peer saw no packet, by the verifier; `usual_gap_ms`: the
    median. `reports`: of every pass, as the command gave it."""

    size: int
    rate: float
    addresses: dict[str, str]
    reports: list[dict[str, Any]]
    curl_status: int
    downloaded: int
    head: int
    sha256: dict[str, str]
    verdict: verify.Verdict
    record: Record
    seconds: float
    usual_gap_ms: float

    @property
    def gap_ms(self) -> float:
        return self.verdict.stall.gap_ns / 1e6

    @property
    def bytes_by_host(self) -> dict[str, int]:
        return self.record.bytes_by_host()

    @property
    def switches(self) -> list[Switch]:
        return self.record.switches

    def assertions(self) -> list[dict[str, Any]]:
        """Every wire assertion: its violations, and what of it could not be checked."""
        return [{"number": number, "name": name,
                 "violations": [str(one) for one in self.verdict.violations if one.assertion == number],
                 "not_checked": [text.partition(": ")[2] for text in self.verdict.not_checked
                                 if text.startswith(f"{number}: ")]}
                for number, name in NAMES.items()]

    def problems(self) -> list[str]:
        """What is not as it should be."""
        found = [str(one) for one in self.verdict.violations]
        if self.curl_status or self.downloaded != self.size:
            found.append(f"curl ended with status {self.curl_status} and {self.downloaded} of {self.size} bytes")
        if len(set(self.sha256.values())) != 1:
            found.append("the SHA-256 differ: " + ", ".join(f"{name} {text}" for name, text in self.sha256.items()))
        if len(self.switches) != len(self.reports):
            found.append(f"the speaker changed {len(self.switches)} times in {len(self.reports)} passes")
        return found

    def require_ok(self) -> None:
        if problems := self.problems():
            raise Refused(f"not as it should be: {'; '.join(problems)}")

    def to_json(self) -> dict[str, Any]:
        counts = self.verdict.counts
        packets = self.record.packets_by_host()
        return {"schema": SCHEMA, "ok": not self.problems(), "problems": self.problems(), "size": self.size,
                "rate": self.rate, "seconds": round(self.seconds, 3),
                "hosts": {name: {"address": address, **({} if name == "peer" else {
                    "packets": packets[name], "bytes": self.bytes_by_host[name]})}
                    for name, address in self.addresses.items()},
                "curl": {"exit": self.curl_status, "bytes": self.downloaded, "head": self.head}, "sha256": self.sha256,
                "stall_ms": self.gap_ms, "usual_gap_ms": self.usual_gap_ms,
                "switches": [{"from": str(one.old), "to": str(one.new), "silence_ms": one.silence_ms}
                             for one in self.switches],
                "retransmissions": counts.retransmissions, "tail_loss_probes": counts.tail_loss_probes,
                "resets": counts.resets, "assertions": self.assertions(), "passes": self.reports}


def play(*, passes: int = 1, size: int = 256 << 20, rate: float = 20.0, say: Say) -> Result:
    """The whole scene. `rate`: MB/s of the download. Raises Refused where it cannot be played to its end."""
    with stage(say) as here, _same_file(here, size) as directories:
        lab = here.lab
        servers = {}
        for host in (lab.origin, lab.destination):
            accepting = ["--listen", str(host.ipv4)] if host is lab.origin else []
            servers[host.name] = here.start(host, [
                sys.executable, "-m", "criu_tcpcp.demo.file_server", "serve", directories[host.name],
                "--port", str(PORT), "--rate", str(rate), *accepting])
            _on_one_cpu(servers[host.name].pid)
            servers[host.name].wait_for("listens on" if accepting else "takes what is passed")
        before = _counters(lab.peer)
        with _captured(here) as captures:
            began = time.monotonic()
            curl = _Curl(here)
            reports = _passes(here, servers, curl, passes, size)
            status, words, digest = curl.finish()
            seconds = time.monotonic() - began
        try:
            _code, downloaded, head, port = map(int, words.splitlines()[-1].split())
        except (ValueError, IndexError):
            raise Refused(f"curl ended with status {status}: {words.strip()}") from None
        flow = Flow(Endpoint(lab.origin.ipv4, PORT), Endpoint(lab.peer.ipv4, port))
        taken = captures.taken()
        error = None if status == 0 else f"curl's status {status}"
        verdict = verify.verify(
            taken if passes == 1 else [one for one in taken if one.role is verify.Role.PEER], flow,
            # A bulk stream on a machine that is busy has retransmissions by itself: they are counted and shown.
            verify.Expectations(loss_free=False, fin_passed=True, fin_peer=True),
            counters=(before, _counters(lab.peer)),
            # No budget is given, so only the error is judged; the stall is in the result.
            application=verify.PeerRecord(error, 0))
        seen = record(taken, flow, {role: _mac(lab.hosts[role.value])
                                    for role in (verify.Role.ORIGIN, verify.Role.DESTINATION)})
        digests = {name: _first_word(lab.hosts[name].run(["sha256sum", f"{directory}/{NAME}"], timeout=120).stdout)
                   for name, directory in directories.items()}
        times = [one.time_ns for one in seen.sightings]
        usual = statistics.median([(later - one) / 1e6 for one, later in itertools.pairwise(times)] or [0.0])
        return Result(size, rate, {name: str(lab.hosts[name].ipv4) for name in ("peer", "origin", "destination")},
                      reports, status, downloaded, head, {"peer": digest, **digests}, verdict, seen, seconds, usual)


def _passes(here: Stage, servers: dict[str, Program], curl: _Curl, passes: int, size: int) -> list[dict[str, Any]]:
    """Pass it on at equal distances of the download, to and fro."""
    reports = []
    owner, other = here.lab.origin, here.lab.destination
    for number in range(passes):
        server = servers[owner.name]
        curl.wait_for(size * number // (passes + 2) + 1)
        found = here.descriptors(server)
        curl.wait_for(size * (number + 1) // (passes + 2))
        if not found:
            raise Refused(f"the {owner.name} has no download to pass", hint="a larger --size, or a smaller --rate")
        here.say(f"{'peer':>11} | curl has {curl.written() >> 20} of {size >> 20} MB")
        try:
            reports.append(here.pass_connection(server, found[0], other))
        except Refused as error:
            if curl.has_ended():
                raise _Ended(f"the download ended before the pass: {error.message}",
                             hint="a larger --size, or a smaller --rate") from None
            raise
        owner, other = other, owner
    return reports


class _Ended(Refused):
    """curl has ended, well or not."""


class _Curl:
    """`curl URL | sha256sum` at the peer."""

    def __init__(self, here: Stage) -> None:
        url = f"http://{here.lab.origin.ipv4}:{PORT}/{NAME}"
        here.say(f"{'peer':>11} # curl {url} | sha256sum")
        self._said: str | None = None
        self._curl = here.lab.peer.spawn(["curl", "-q", "-sS", "--noproxy", "*", "-w", _WORDS, url], text=True,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                         process_group=0)
        _on_one_cpu(self._curl.pid)
        self._sum = here.lab.peer.spawn(["sha256sum"], text=True, stdin=self._curl.stdout, stdout=subprocess.PIPE,
                                        process_group=0)
        assert self._curl.stdout is not None
        self._curl.stdout.close()  # sha256sum has it

    def has_ended(self) -> bool:
        return self._curl.poll() is not None

    def written(self) -> int:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._curl.pid}/io").read_text().splitlines():
                if line.startswith("wchar: "):
                    return int(line.split()[1])
        return 0

    def wait_for(self, count: int) -> None:
        """Until so many bytes have come, or curl has ended."""
        moved, since = 0, time.monotonic()
        while self._curl.poll() is None:
            now = self.written()
            if now >= count:
                return
            if now > moved:
                moved, since = now, time.monotonic()
            if time.monotonic() - since > _STALLED_S:
                raise Refused(f"the download stands still at {moved} bytes")
            time.sleep(0.005)
        raise _Ended(f"curl ended with status {self._curl.returncode} before it was to: {self.words()}")

    def words(self) -> str:
        """What it said, once it has ended."""
        if self._said is None:
            assert self._curl.stderr is not None
            self._said = self._curl.stderr.read().strip()
        return self._said

    def finish(self) -> tuple[int, str, str]:
        """Its status, its words, and the digest of what it wrote."""
        with contextlib.suppress(_Ended):
            self.wait_for(1 << 62)
        assert self._sum.stdout is not None
        digest = _first_word(self._sum.stdout.read())
        if self._sum.wait() != 0:
            raise Refused(f"sha256sum ended with status {self._sum.returncode}")
        return self._curl.returncode, self.words(), digest


class _Captures:
    """tcpdump at the peer and at both hosts."""

    def __init__(self, here: Stage) -> None:
        self._running = []
        for host, role in ((here.lab.peer, verify.Role.PEER), (here.lab.origin, verify.Role.ORIGIN),
                           (here.lab.destination, verify.Role.DESTINATION)):
            path = here.lab.directory / f"{role.value}.pcap"
            process = host.spawn(["tcpdump", "-i", host.interface, "-s", "200", "-B", "65536", "-U",
                                  "--immediate-mode", "-w", str(path), f"tcp port {PORT} or icmp"],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
            assert process.stderr is not None
            first = process.stderr.readline()
            if "listening" not in first:
                raise Refused(f"tcpdump at the {host.name}: {first.strip()}")
            self._running.append((role, process, path))

    def stop(self) -> None:
        for _role, process, _path in self._running:
            process.terminate()

    def taken(self) -> list[verify.Capture]:
        """Refused where they are not whole."""
        found = []
        for role, process, path in self._running:
            said = process.communicate()[1]
            if process.returncode != 0 or "\n0 packets dropped by kernel" not in f"\n{said}":
                raise Refused(f"tcpdump at the {role} did not capture all: {' '.join(said.split())}")
            found.append(verify.parse(path.read_bytes(), role.value, role))
        return found


@contextlib.contextmanager
def _captured(here: Stage) -> Iterator[_Captures]:
    captures = _Captures(here)
    yield captures
    captures.stop()


@contextlib.contextmanager
def _same_file(here: Stage, size: int) -> Iterator[dict[str, str]]:
    """Directories of origin and destination with the same file: links of the lab's to one that has no name itself."""
    with tempfile.TemporaryFile() as file:
        try:
            free = os.statvfs(file.fileno())
            if size > free.f_bavail * free.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _fill(file, size)
        except OSError as error:
            raise Refused(f"no place for a file of {size >> 20} MB: {error.strerror}", hint="a smaller --size") \
                from None
        directories = {}
        for host in (here.lab.origin, here.lab.destination):
            directory = here.lab.directory / f"{host.name}-files"
            directory.mkdir()
            (directory / NAME).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
            directories[host.name] = str(directory)
        yield directories


def _fill(file: IO[bytes], size: int) -> None:
    content = Stream(SEED)
    for offset in range(0, size, BLOCK):
        file.write(content.read(offset, min(BLOCK, size - offset)))
    file.flush()


def _on_one_cpu(pid: int) -> None:
    """The lab's links have a queue a CPU: packets of a stream that is sent from two overtake each other, as they would
    not on a wire."""
    os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))})


def _counters(host: Host) -> dict[str, int]:
    return verify.parse_netstat(host.run(["cat", "/proc/thread-self/net/netstat", "/proc/thread-self/net/snmp"]).stdout)


def _mac(host: Host) -> bytes:
    (link,) = json.loads(host.run(["ip", "-j", "link", "show", "dev", host.interface]).stdout)
    return bytes.fromhex(link["address"].replace(":", ""))


def _first_word(text: str) -> str:
    return (text.split() or [""])[0]
