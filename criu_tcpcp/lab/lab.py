"""`Lab`: the life of a set of hosts, from nothing to nothing.

Theory of clean-up. Whatever ends the `with` block, an exception, Ctrl-C or SIGTERM, tears the lab down in the order:
processes, namespaces, directory, record. Each step finds for itself what is there, so a half-built lab goes the same
way, and a step that was interrupted can be done again. What SIGKILL leaves is found by its record and torn down, in the
same way, by the next lab that starts on the machine (`Lab.sweep`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from . import network, processes
from .host import Host
from .record import Record, records, start_time
from .sshd import Ssh
from .weather import Weather


class Lab:
    """A peer, a gateway, and servers behind it: origin, destination, and `more` if they are asked for. Those `apart`
    are on no link with the others.

    `joinable` lets other processes of this machine find the lab (`Lab.join`), for as long as it stands."""

    def __init__(self, more: Sequence[str] = (), *, apart: Sequence[str] = (), joinable: bool = False) -> None:
        self._apart = apart
        self._servers = ["origin", "destination", *more]
        self._joinable = joinable
        self._record: Record | None = None
        self.hosts: dict[str, Host] = {}

    @property
    def peer(self) -> Host:
        return self.hosts["peer"]

    @property
    def gateway(self) -> Host:
        return self.hosts["gateway"]

    @property
    def origin(self) -> Host:
        return self.hosts["origin"]

    @property
    def destination(self) -> Host:
        return self.hosts["destination"]

    def ssh_options(self, host: Host, version: int = 4) -> list[str]:
        """Options with which the criu-tcpcp command reaches `host` over IPv4 or 6; its sshd is started if need be."""
        host.start_sshd()
        address = f"[{host.ipv6}]" if version == 6 else str(host.ipv4)
        return ["-i", str(self.ssh.key), "--known-hosts", str(self.ssh.known_hosts), "--host", f"root@{address}"]

    def keep_order(self) -> None:
        """From now on the network never reorders: for who judges streams as on a path that does not."""
        network.keep_order([host.netns.name for host in self.hosts.values()])

    def put_relay(self, weather: Weather, *, offload: bool = False) -> subprocess.Popen[str]:
        """From now on, until its stdin or the lab ends, a bad network lies between the peer and the servers (relay.py).
        Its last line on stdout is what it did."""
        argv = ["chrt", "--rr", "1", sys.executable, "-m", "criu_tcpcp.lab.relay", *weather.options(),
                *(["--offload"] if offload else [])]
        process: subprocess.Popen[str] = self.gateway.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                            stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(process.stderr.read().strip() or "the relay ended at once")
        return process

    def __enter__(self) -> Self:
        self.sweep()
        record = _new_record(self._servers, joinable=self._joinable)
        self._record = record
        _watch_signals(self)
        try:
            record.directory.mkdir(mode=0o711)
            self._make_hosts(record)
            for host in self.hosts.values():
                host.run_dir.mkdir(mode=0o755)
            plan = network.places(record.servers, self._apart)
            network.build(plan, {name: record.namespace(name) for name in plan})
        except BaseException as error:
            try:
                self.tear_down()
            except Exception as second:  # noqa: BLE001  the first error is the one to see
                error.add_note(f"and the tear-down failed: {second}")
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.tear_down()

    @classmethod
    def join(cls) -> Lab:
        """The one joinable lab of this machine, made by another process, which also ends it.

        Raises LookupError if there is none, or more than one."""
        found = [record for record in records() if record.joinable and record.creator_lives()]
        if len(found) != 1:
            raise LookupError(f"{len(found)} labs are up")
        lab = cls(found[0].servers[2:])
        lab._make_hosts(found[0])
        return lab

    def _make_hosts(self, record: Record) -> None:
        self.directory = record.directory
        self.ssh = Ssh(self.directory, record.creator_pid)
        self.hosts = {name: Host(name, network.NETNS_DIRECTORY / record.namespace(name), self.directory / name, place,
                                 self.ssh)
                      for name, place in network.places(record.servers, self._apart).items()}

    def tear_down(self) -> None:
        """End the lab. Done already, or in a fork of the process that made it: nothing happens."""
        record = self._record
        if record is None or record.creator_pid != os.getpid():
            return
        _kill(record)
        # Only now: a process that another one traces can be collected when its tracer is dead.
        for host in self.hosts.values():
            host.collect_processes()
        _delete(record)
        self._record = None
        _unwatch_signals(self)

    def tear_down_to_die(self) -> None:
        """The same from a signal handler, after which this process ends: it collects no children, because the code
        that was interrupted may hold the lock of a Popen."""
        record = self._record
        if record is not None and record.creator_pid == os.getpid():
            _kill(record)
            _delete(record)

    @staticmethod
    def sweep() -> None:
        """Remove the labs whose creators are dead. Two may do that at once: no step minds that it is done already."""
        for record in records():
            if not record.creator_lives():
                _kill(record)
                _delete(record)


def _new_record(servers: list[str], *, joinable: bool) -> Record:
    start = start_time(os.getpid())
    assert start is not None
    while True:
        record = Record(secrets.token_hex(3), os.getpid(), start, servers, joinable)
        with contextlib.suppress(FileExistsError):
            record.write()
            return record


def _namespaces(record: Record) -> list[str]:
    return [record.namespace(name) for name in network.places(record.servers)]


def _kill(record: Record) -> None:
    processes.end_all([network.NETNS_DIRECTORY / name for name in _namespaces(record)], record.directory)


def _delete(record: Record) -> None:
    network.destroy(_namespaces(record))
    _unmount_below(record.directory)
    _remove_directory(record.directory)
    record.remove()


def _unmount_below(directory: Path) -> None:
    """What `Host.limit_run_directory` mounted. Another process may be doing the same."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", place], check=False, stderr=subprocess.DEVNULL)


def _remove_directory(directory: Path, *, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while directory.exists():
        try:
            shutil.rmtree(directory)
        except OSError:
            if time.monotonic() > deadline:
                raise


_live: list[Lab] = []


#: What ends a program without running a `finally`: SIGHUP comes when its terminal goes.
_DEADLY = (signal.SIGTERM, signal.SIGHUP)


def _watch_signals(lab: Lab) -> None:
    """While a lab lives, a deadly signal ends the lab first. A handler of the program's own stays."""
    _live.append(lab)
    if threading.current_thread() is threading.main_thread():
        for number in _DEADLY:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _on_deadly)


def _unwatch_signals(lab: Lab) -> None:
    _live.remove(lab)
    if not _live and threading.current_thread() is threading.main_thread():
        for number in _DEADLY:
            if signal.getsignal(number) is _on_deadly:
                signal.signal(number, signal.SIG_DFL)


def _on_deadly(number: int, frame: FrameType | None) -> None:
    for one in _DEADLY:
        signal.signal(one, signal.SIG_DFL if one == number else signal.SIG_IGN)
    try:
        for lab in list(_live):
            lab.tear_down_to_die()
    finally:
        os.kill(os.getpid(), number)
