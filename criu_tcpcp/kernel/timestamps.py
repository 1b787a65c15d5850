"""ts_recent: the peer's last timestamp, which our next segment must echo, and which no interface tells. It is in any
segment that the socket sends; here it is made to send one."""

from __future__ import annotations

import socket

from ..core import tcp
from ..core.endpoint import Flow
from ..core.errors import Refused
from ..core.tcp import TcpState
from . import repair, tcpinfo
from .rawpacket import Injector
from .tap import Sniffer

_UNANSWERED_S = 0.001  # an answer leaves within the call that delivers the question

def learn_ts_recent(sock: socket.socket, flow: Flow, sniffer: Sniffer, injector: Injector, timeout_s: float) -> int:
    """Make the socket send one segment and look at its TSecr; the packets of the peer must be held. Refused where
    nothing left in time."""
    sniffer.drain()
    if tcpinfo.read(sock).state is TcpState.ESTABLISHED:
        repair.send_window_probe(sock)
        found = sniffer.next_tsecr(timeout_s)
    else:
        _deliver_old(sock, flow, injector, b"")
        found = sniffer.next_tsecr(_UNANSWERED_S)
        if found is None:
            _deliver_old(sock, flow, injector, b"\0")
            found = sniffer.next_tsecr(timeout_s)
    if found is None:
        raise Refused("the peer's last timestamp could not be learnt: no segment left this host",
                      hint="does a firewall drop the connection's outgoing packets?")
    return found


def pay_acknowledgement(sock: socket.socket, flow: Flow, injector: Injector) -> None:
    """What the peer waits for leaves now, in a state in which a restored socket could not be made to send it."""
    for payload in (b"", b"\0"):
        if tcpinfo.read(sock).state is TcpState.ESTABLISHED or not repair.owes_ack(sock):
            return
        _deliver_old(sock, flow, injector, payload)


def _deliver_old(sock: socket.socket, flow: Flow, injector: Injector, payload: bytes) -> None:
    """Something that the socket had long ago, which it answers with an acknowledgement (RFC 9293 3.10.7.4), also once
    the end of a stream has passed, where it sends no probe (net/ipv4/tcp_output.c, tcp_send_window_probe). Without
    payload, as a keep-alive: such an answer may not be given twice within half a second (net/ipv4/tcp_input.c,
    tcp_oow_rate_limited). With a byte it always is, but it tells the peer by SACK of a byte that may never have
    been."""
    rcv_wup, snd_una = repair.window_edges(sock)
    injector.deliver_old(flow, tcp.add(rcv_wup, -1 - len(payload)), snd_una, payload)
