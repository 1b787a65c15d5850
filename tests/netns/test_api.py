"""tcpcp's three calls as a library: at the origin host itself, once the connection's first life has ended there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import criu_tcpcp
from criu_tcpcp import verify
from criu_tcpcp.core.errors import KernelError, Refused
from criu_tcpcp.kernel.tap import Sniffer
from criu_tcpcp.lab import Lab, leftovers
from criu_tcpcp.transport.target import LocalTarget
from world import captured, capturing

pytestmark = pytest.mark.root


def connection(lab: Lab, version: int) -> tuple[socket.socket, socket.socket]:
    """(the peer's end, the origin's)."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with lab.origin.enter(), socket.create_server((str(lab.origin.address(version)), 0), family=family) as listener:
        with lab.peer.enter():
            peer = socket.create_connection(listener.getsockname()[:2], timeout=10)
        ours, _address = listener.accept()
    return peer, ours


@pytest.mark.parametrize("version", [4, 6])
def test_get_create_activate(lab: Lab, version: int) -> None:
    """Restored at the origin host itself, whose address it is, once its first life has ended there silently."""
    before = leftovers(lab.origin)
    path = lab.directory / "peer.pcap"
    capture = capturing(lab.peer, path)
    peer, ours = connection(lab, version)
    with lab.origin.enter(), peer:
        peer.sendall(b"unread")
        ours.sendall(b"before ")
        assert peer.recv(7, socket.MSG_WAITALL) == b"before "
        state = criu_tcpcp.get(ours)
        assert state.received == b"unread"
        assert str(state.flow.local.address) == str(lab.origin.address(version))
        with pytest.raises(KernelError, match=r"bind|connect"):
            criu_tcpcp.create(state)  # it is alive
        criu_tcpcp.end(ours)
        with pytest.raises(OSError):
            ours.send(b"x")
        sniffer = Sniffer(state.flow)
        dormant = criu_tcpcp.create(state)
        assert sniffer.next_tsecr(0.05) is None  # it is silent
        sniffer.close()
        alive = criu_tcpcp.activate(dormant)
        alive.sendall(b"after")
        assert peer.recv(5, socket.MSG_WAITALL) == b"after"
        assert alive.recv(6, socket.MSG_WAITALL) == b"unread"
        peer.sendall(b"and on")
        assert alive.recv(6, socket.MSG_WAITALL) == b"and on"
        alive.close()
        assert peer.recv(1) == b""
        ours.close()
    verdict = verify.verify([verify.parse(captured(capture, path), "peer", verify.Role.PEER)], state.flow,
                            verify.Expectations(loss_free=True, fin_passed=True, passes=0))
    assert verdict.violations == ()
    assert leftovers(lab.origin) == before


def test_a_dormant_connection_is_given_up_without_a_packet(lab: Lab) -> None:
    peer, ours = connection(lab, 4)
    with lab.origin.enter(), peer:
        state = criu_tcpcp.get(ours)
        criu_tcpcp.end(ours)
        dormant = criu_tcpcp.create(state)
        dormant.close()
        again = criu_tcpcp.activate(criu_tcpcp.create(state))
        again.sendall(b"still here")
        assert peer.recv(10, socket.MSG_WAITALL) == b"still here"
        again.close()
        ours.close()


def test_what_is_no_connection_is_refused(lab: Lab) -> None:
    with lab.origin.enter(), socket.socket() as fresh, pytest.raises((Refused, KernelError)):
        criu_tcpcp.get(fresh)


def test_the_call_says_who_owns_the_connection() -> None:
    target = LocalTarget(("false",))
    with pytest.raises(criu_tcpcp.PassError, match="there is no process") as raised:
        criu_tcpcp.pass_connection(pid=1 << 22, fd=3, host=target)
    assert raised.value.owner is criu_tcpcp.Owner.ORIGIN
    assert raised.value.exit_code is criu_tcpcp.ExitCode.REFUSED
    assert raised.value.report.to_json()["schema"] == 1
    assert not Path(f"/proc/{1 << 22}").exists()
