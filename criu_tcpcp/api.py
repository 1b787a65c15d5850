"""tcpcp's three calls, as a library: `get` the state of a connection, `create` it dormant, `activate` it; and `end`,
which takes the old endpoint away without a word.

They are the bare mechanism, for programs that hold packets and stop traffic by means of their own; `pass_connection`
is the whole. All need CAP_NET_ADMIN. From `get` until `create`'s socket is activated, no packet of the peer may reach
either socket: what is acknowledged in between is lost.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass

from .core import tcp
from .core.restoreplan import activation_steps, clock_steps, dormant_steps
from .core.state import ConnectionState
from .kernel import repair, routing, sockopt, tcpinfo
from .kernel.rawpacket import Injector
from .kernel.rules import MARK, Silence
from .kernel.tap import Sniffer
from .kernel.timestamps import learn_ts_recent, pay_acknowledgement

_PROBE_TIMEOUT_S = 0.2


@dataclass
class Dormant:
    """A re-created connection, in repair: it sends nothing (repair alone would not stop its timers), and closing it
    sends nothing."""

    sock: socket.socket
    state: ConnectionState
    created_at_s: float
    silence: Silence

    def close(self) -> None:
        """Give it up, without a packet."""
        self.sock.close()
        self.silence.close()


def get(sock: socket.socket) -> ConnectionState:
    """The connection state of a socket of this process, which stays as it is. Refused, KernelError."""
    flow = tcpinfo.flow_of(sock)
    options = sockopt.read_all(sock)
    info = tcpinfo.read(sock)
    ts_recent: int | None = None
    last_tsval: int | None = None
    with contextlib.closing(Injector(flow.ip_version, MARK)) as injector:
        if info.options & tcp.OPT_TIMESTAMPS:
            with contextlib.closing(Sniffer(flow)) as sniffer:
                ts_recent = learn_ts_recent(sock, flow, sniffer, injector, _PROBE_TIMEOUT_S)
                stamps = sniffer.newest()
                last_tsval = stamps[0] if stamps is not None else None
        else:
            pay_acknowledgement(sock, flow, injector)
    return repair.read_state(sock, options, not sock.getblocking(), ts_recent, last_tsval)


def end(sock: socket.socket) -> None:
    """The connection lives elsewhere, or is about to: end this endpoint without a packet, whatever is in its queues.
    What the program does with the socket afterwards fails."""
    repair.end_silently(sock)


def create(state: ConnectionState) -> Dormant:
    """The connection, dormant, in this process. KernelError where the kernel refuses (EADDRNOTAVAIL: it exists)."""
    sock = socket.socket(state.flow.socket_family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    injector = Injector(state.flow.ip_version, MARK)
    silence = Silence(state.flow.ip_version)
    dormant = Dormant(sock, state, time.monotonic(), silence)
    try:
        silence.add(state.flow)
        _restorer(sock, state, injector).run(dormant_steps(state))
    except BaseException:
        dormant.close()
        raise
    finally:
        injector.close()
    return dormant


def activate(dormant: Dormant) -> socket.socket:
    """The connection is alive: its unsent bytes go out, and what the peer sends is taken."""
    elapsed_ms = int((time.monotonic() - dormant.created_at_s) * 1000)
    injector = Injector(dormant.state.flow.ip_version, MARK)
    try:
        restorer = _restorer(dormant.sock, dormant.state, injector)
        restorer.run(clock_steps(dormant.state, elapsed_ms))
        dormant.silence.close()
        restorer.run(activation_steps(dormant.state))
    finally:
        injector.close()
    return dormant.sock


def _restorer(sock: socket.socket, state: ConnectionState, injector: Injector) -> repair.Restorer:
    return repair.Restorer(sock, transparent=not routing.is_local(state.flow.local.address),
                           inject=lambda segment: injector.deliver(state.flow, segment))
