"""The origin's end of a link over which packets travel: a process that goes on with the link when whoever made the
pass, or settled it, has ended.

It is forked twice, so that nobody has to wait for it, and holds nothing of theirs but the link and the device. It ends
with the connection, when that comes home or is released, by SIGTERM, and when the link breaks.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import NoReturn

from . import carrying
from .core.endpoint import Flow
from .core.errors import ProtocolError, Refused, TcpcpError
from .core.messages import Carry, Carrying, Ended
from .core.messages import Refused as RefusedMessage
from .journal import Journal
from .kernel import syscalls
from .kernel.rules import HostRules
from .origin import Counterpart
from .redirect import carry
from .transport.link import Link
from .transport.wire import Wire

_ANSWER_TIMEOUT_S = 15.0
_GRACE_S = 0.3


def begin(journal: Journal, flow: Flow, there: Counterpart, end: carry.End | None = None) -> None:
    """Have the packets of a pass carried from now on, over this link, which then is not the caller's any more; in the
    calling thread's network namespace. `end`: this one, if this process has it. TcpcpError says why not; that the
    connection has ended is none."""
    claimed = carrying.claim(journal)
    try:
        if not there.is_connected:
            there.connect()
        there.wire.send(Carry(journal.pass_id))
        answer = there.wire.receive(_ANSWER_TIMEOUT_S)
        match answer:
            case Carrying():
                end = end or carry.End(carry.open_again(journal, flow), flow)
                _fork(journal, flow, there.wire, there.link, end, claimed)
                there.link.hand_over()
            case Ended():
                carrying.over(journal)
            case RefusedMessage():
                raise Refused(answer.reason, hint=answer.hint)
            case _:
                raise ProtocolError("the destination answered out of turn")
    finally:
        os.close(claimed)


def _fork(journal: Journal, flow: Flow, wire: Wire, link: Link, end: carry.End, claimed: int) -> None:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if not os.fork():
            _carry(journal, flow, wire, link, end, claimed)
    finally:
        os._exit(0)


def _carry(journal: Journal, flow: Flow, wire: Wire, link: Link, end: carry.End, claimed: int) -> NoReturn:
    """Everything that the process does; nothing of it returns into the caller's frames."""
    try:
        _let_go({*link.descriptors(), *end.descriptors(), claimed})
        carrying.sign(claimed)
        with carrying.carrying(journal, claimed):
            for pid in (None, link.pid):
                syscalls.go_ahead(pid)
            absence = _Absence(HostRules(flow.ip_version, flow.protocol), flow)
            carrying.Carrier(wire, end.channel, flow, end.sender.send, absence.is_over).run()
    except TcpcpError:
        pass  # the journal says that it should be carried
    finally:
        os._exit(0)


def _let_go(keep: set[int]) -> None:
    """Of everything that a fork inherits: descriptors, signal handlers, garbage."""
    gc.freeze()  # the caller's objects are never finalised here: their descriptors' numbers are soon others'
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    syscalls.keep_only(keep)
    syscalls.name_process("tcpcp-carrier")
    syscalls.forbid_core_dumps()


class _Absence:
    """The connection lives elsewhere, as long as this host is fenced off from it. What is still under way when it comes
    home has some time to get there."""

    def __init__(self, rules: HostRules, flow: Flow) -> None:
        self._rules, self._flow = rules, flow
        self._let_out = False
        self._over_since: float | None = None

    def is_over(self, _quiet_s: float) -> bool:
        if not self._let_out:  # for those packets; it takes too long for the beginning
            self._rules.guard_tunnels()
            self._rules.let_out(self._flow)
            self._let_out = True
        if self._rules.is_fenced(self._flow):
            self._over_since = None
            return False
        now = time.monotonic()
        self._over_since = self._over_since or now
        return now - self._over_since > _GRACE_S

