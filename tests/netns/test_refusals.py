"""Each refusal on a real socket: what `list` says, and what a pass says of the same, by its name, with nothing touched.

The connections of this file lie between two sockets in one network namespace, over addresses that are not
loopback's. Where a peer is, is looked at last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_tcpcp import inventory, obstacles
from criu_tcpcp.core.errors import KernelError, Refused
from criu_tcpcp.core.refusals import Refusal
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.destination import refuse_unfit
from criu_tcpcp.inventory import Connection
from criu_tcpcp.kernel import conntrack, iouring, netns, process, repair, tcpinfo
from criu_tcpcp.kernel.syscalls import libc
from criu_tcpcp.origin.process import OriginProcess
from criu_tcpcp.tracking import Tracked
from endpoints import hears
from waiting import until

pytestmark = pytest.mark.root

DOCUMENT = Path(__file__).parents[2] / "docs" / "refusals.md"
ADDRESSES = {"v4": "192.0.2.1", "v6": "2001:db8::1"}
FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
IPPROTO_MPTCP = 262
TCP_MD5SIG, TCP_AO_ADD_KEY, TCP_FASTOPEN, TCP_ULP, MSG_FASTOPEN = 14, 38, 23, 31, 0x20000000
SO_ATTACH_BPF, IPV6_DSTOPTS = 50, 59


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with netns.private():
        lines = ["link set lo up", *(f"address add {one} dev lo nodad" for one in ADDRESSES.values())]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)
        until(lambda: hears(ADDRESSES["v6"]), "the address to be there")
        yield


def pair(family: str = "v4", protocol: int = 0,
         prepare: Callable[[socket.socket], None] = lambda _sock: None) -> tuple[socket.socket, socket.socket]:
    """(accepted, connecting); `prepare`: done to the listener and to the connecting one before."""
    kind = socket.AF_INET if family == "v4" else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_STREAM, protocol) as listener:
        prepare(listener)
        listener.bind((ADDRESSES[family], 0))
        listener.listen()
        with contextlib.ExitStack() as undo:
            peer = undo.enter_context(socket.socket(kind, socket.SOCK_STREAM, protocol))
            prepare(peer)
            peer.settimeout(10)
            peer.connect(listener.getsockname()[:2])
            accepted = listener.accept()[0]
            undo.pop_all()
        return accepted, peer


def listed(sock: socket.socket) -> Connection:
    """What `list` says of a socket of this process."""
    (found,) = [one for one in inventory.connections(os.getpid()) if sock.fileno() in one.descriptors]
    return found


def refused_as(sock: socket.socket, refusal: Refusal, words: str) -> None:
    """`list` and `pass` name it alike; the socket is as it was."""
    obstacle = listed(sock).obstacle
    assert obstacle is not None
    assert (obstacle.refusal, words in obstacle.what) == (refusal, True), obstacle
    with pytest.raises(Refused, match=re.escape(obstacle.what)) as caught:
        inventory.find(os.getpid(), sock.fileno())
    assert (caught.value.refusal, caught.value.hint) == (refusal, obstacle.hint)


def passable_but_for_its_peer(sock: socket.socket) -> None:
    """The near miss: the only obstacle is that these connections end in their own host."""
    assert inventory.find(os.getpid(), sock.fileno()).obstacle is None
    assert listed(sock).obstacle == obstacles.local_peer(tcpinfo.flow_of(sock))


@pytest.mark.parametrize("family", ADDRESSES)
def test_a_connection_without_any_of_it(family: str) -> None:
    sock, peer = pair(family)
    with sock, peer:
        passable_but_for_its_peer(sock)


def test_urgent_data_until_it_is_read() -> None:
    sock, peer = pair()
    with sock, peer:
        peer.send(b"!", socket.MSG_OOB)
        until(lambda: tcpinfo.has_urgent_data(sock), "it arrives")
        refused_as(sock, Refusal.URGENT_DATA, "urgent data")
        assert sock.recv(1, socket.MSG_OOB) == b"!"
        passable_but_for_its_peer(sock)


def with_md5(sock: socket.socket) -> None:
    """struct tcp_md5sig (linux/tcp.h)."""
    name = struct.pack("=HH4s120x", socket.AF_INET, 0, socket.inet_aton(ADDRESSES["v4"]))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, name + struct.pack("=BBHi80s", 0, 0, 6, 0, b"secret"))


def test_md5(capability: Callable[[str, bool], None]) -> None:
    with socket.socket() as probe:
        capability("TCP-MD5", can(lambda: with_md5(probe)))
    sock, peer = pair(prepare=with_md5)
    with sock, peer:
        refused_as(sock, Refusal.TCP_MD5, "TCP-MD5")


def with_ao(sock: socket.socket) -> None:
    """struct tcp_ao_add (linux/tcp.h, Linux 6.7)."""
    name = struct.pack("=HH4s120x", socket.AF_INET, 0, socket.inet_aton(ADDRESSES["v4"]))
    key = struct.pack("=64siIHBBBBBB80s", b"hmac(sha1)", 0, 0, 0, 32, 100, 100, 12, 0, 6, b"secret")
    sock.setsockopt(socket.IPPROTO_TCP, TCP_AO_ADD_KEY, name + key)


def test_ao(capability: Callable[[str, bool], None]) -> None:
    with socket.socket() as probe:
        capability("TCP-AO", can(lambda: with_ao(probe)))
    sock, peer = pair(prepare=with_ao)
    with sock, peer:
        refused_as(sock, Refusal.TCP_AO, "TCP-AO")


def test_kernel_tls(capability: Callable[[str, bool], None]) -> None:
    sock, peer = pair()
    with sock, peer:
        capability("kernel TLS", can(lambda: sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")))
        refused_as(sock, Refusal.UPPER_PROTOCOL, "'tls'")


@pytest.mark.parametrize("version", ADDRESSES)
def test_a_peer_whose_address_is_of_a_link(version: str) -> None:
    lines = ["link add here type veth peer name there", "link set here up", "link set there up",
             "address add 169.254.3.3/16 dev here", "address add fe80::3/64 dev here nodad"]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)
    kind, address = {"v4": (socket.AF_INET, ("169.254.3.3", 0)),
                     "v6": (socket.AF_INET6, ("fe80::3", 0, 0, socket.if_nametoindex("here")))}[version]
    with socket.create_server(address, family=kind) as listener, socket.socket(kind) as peer:
        peer.settimeout(10)
        peer.connect(listener.getsockname())
        sock, _ = listener.accept()
        with sock:
            refused_as(sock, Refusal.LINK_LOCAL, "on its own link only")


def test_a_connection_that_has_ended_with_data_left_to_read() -> None:
    """Both ends are acknowledged: no peer waits for anything, and the kernel has no name for it any more, neither by
    getpeername nor in its list. The program reads the rest where it is."""
    sock, peer = pair()
    with sock, peer:
        peer.sendall(b"last words")
        peer.close()
        until(lambda: tcpinfo.read(sock).state is TcpState.CLOSE_WAIT, "the peer's end")
        sock.shutdown(socket.SHUT_WR)
        until(lambda: tcpinfo.read(sock).state is TcpState.CLOSE, "both ends")
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        assert not [one for one in inventory.connections(os.getpid()) if sock.fileno() in one.descriptors]
        with pytest.raises(Refused, match="is in state") as caught:
            inventory.find(os.getpid(), sock.fileno())
        assert caught.value.refusal == Refusal.STATE
        assert sock.recv(100) == b"last words"
        assert sock.recv(1) == b""


#: A classic filter program: pidfd_getfd (438 on every architecture) fails with EPERM, all else is allowed.
NO_GETFD = [(0x20, 0, 0, 0), (0x15, 0, 1, 438), (0x06, 0, 0, 0x50000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
WITHOUT_GETFD = f"""if True:
    import ctypes, struct, sys
    from criu_tcpcp import inventory
    from criu_tcpcp.core.errors import Refused
    libc = ctypes.CDLL(None)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in {NO_GETFD}))
    program = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", {len(NO_GETFD)}, ctypes.addressof(code)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
    pid, descriptor = map(int, sys.argv[1:])
    for one in inventory.connections(pid):
        if descriptor in one.descriptors:
            print(one.obstacle.refusal)
    try:
        inventory.find(pid, descriptor)
    except Refused as error:
        print(error.refusal)
"""


def test_a_descriptor_that_the_system_does_not_let_us_take() -> None:
    """As the seccomp filter of a container engine: /proc shows the socket, and pidfd_getfd is forbidden."""
    sock, peer = pair()
    with sock, peer:
        done = subprocess.run([sys.executable, "-c", WITHOUT_GETFD, str(os.getpid()), str(sock.fileno())],
                              capture_output=True, text=True, check=True)
        assert done.stdout.split() == [Refusal.NOT_ALLOWED] * 2
        passable_but_for_its_peer(sock)


def test_mptcp(capability: Callable[[str, bool], None]) -> None:
    """Also where the kernel knows it by its TCP sockets, which have the inode of the whole."""
    def make() -> None:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    capability("MPTCP", can(make))
    sock, peer = pair(protocol=IPPROTO_MPTCP)
    with sock, peer:
        refused_as(sock, Refusal.MPTCP, "MPTCP")


def test_fast_open_that_the_peer_has_not_confirmed() -> None:
    """Data came with the SYN, and a server may accept it: the last segment of the handshake is still under way."""
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(1 | 2 | 4 | 0x200))  # without a cookie
    with socket.socket() as listener, socket.socket() as peer:
        listener.bind((ADDRESSES["v4"], 0))
        listener.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 5)
        listener.listen()
        port = listener.getsockname()[1]
        table = f"table inet late {{ chain input {{ type filter hook input priority 0; tcp sport {port} drop; }}; }}"
        subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            peer.sendto(b"early", MSG_FASTOPEN, (ADDRESSES["v4"], port))
        listener.settimeout(10)
        sock, _ = listener.accept()
        with sock:
            assert tcpinfo.read(sock).state is TcpState.SYN_RECV
            refused_as(sock, Refusal.FAST_OPEN, "Fast Open")
            subprocess.run(["nft", "delete", "table", "inet", "late"], check=True)
            until(lambda: tcpinfo.read(sock).state is TcpState.ESTABLISHED, "the handshake to end")
            passable_but_for_its_peer(sock)


@pytest.mark.parametrize("family", ADDRESSES)
def test_ecn_unless_it_is_wanted_all_the_same(family: str) -> None:
    Path("/proc/sys/net/ipv4/tcp_ecn").write_text("1")
    sock, peer = pair(family)
    with sock, peer:
        refused_as(sock, Refusal.ECN, "ECN")
        assert inventory.find(os.getpid(), sock.fileno(), {Refusal.ECN}).obstacle is None


@pytest.mark.parametrize("number", [37, 65], ids=["SO_TIMESTAMPING_OLD", "SO_TIMESTAMPING_NEW"])
def test_timestamps_of_what_is_sent(number: int) -> None:
    sock, peer = pair()
    with sock, peer:
        received = 1 << 3 | 1 << 4  # RX_SOFTWARE, SOFTWARE
        sock.setsockopt(socket.SOL_SOCKET, number, received)
        passable_but_for_its_peer(sock)
        sock.setsockopt(socket.SOL_SOCKET, number, received | 1 << 1)  # TX_SOFTWARE
        refused_as(sock, Refusal.SEND_TIMESTAMPS, "SO_TIMESTAMPING")


def test_a_filter_that_is_no_classic_one() -> None:
    """r0 = 0xffff; exit (linux/bpf.h: BPF_PROG_LOAD is 5, a socket filter 1; struct bpf_attr)."""
    program = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0xFFFF, 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQ", 1, 2, ctypes.addressof(program), ctypes.addressof(licence)).ljust(128, b"\0")
    loaded = libc.syscall({"x86_64": 321, "aarch64": 280}[os.uname().machine], 5, attributes, len(attributes))
    assert loaded >= 0, os.strerror(ctypes.get_errno())
    sock, peer = pair()
    with sock, peer:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, loaded)
        os.close(loaded)
        refused_as(sock, Refusal.BPF_FILTER, "SO_ATTACH_BPF")


def test_extension_headers() -> None:
    sock, peer = pair("v6")
    with sock, peer:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
        refused_as(sock, Refusal.EXTENSION_HEADERS, "extension headers")


class Uring:
    """An io_uring of this process, as far as is needed (io_uring_setup(2), io_uring_enter(2), io_uring_register(2))."""

    ACCEPT, RECV = 13, 27
    SQPOLL, ASYNC = 1 << 1, 1 << 4

    def __init__(self, flags: int = 0) -> None:
        parameters = ctypes.create_string_buffer(struct.pack("=8xI", flags).ljust(120, b"\0"), 120)
        self.descriptor = libc.syscall(425, 8, parameters)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        _head, self._tail, _mask, _entries, _flags, _dropped, self._array = struct.unpack_from("=7I", parameters, 40)
        self._ring = mmap.mmap(self.descriptor, self._array + 32)
        self._requests = mmap.mmap(self.descriptor, 8 * 64, offset=0x10000000)
        self._buffer = ctypes.create_string_buffer(100)

    def submit(self, operation: int, sock: socket.socket, flags: int = 0) -> None:
        (tail,) = struct.unpack_from("=I", self._ring, self._tail)
        receives = operation == self.RECV
        address, length = (ctypes.addressof(self._buffer), 100) if receives else (0, 0)
        request = struct.pack("=BBHiQQI", operation, flags, 0, sock.fileno(), 0, address, length)
        self._requests[tail % 8 * 64:tail % 8 * 64 + 64] = request.ljust(64, b"\0")
        struct.pack_into("=I", self._ring, self._array + 4 * (tail % 8), tail % 8)
        struct.pack_into("=I", self._ring, self._tail, tail + 1)
        assert libc.syscall(426, self.descriptor, 1, 0, 0, None, 0) == 1

    def register(self, *socks: socket.socket) -> None:
        numbers = struct.pack(f"={len(socks)}i", *(one.fileno() for one in socks))
        assert libc.syscall(427, self.descriptor, 2, numbers, len(socks)) == 0

    def close(self) -> None:
        self._ring.close()
        self._requests.close()
        os.close(self.descriptor)


@contextlib.contextmanager
def uring(capability: Callable[[str, bool], None], flags: int = 0) -> Iterator[Uring]:
    capability("io_uring", can(lambda: Uring().close()))
    made = Uring(flags)
    try:
        yield made
    finally:
        made.close()


def test_a_socket_that_is_registered_with_an_io_uring(capability: Callable[[str, bool], None]) -> None:
    sock, peer = pair()
    with sock, peer, uring(capability) as ring:
        passable_but_for_its_peer(sock)
        ring.register(peer)
        passable_but_for_its_peer(sock)
        refused_as(peer, Refusal.IO_URING, "registered with an io_uring")


@pytest.mark.parametrize("flags", [0, Uring.ASYNC], ids=["armed", "by a worker"])
def test_a_request_that_waits_in_an_io_uring(flags: int, capability: Callable[[str, bool], None]) -> None:
    """Of which socket it is, the kernel does not tell; an accept is none of a connection."""
    sock, peer = pair()
    with sock, peer, socket.create_server((ADDRESSES["v4"], 0)) as listener, uring(capability) as ring:
        ring.submit(Uring.ACCEPT, listener)
        until(lambda: any(one.accepts for one in iouring.of(os.getpid())), "the accept waits")
        passable_but_for_its_peer(sock)
        ring.submit(Uring.RECV, sock, flags)
        until(lambda: any(one.is_pending for one in iouring.of(os.getpid())), "it waits")
        refused_as(sock, Refusal.IO_URING, "requests pending")
        peer.send(b"x")
        until(lambda: not any(one.is_pending for one in iouring.of(os.getpid())), "it is done")
        passable_but_for_its_peer(sock)


def test_an_io_uring_that_a_thread_of_the_kernel_reads(capability: Callable[[str, bool], None]) -> None:
    sock, peer = pair()
    with sock, peer, uring(capability, Uring.SQPOLL):
        refused_as(sock, Refusal.IO_URING, "SQPOLL")


PROGRAM = f"""if True:
    import socket, sys
    listener = socket.create_server(({ADDRESSES["v4"]!r}, 0))
    print(listener.getsockname()[1], flush=True)
    sock = listener.accept()[0]
    print(sock.fileno(), flush=True)
    sys.stdin.read()
"""


def test_what_comes_after_the_staging_is_found_once_the_program_is_stopped() -> None:
    """And the program runs again, with what came."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        peer = socket.create_connection((ADDRESSES["v4"], int(program.stdout.readline())))
        found = inventory.find(program.pid, int(program.stdout.readline()))
        with peer, contextlib.closing(OriginProcess(found)) as side:
            sock = side.take()
            side.read_options()
            side.stop(None, 5, answered=False)
            side.resume()
            peer.send(b"!", socket.MSG_OOB)
            until(lambda: tcpinfo.has_urgent_data(sock), "it arrives")
            with pytest.raises(Refused, match="urgent data") as caught:
                side.stop(None, 5, answered=False)
            assert caught.value.refusal == Refusal.URGENT_DATA
            side.resume()
            assert process.run_state(program.pid) != "t"


def can(what: Callable[[], None]) -> bool:
    """Whether this kernel has it at all."""
    try:
        what()
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EPROTONOSUPPORT, errno.ENOSYS, errno.EPERM, errno.ENOENT):
            raise
        return False
    return True


# -- what the destination says -----------------------------------------------------------------------------------------

def set_conntrack(name: str, value: int) -> None:
    Path("/proc/sys/net/netfilter", name).write_text(str(value))


@pytest.mark.parametrize("liberal", [0, 1])
@pytest.mark.parametrize("at_work", [False, True], ids=["asked for by nothing", "asked for by a rule"])
def test_a_conntrack_that_takes_no_connection_from_its_middle(at_work: bool, liberal: int) -> None:
    """Whether it is liberal does not matter: that is about windows."""
    sock, peer = pair()
    with sock, peer:
        set_conntrack("nf_conntrack_tcp_be_liberal", liberal)
        if at_work:
            rule = "ct state invalid drop"
            table = f"table inet strict {{ chain input {{ type filter hook input priority 0; {rule}; }}; }}"
            subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
        assert not conntrack.is_strict()
        set_conntrack("nf_conntrack_tcp_loose", 0)
        assert conntrack.is_strict()
        assert conntrack.is_at_work() == at_work
        assert not conntrack.knows_any()  # the question has left nothing
        peer.send(b"from the middle")
        sock.settimeout(0.3 if at_work else 10)
        if at_work:
            with pytest.raises(TimeoutError):
                sock.recv(100)
        else:
            assert sock.recv(100) == b"from the middle"


def test_a_destination_names_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unfit([])
    refuse_unfit([Refusal.USEC_TIMESTAMPS])  # Linux 6.7 and later; an older one answers as here:
    monkeypatch.setattr(repair, "has_usec_timestamps", lambda: False)
    refuse_unfit([])
    with pytest.raises(Refused, match="microsecond") as caught:
        refuse_unfit([Refusal.USEC_TIMESTAMPS])
    assert caught.value.refusal == Refusal.USEC_TIMESTAMPS


def test_a_strict_conntrack_in_which_nothing_can_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a kernel without ctnetlink, or of a full table."""
    def fails(*_: object) -> bool:
        raise KernelError("conntrack: enter a connection", errno.ENOMEM, "no memory")

    table = "table inet strict { chain input { type filter hook input priority 0; ct state invalid drop; }; }"
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
    monkeypatch.setattr(conntrack.Tracking, "enter", fails)
    sock, peer = pair()
    with sock, peer:
        tracked = Tracked(tcpinfo.flow_of(sock), "the destination")
        tracked.enter()  # it will be taken from its middle
        set_conntrack("nf_conntrack_tcp_loose", 0)
        tracked = Tracked(tcpinfo.flow_of(sock), "the destination")
        with pytest.raises(Refused, match="conntrack of the destination") as caught:
            tracked.enter()
    assert caught.value.refusal == Refusal.CONNTRACK


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("kind", ["accepted", "connecting"])
def test_a_connection_that_this_host_translates(kind: str, family: str) -> None:
    """Whichever end of it is here: the peer knows the other end by another port."""
    table = "table inet nat { chain output { type nat hook output priority -100; tcp dport 9999 dnat ip%s; }; }" % (
        " to 192.0.2.1:9000" if family == "v4" else "6 to [2001:db8::1]:9000")
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
    with socket.create_server((ADDRESSES[family], 9000), family=FAMILIES[family]) as listener, \
            socket.create_connection((ADDRESSES[family], 9999), timeout=10) as client:
        sock, _ = listener.accept()
        with sock:
            flow = tcpinfo.flow_of(sock if kind == "accepted" else client)
            obstacle = obstacles.translated(flow)
            assert obstacle is not None
            assert obstacle.refusal == Refusal.NAT
            with pytest.raises(Refused, match="a NAT of the destination translates"):
                Tracked(flow, "the destination")


def test_the_document_has_every_name() -> None:
    found = re.findall(r"^\| `([a-z0-9-]+)` \|", DOCUMENT.read_text().replace("| `refusal` |", ""), re.M)
    assert found == [one.value for one in Refusal]
