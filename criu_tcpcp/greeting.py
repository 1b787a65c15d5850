"""The first words on a link: who speaks, which protocol, which host. Before them nothing is asked, and nothing done."""

from __future__ import annotations

import socket

from ._version import __version__
from .core.errors import LinkError, ProtocolError, Refused
from .core.messages import PROTOCOL, Hello
from .core.messages import Refused as RefusedMessage
from .kernel import netns, syscalls
from .transport.link import Link
from .transport.wire import Wire

TIMEOUT_S = 15.0


def greet(link: Link, wire: Wire, timeout_s: float = TIMEOUT_S) -> Hello:
    """Exchange Hello. LinkError says why there is no answer, Refused names both versions where they do not fit."""
    try:
        wire.send(Hello(PROTOCOL, __version__, socket.gethostname(), syscalls.boot_id(),
                        list(netns.own())))
        answer = wire.receive(timeout_s)
    except (LinkError, ProtocolError):
        if wire.silent:
            raise link.failure() from None
        raise
    if isinstance(answer, RefusedMessage):
        raise Refused(f"the destination refuses: {answer.reason}", hint=answer.hint)
    if not isinstance(answer, Hello):
        raise ProtocolError("the other end did not introduce itself as criu-tcpcp serve")
    if answer.protocol != PROTOCOL:
        raise Refused(f"this is criu-tcpcp {__version__} (protocol {PROTOCOL}), the destination has {answer.version} "
                      f"(protocol {answer.protocol})", hint="install the same version at both ends")
    return answer
