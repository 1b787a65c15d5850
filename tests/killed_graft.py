"""A destination's half of a pass, killed at each of its points in turn; a program of its own, for one host of a lab.

    python tests/killed_graft.py INTO PID PORT TIMES

A point is a line of the modules of criu_tcpcp/graft that act on the program, or a call of what acts in
criu_tcpcp/kernel. TIMES of them are chosen, evenly. After each death the program PID must run, and serve a new client
at PORT; when `sweep_host` has been there, nothing of the pass is left. Says on stdout, as JSON, how many points there
were and at how many of them it was killed; ends with 1, and says why on stderr, where a check failed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import replace
from types import FrameType
from typing import Any

from criu_tcpcp import journal, settle
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.handoff import Action
from criu_tcpcp.core.image import encode
from criu_tcpcp.core.messages import Prepare, Stage
from criu_tcpcp.destination import Destination
from criu_tcpcp.kernel import process, routing, sockdiag
from criu_tcpcp.kernel.rules import host_rules
from criu_tcpcp.transport.wire import Wire
from states import plain
from waiting import until

PEER = Endpoint(ipaddress.ip_address("10.77.1.2"), 45678)
PATIENCE_S = 10.0
ATTEMPTS = 3
LINES = ("graft/in_place.py", "graft/throwaway.py", "graft/to_descriptor.py", "graft/to_new_descriptor.py",
         "graft/to_replaced.py", "graft/replacing.py",
         "kernel/injection.py")
CALLS = ("kernel/repair.py", "kernel/tracee.py", "kernel/rawpacket.py", "kernel/interception.py", "kernel/rules.py",
         "graft/to_accept.py")


#: Said to the program before it has the connection.
PROLOGUE = sys.argv[5] if len(sys.argv) > 5 else None


class Killer:
    """Counts points, and dies at one of them."""

    def __init__(self, at: int) -> None:
        self.points, self._at = 0, at

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.endswith(LINES) and not (event == "call" and path.endswith(CALLS)):
            return None
        self.points += 1
        if self.points == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self


def graft(into: str, flow: Flow, killer: Killer) -> None:
    """Up to a dormant connection in the program, and back."""
    state = plain(flow=flow)
    image = encode(state)
    reading, writing = socket.socketpair()
    wire = Wire(reading.fileno(), writing.fileno())
    stage = Stage(journal.new_id(), flow.to_json(), into, "auto", image.inet_sk, 500, PROLOGUE is not None,
                  (PROLOGUE or "").encode())
    record = journal.Journal(stage.pass_id, journal.DESTINATION)
    with record.claimed(stage.flow):
        sys.settrace(killer)
        side = Destination.staged(stage, wire)
        side.received(Prepare(stage.pass_id, side.nonce, image.inet_sk, image.tcp_stream, image.extras, b""))
        for action in (Action.RESTORE, Action.GRAFT, Action.WRITE_PREPARED, Action.CHECK_TARGET):
            side.perform(action)
        side.perform(Action.DISCARD)
        side.close()
        sys.settrace(None)


def serves(address: str, port: int) -> None:
    with socket.create_connection((address, port), timeout=PATIENCE_S) as client:
        client.sendall(b"hello")
        if client.recv(100) != b"hello":
            raise SystemExit("the program does not serve")


def one(into: str, pid: int, flow: Flow, at: int) -> int:
    """Returns the points that were passed; 0 where it was killed. A graft may be refused, and leaves nothing either,
    where the machine has no time to stop the program."""
    for _ in range(ATTEMPTS):
        points = attempt(into, pid, flow, at)
        if points is not None:
            return points
    raise SystemExit(f"the graft fails by itself, to be killed at point {at}")


def attempt(into: str, pid: int, flow: Flow, at: int) -> int | None:
    """As `one`; None where the graft was refused."""
    before = links(pid)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        killer = Killer(at)
        try:
            graft(into, flow, killer)
            os.write(writing, b"%d" % killer.points)
        except Refused as error:
            print(f"to be killed at point {at}: {error}", file=sys.stderr, flush=True)
        except BaseException:
            # Whatever else ends a graft would be lost with the process.
            traceback.print_exc()
            raise
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as told:
        points = int(told.read() or 0)
    _pid, status = os.waitpid(child, 0)
    until(lambda: process.run_state(pid) in ("S", "R"), f"the program runs again after point {at}: "
          f"{process.run_state(pid)}", PATIENCE_S)
    settle.sweep_host()
    until(lambda: sockdiag.state_of(flow) is None, f"no connection is left after point {at}", PATIENCE_S)
    with host_rules(flow.ip_version) as rules:
        if left := rules.flows():
            raise SystemExit(f"after point {at} there are left: {left}")
    if journal.all_journals():
        raise SystemExit(f"after point {at} a journal is left")
    serves(str(routing.source_towards(PEER.address)), flow.local.port)
    until(lambda: links(pid) == before, f"the program to have its own descriptors only after point {at}: {links(pid)}",
          PATIENCE_S)
    return points if points or os.WIFSIGNALED(status) else None


def links(pid: int) -> list[str]:
    return sorted(process.descriptors(pid).values())


def main() -> None:
    into, (pid, port, times) = sys.argv[1], map(int, sys.argv[2:5])
    journal.prepare_run_directory()
    local = Endpoint(routing.source_towards(PEER.address), port)
    flow = replace(plain().flow, local=local, peer=PEER)
    with contextlib.redirect_stdout(sys.stderr):
        points = one(into, pid, flow, 0)
        killed = sum(not one(into, pid, flow, at) for at in range(1, points, max(1, points // times)))
    print(json.dumps({"points": points, "killed": killed}))


if __name__ == "__main__":
    main()
