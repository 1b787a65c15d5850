"""ts_recent: the peer's last timestamp, which our next segment must echo, and which no interface tells."""

from __future__ import annotations

import socket

from ..core import tcp
from ..core.endpoint import Flow
from ..core.errors import Refused
from ..core.tcp import TcpState
from . import repair, tcpinfo
from .rawpacket import Injector, Sniffer


def learn_ts_recent(sock: socket.socket, flow: Flow, sniffer: Sniffer, injector: Injector, timeout_s: float) -> int:
    """Make the socket send one segment and look at its TSecr; the packets of the peer must be held. ESTABLISHED: a
    window probe, which also pays an acknowledgement that is owed. Half-closed: the answer to a byte that it had long
    ago (no probe is sent in that state, net/ipv4/tcp_output.c tcp_send_window_probe). Refused where nothing left in
    time."""
    sniffer.drain()
    if tcpinfo.read(sock).state is TcpState.ESTABLISHED:
        repair.send_window_probe(sock)
    else:
        rcv_wup, snd_una = repair.window_edges(sock)
        injector.deliver_old_byte(flow, tcp.add(rcv_wup, -2), snd_una)
    found = sniffer.next_tsecr(timeout_s)
    if found is None:
        raise Refused("the peer's last timestamp could not be learnt: no segment left this host",
                      hint="does a firewall drop the connection's outgoing packets?")
    return found
