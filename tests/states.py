"""Connection states out of nothing: a plain one to vary, and Hypothesis's idea of all of them."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from criu_tcpcp.core import tcp
from criu_tcpcp.core.datagram import Datagram, DatagramState
from criu_tcpcp.core.endpoint import Endpoint, Flow, Protocol
from criu_tcpcp.core.options import Form, Option, OptionValue, applying
from criu_tcpcp.core.state import Congestion, ConnectionState, Negotiated, Window
from criu_tcpcp.core.tcp import TcpState


def _flow(local: str, peer: str, *, mapped: bool = False) -> Flow:
    return Flow(Endpoint(ipaddress.ip_address(local), 9000), Endpoint(ipaddress.ip_address(peer), 40000), mapped)


FLOWS = {"v4": _flow("192.0.2.1", "198.51.100.2"), "v6": _flow("2001:db8::1", "2001:db8:1::2"),
         "mapped": _flow("192.0.2.1", "198.51.100.2", mapped=True)}


def plain(**changes: Any) -> ConnectionState:
    """An established connection with bytes everywhere: 5 received, 7 in flight, 3 unsent."""
    fields: dict[str, Any] = {
        "flow": FLOWS["v4"], "tcp_state": TcpState.ESTABLISHED, "rcv_nxt": 1000, "received": b"hello",
        "write_seq": 5000, "outgoing": b"in-flightTAIL"[:10], "unsent": 3,
        "negotiated": Negotiated(1460, True, 7, 8, True, True), "timestamp": 123456, "ts_recent": 654321,
        "window": Window(snd_wl1=999, snd_wnd=64256, max_window=64256, rcv_wnd=65160, rcv_wup=1000),
        "congestion": Congestion(10, 2147483647, 200, 50, 204000), "options": {"TCP_NODELAY": 1, "SO_KEEPALIVE": 1}}
    return ConnectionState(**(fields | changes))


def datagram_states() -> list[DatagramState]:
    """Of each family, with datagrams of all sizes, and with none."""
    some = (Datagram(b""), Datagram(b"one", 1, 255), Datagram(b"x" * 3000, 255, 0x28), Datagram(b""))
    options: dict[str, OptionValue] = {"SO_SNDBUF": 87040, "SO_RCVBUF": 131072, "UDP_SEGMENT": 1200,
                                       "SO_RCVTIMEO": (1, 5), "SO_SNDTIMEO": (0, 0), "SO_BINDTODEVICE": "",
                                       "SO_LINGER": (0, 0), "SO_ATTACH_FILTER": ""}
    return [DatagramState(replace(flow, protocol=Protocol.UDP), queue, options, True)
            for flow in FLOWS.values() for queue in (some, ())]


def _value(option: Option) -> st.SearchStrategy[OptionValue]:
    if option.form is Form.TIMEVAL:
        return st.tuples(st.integers(0, 1 << 40), st.integers(0, 999999))
    if option.form is Form.LINGER:
        return st.just((0, 0)) | st.tuples(st.just(1), st.integers(0, 100000))
    if option.form is Form.TEXT:
        return st.sampled_from(["", "lo", "cubic", "eth0"])
    if option.form is Form.LONG:
        return st.integers(0, (1 << 64) - 1)
    if option.form is Form.PAIR:
        return st.tuples(st.integers(-(1 << 31), (1 << 31) - 1), st.integers(0, (1 << 32) - 1))
    if option.form is Form.BYTES:
        return st.binary(max_size=40).map(bytes.hex)
    if option.form is Form.FILTER:
        return st.binary(max_size=64).map(lambda some: some[:len(some) // 8 * 8].hex())
    switch = option.criu is not None and option.name in {
        "SO_REUSEADDR", "SO_REUSEPORT", "SO_KEEPALIVE", "SO_DONTROUTE", "IP_FREEBIND", "SO_OOBINLINE", "SO_BROADCAST",
        "SO_NO_CHECK", "SO_PASSCRED", "SO_PASSSEC", "IPV6_V6ONLY"}
    return st.integers(0, 1) if switch else st.integers(0, (1 << 31) - 1)


_ALWAYS = frozenset({"SO_SNDBUF", "SO_RCVBUF", "SO_RCVTIMEO", "SO_SNDTIMEO", "SO_BINDTODEVICE", "SO_LINGER",
                     "SO_ATTACH_FILTER"})

sequences = st.integers(0, tcp.MODULUS - 1) | st.integers(-5, 5).map(lambda near: near % tcp.MODULUS)


@st.composite
def endpoints_of(draw: st.DrawFn, version: int) -> Endpoint:
    address = draw(st.ip_addresses(v=version).filter(lambda one: version == 4 or one.ipv4_mapped is None))
    return Endpoint(address, draw(st.integers(1, 65535)))


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    kind = draw(st.sampled_from(["v4", "v6", "mapped"]))
    version = 6 if kind == "v6" else 4
    scope = draw(st.integers(0, 100)) if kind == "v6" else 0
    return Flow(draw(endpoints_of(version)), draw(endpoints_of(version)), kind == "mapped", scope)


@st.composite
def states(draw: st.DrawFn) -> ConnectionState:
    flow = draw(flows())
    state = draw(st.sampled_from(sorted(tcp.PASSABLE_STATES)))
    fin = int(state in tcp.FIN_RECEIVED_STATES)
    rcv_nxt, received = draw(sequences), draw(st.binary(max_size=50))
    outgoing = draw(st.binary(max_size=50)) if state is not TcpState.FIN_WAIT2 else b""
    unsent = draw(st.integers(0, len(outgoing)))
    waits = state in tcp.FIN_QUEUED_STATES and state is not TcpState.FIN_WAIT2 and (unsent > 0 or draw(st.booleans()))
    # What is not acknowledged yet is the newest of what was received, and the FIN is the newest of all.
    rcv_wup = tcp.add(rcv_nxt, -draw(st.integers(0, len(received) + fin)))
    # A peer sends nothing beyond the window.
    rcv_wnd = tcp.distance(rcv_nxt, rcv_wup) + draw(st.integers(0, 1 << 24))
    # Of the last segment that moved the window: no newer than what has arrived.
    snd_wl1 = tcp.add(rcv_nxt, -draw(st.integers(0, 1 << 20)))
    scaled, timestamps = draw(st.booleans()), draw(st.booleans())
    scale = st.integers(0, tcp.MAX_WSCALE) if scaled else st.just(0)
    negotiated = Negotiated(draw(st.integers(tcp.MIN_MSS, 65535)), scaled, draw(scale), draw(scale),
                            draw(st.booleans()), timestamps, draw(st.booleans()))
    # These are always in CRIU's images, so in a state that came from a kernel too.
    rows = {option.name: option for option in applying(flow.socket_family)}
    names = _ALWAYS | draw(st.frozensets(st.sampled_from(sorted(rows)), max_size=5))
    options = {name: draw(_value(rows[name])) for name in sorted(names)}
    number = st.integers(0, tcp.MODULUS - 1)
    return ConnectionState(
        flow=flow, tcp_state=state, rcv_nxt=rcv_nxt, received=received, write_seq=draw(sequences), outgoing=outgoing,
        unsent=unsent, fin_unsent=waits, shut_read=not fin and draw(st.booleans()), negotiated=negotiated,
        window=Window(snd_wl1, draw(st.integers(0, 1 << 30)), draw(number), rcv_wnd, rcv_wup),
        timestamp=draw(number) if timestamps else None, ts_recent=draw(number) if timestamps else None,
        congestion=Congestion(*(draw(number) for _ in range(5))), options=options, nonblocking=draw(st.booleans()))


