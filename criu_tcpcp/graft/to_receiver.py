"""Into a cooperating application: its `Receiver` gets the dormant socket by SCM_RIGHTS, and a word when it is alive.

The descriptor lies in the application's socket before the commit, so nothing in the freeze waits for the application.
It checks who it talks to: a receiver for a port below 1024 must be root's, as a listener there would have to be.
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import replace
from pathlib import Path

from .. import apps
from ..core.endpoint import Flow, Protocol
from ..core.errors import LinkError, Refused
from ..core.policy import NO_PORT, Taker
from ..journal import Journal
from ..kernel import process, sockopt
from ..kernel.syscalls import failing
from . import Ground, Reclaimed, Vessel, taker_of

_TIMEOUT_S = 2.0
_PRIVILEGED_PORTS = 1024


class ToReceiver:
    """A conversation with one receiver."""

    stops = False

    def __init__(self, path: Path, conversation: apps.Conversation, port: int) -> None:
        """`port`: the one that it is registered for, if it is."""
        self._conversation = conversation
        self._vessel: Vessel | None = None
        pid, uid = conversation.peer()
        self.path, self.port = path, port
        self.uid = uid
        self.way = f"receiver:{path}"
        self.taker = process.identity(pid) if pid else process.Identity(0, 0)
        self.description = f"receiver {path} ({process.name(pid)}, process {pid})"

    def takers(self) -> list[Taker]:
        """Also as whom it listened: its number may be another's by now."""
        taker = taker_of(self.taker.pid, self.port)
        return [replace(taker, users=(taker.users or frozenset()) | {self.uid})]

    def arrange(self, flow: Flow, ground: Ground) -> None:
        """Nothing but the socket, before anybody waits for it."""
        ground.admit(self.takers())
        if ground.prologue is not None:
            raise Refused("a receiver takes no prologue: it has the connection from a pass, and knows so",
                          hint="--app-state FILE hands it what it needs; or --into accept:PID")
        sock = socket.socket(flow.socket_family, flow.protocol.socket_type | socket.SOCK_CLOEXEC)
        self._vessel = Vessel(sock, sockopt.read_all(sock), own=False)

    def vessel(self, flow: Flow) -> Vessel:
        """The new socket; it is the caller's now."""
        vessel, self._vessel = self._vessel, None
        if vessel is None:
            raise Refused("the pass was not staged")
        return vessel

    def graft(self, pass_id: str, sock: socket.socket, flow: Flow, app_state: bytes) -> None:
        """The application holds the connection now, dormant. Refused where it has gone."""
        with failing("memfd_create"):
            descriptor = apps.wrap_state(app_state)
        try:
            self._conversation.send({"op": "offer", "id": pass_id, "flow": flow.to_json()},
                                    [sock.fileno(), descriptor])
        except apps.Gone as error:
            raise Refused(f"{self.description} has gone: {error}") from None
        finally:
            os.close(descriptor)

    def check(self) -> None:
        """Refused where the application has gone."""
        if self._has_hung_up():
            raise Refused(f"{self.description} has gone")

    def brace(self, unwritten: bool) -> None:
        """The application does not touch a connection before it is told to."""

    def activate(self, pass_id: str) -> None:
        """Hand it over for use. LinkError where the application has gone: its end of the connection goes with it."""
        try:
            self._conversation.send({"op": "active", "id": pass_id})
        except apps.Gone as error:
            raise LinkError(f"{self.description} has gone: {error}") from None
        if self._has_hung_up():
            raise LinkError(f"{self.description} has gone")

    def _has_hung_up(self) -> bool:
        poller = select.poll()
        poller.register(self._conversation, 0)
        return bool(poller.poll(0))

    def discard(self, pass_id: str) -> None:
        """It closes its dormant copy; where it has gone, the kernel has."""
        try:
            self._conversation.send({"op": "abort", "id": pass_id})
        except apps.Gone:
            return

    def reclaim(self, journal: Journal) -> Reclaimed:
        """What the application has of this pass."""
        try:
            answer, descriptors = self._conversation.ask({"op": "claim", "id": journal.pass_id})
        except apps.Gone:
            return Reclaimed()
        if answer.get("op") != "held" or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            return Reclaimed(delivered=answer.get("op") == "delivered")
        try:
            return Reclaimed(apps.connection_socket(descriptors[0]))
        except apps.Gone as error:
            raise Refused(f"{self.description} does not give the connection back: {error}") from None

    def close(self) -> None:
        self._conversation.close()
        if self._vessel is not None:
            self._vessel.sock.close()


def at_path(path: str, protocol: Protocol) -> ToReceiver:
    """The receiver that listens at a path. Refused where there is none for connections of this protocol."""
    try:
        return _open(Path(path), NO_PORT, protocol)
    except apps.Gone as error:
        raise Refused(f"no receiver listens at {path} at the destination: {error}") from None


def for_port(port: int, protocol: Protocol) -> ToReceiver:
    """The receiver that is registered for a local port. Refused where there is none, or more than one."""
    found = try_port(port, protocol)
    if found is None:
        raise Refused(f"no receiver is registered at the destination for {name_of(port, protocol)}",
                      hint=f"an application there makes one with {call_for(port, protocol)}")
    return found


def name_of(port: int, protocol: Protocol) -> str:
    return f"port {port}" if protocol is Protocol.TCP else f"{protocol.label} port {port}"


def call_for(port: int, protocol: Protocol) -> str:
    """How an application makes one."""
    said = "" if protocol is Protocol.TCP else f', protocol="{protocol.label}"'
    return f"criu_tcpcp.Receiver(port={port}{said})"


def try_port(port: int, protocol: Protocol) -> ToReceiver | None:
    """As `for_port`, but None where there is none."""
    found = []
    for path in apps.receivers(port, protocol):
        try:
            found.append(_open(path, port, protocol))
        except apps.Gone:
            continue
    allowed = [one for one in found if port >= _PRIVILEGED_PORTS or one.uid == 0]
    for one in found:
        if one not in allowed or len(allowed) > 1:
            one.close()
    if len(allowed) > 1:
        raise Refused(f"several receivers are registered at the destination for {name_of(port, protocol)}",
                      hint="name one: " + " or ".join(f"--into receiver:{one.path}" for one in allowed[:4]))
    return allowed[0] if allowed else None


def _open(path: Path, port: int, protocol: Protocol) -> ToReceiver:
    """Raises Gone where nobody answers: an application that hangs is found before anything is stopped."""
    conversation = apps.connect(path, _TIMEOUT_S)
    try:
        takes = conversation.ask({"op": "ping"})[0].get("protocol", Protocol.TCP.label)
        if takes != protocol.label:
            raise apps.Gone(f"the one there takes other connections than {protocol.label}")
        return ToReceiver(path, conversation, port)
    except apps.Gone:
        conversation.close()
        raise
    except Refused as error:  # it has ended since
        conversation.close()
        raise apps.Gone(error.message) from None
