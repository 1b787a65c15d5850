"""A pass in miniature, before anything real is stopped: a connection of our own, in a network namespace of our own. A
serve that may not make one (docs/door.md) has it over the host's loopback, and leaves the host's rules alone.

The first time that code runs, it is slow: bytecode is specialised, protobuf classes are built, kernel paths and caches
are cold; together some 5 ms that the peer would wait. So both sides go through the motions once while staging (some 10
ms off the clock of the peer), and `check` calls it to see that a state can be read and restored at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct

from . import endpoints
from .core import datagramimage
from .core.endpoint import Flow, Protocol
from .core.errors import Refused
from .core.image import Image, decode, encode
from .core.messages import Decoder, Prepare
from .core.messages import encode as encode_message
from .core.restoreplan import activation_steps, dormant_steps
from .kernel import datagrams, netns, repair, sockopt, tcpinfo
from .kernel.rawpacket import Injector
from .kernel.rules import MARK, host_rules
from .kernel.syscalls import failing
from .kernel.tap import Sniffer
from .kernel.timestamps import learn_ts_recent

_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_PROBE_TIMEOUT_S = 0.5
_PATIENCE_S = 2
_WORD = b"rehearsal"


def rehearse(ip_version: int, protocol: Protocol = Protocol.TCP) -> Image:
    """Read the state of a loopback connection, end it, restore it from its image, and use it. Raises what fails.
    Returns the image, for `warm_up`."""
    return _rehearse_tcp(ip_version) if protocol is Protocol.TCP else _rehearse_udp(ip_version)


def _rehearse_udp(ip_version: int) -> Image:
    with netns.private_or_own() as is_private, contextlib.ExitStack() as stack:
        if is_private:
            _loopback_up()
        injector = stack.enter_context(contextlib.closing(Injector(ip_version, MARK)))
        peer, sock = (stack.enter_context(one) for one in _datagram_pair(ip_version))
        flow = tcpinfo.flow_of(sock)
        if is_private:
            _rules(flow)
        restored = stack.enter_context(socket.socket(flow.socket_family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        with failing("a datagram over loopback"):
            peer.send(_WORD)
        image = datagramimage.encode(datagrams.read_state(sock, sockopt.read_all(sock), False))
        datagrams.end(sock, flow, injector)
        _bring_to_life(restored, flow, image, injector)
        with failing("a datagram over loopback"):
            restored.send(_WORD)
            restored.settimeout(_PATIENCE_S)  # ksoftirqd may deliver it, a little later
            if (peer.recv(64), restored.recv(64)) != (_WORD, _WORD):
                raise Refused("a restored UDP socket does not work on this kernel")
    return image


def _datagram_pair(ip_version: int) -> tuple[socket.socket, socket.socket]:
    """Two sockets that are connected to each other."""
    family = socket.AF_INET if ip_version == 4 else socket.AF_INET6
    one, other = (socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) for _ in range(2))
    with failing("UDP sockets over loopback"):
        for sock in (one, other):
            sock.bind((_LOOPBACK[ip_version], 0))
            sock.settimeout(_PATIENCE_S)
        one.connect(other.getsockname())
        other.connect(one.getsockname())
        other.settimeout(None)
    return one, other


def _rehearse_tcp(ip_version: int) -> Image:
    with netns.private_or_own() as is_private:
        if is_private:
            _loopback_up()
        peer, sock = _connection(ip_version)
        flow = tcpinfo.flow_of(sock)
        sniffer, injector = Sniffer(flow), Injector(ip_version, MARK)
        restored = socket.socket(flow.socket_family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if is_private:
                _rules(flow)
            image = _pass_on(sock, restored, flow, sniffer, injector)
            restored.sendall(_WORD)
            if _received(peer, len(_WORD * 2)) != _WORD * 2:
                raise Refused("a restored connection does not work on this kernel")
        finally:
            for part in (restored, sock, peer, sniffer, injector):
                part.close()
    return image


def _received(sock: socket.socket, length: int) -> bytes:
    """The two words come as one only where the kernel delivered both at once: on a busy processor ksoftirqd does it."""
    data = b""
    with failing("a connection over loopback"):
        while len(data) < length and (more := sock.recv(length - len(data))):
            data += more
    return data


def warm_up(image: Image, protocol: Protocol = Protocol.TCP) -> None:
    """Only what is computed, half a millisecond of it: between the rehearsal and the pass other processes had the
    caches of the processor."""
    if protocol is Protocol.UDP:
        datagramimage.encode(datagramimage.decode(image))
        return
    state = decode(image)
    encode(state)
    Decoder().feed(encode_message(Prepare("", "", image.inet_sk, image.tcp_stream, image.extras, b"")))
    dormant_steps(state)
    activation_steps(state)


def _pass_on(sock: socket.socket, restored: socket.socket, flow: Flow, sniffer: Sniffer, injector: Injector) -> Image:
    options = sockopt.read_all(sock)
    ts_recent: int | None = None
    if tcpinfo.read(sock).options & 1:
        ts_recent = learn_ts_recent(sock, flow, sniffer, injector, _PROBE_TIMEOUT_S)
    state = repair.read_state(sock, options, True, ts_recent)
    image = encode(state)
    Decoder().feed(encode_message(Prepare("", "", image.inet_sk, image.tcp_stream, image.extras, b"")))
    repair.end_silently(sock)
    _bring_to_life(restored, flow, image, injector)
    return image


def _bring_to_life(sock: socket.socket, flow: Flow, image: Image, injector: Injector) -> None:
    restoration = endpoints.of(flow.protocol).restoration(image, lambda: injector, False)
    restoration.restore(sock, {})
    restoration.open(sock, 0)
    restoration.activate(sock)


def _rules(flow: Flow) -> None:
    """The same transactions that the freeze will make, in tables that end with the namespace."""
    with host_rules(flow.ip_version, flow.protocol) as rules:
        rules.prepare_fence()
        rules.fence(flow)
        rules.unfence(flow)
        rules.move(flow, ipaddress.ip_address(_LOOPBACK[flow.ip_version]), 1)
        rules.stay(flow)


def _loopback_up() -> None:
    with failing("SIOCSIFFLAGS"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _connection(ip_version: int) -> tuple[socket.socket, socket.socket]:
    """(a connected socket, the accepted one), with a word in the latter's send queue."""
    family = socket.AF_INET if ip_version == 4 else socket.AF_INET6
    with (failing("a connection over loopback"),
          socket.create_server((_LOOPBACK[ip_version], 0), family=family) as listener):
        peer = socket.create_connection(listener.getsockname()[:2], timeout=_PATIENCE_S)
        sock, _address = listener.accept()
        sock.sendall(_WORD)
        return peer, sock
