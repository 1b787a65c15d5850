"""As restoreplan.py, for a connected UDP socket: from a state to the ordered steps that re-create it.

UDP has no repair mode: a socket hears and speaks as soon as it is bound. What stands for it is a filter that lets
nothing in (a *deaf* socket), and outside of it the fence. Deaf is how a dormant one is told from one that lives.

dormant, nothing of the connection reaches the host's sockets but what is made here:
  1. Deaf before bind. Between bind and connect the socket is the best one for anybody's datagrams to this address and
     port (net/ipv4/udp.c, compute_score): those of another program's clients must not get into its queue.
  2. SO_REUSEADDR before bind, as a server that has connected sockets beside its own needs it, too. UDP looks at it in
     both: a program there that has bound the port without it is in the way.
  3. Transparent where the address is not the host's.
  4. Connect: no packet.
  5. No longer deaf, for the datagrams that were waiting: each is made anew, from the peer, and comes in by loopback.
  6. The options, since some change what is received, and the device, by which nothing made here comes; deaf again.
open, when the commit is written, and before the fence goes:
  7. No longer deaf: what comes queues up behind.
active:
  8. What acts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .datagram import Datagram, DatagramState
from .endpoint import Protocol
from .options import OptionValue, When, applying
from .restoreplan import AllowAnyReuse, BeTransparent, Bind, Connect, ForceBuffers, SetOption

_BUFFER_SLACK = 1 << 20
_SEND_BYTES = 1 << 20  # until it gets its own size back; nothing is sent before
_DEVICE = "SO_BINDTODEVICE"
_FILTERS = ("SO_ATTACH_FILTER", "SO_LOCK_FILTER")  # in their place is another one until then
#: By IP_TOS, and by ForceBuffers: to be written though a new socket has the value.
_CHANGED_BY_OTHERS = frozenset({"SO_PRIORITY", "SO_RCVBUF", "SO_SNDBUF", "SO_BUF_LOCK", "SO_REUSEADDR"})


@dataclass(frozen=True)
class Deafen:
    pass


@dataclass(frozen=True)
class Hear:
    pass


@dataclass(frozen=True)
class Deliver:
    """A datagram of the peer's that waited at the origin."""

    datagram: Datagram = field(repr=False)


Step = Deafen | Hear | Deliver | AllowAnyReuse | BeTransparent | Bind | Connect | ForceBuffers | SetOption


def _device(state: DatagramState, fresh: Mapping[str, OptionValue]) -> list[Step]:
    """Behind the datagrams that waited, since those come by loopback."""
    device = state.options.get(_DEVICE, "")
    return [SetOption(_DEVICE, device)] if device != fresh.get(_DEVICE, "") else []


def _options(state: DatagramState, when: When, fresh: Mapping[str, OptionValue]) -> list[Step]:
    return [SetOption(option.name, state.options[option.name])
            for option in applying(state.flow.socket_family, when, Protocol.UDP)
            if option.name in state.options and option.name not in {_DEVICE, *_FILTERS}
            and (fresh.get(option.name) != state.options[option.name] or option.name in _CHANGED_BY_OTHERS)]


def dormant_steps(state: DatagramState, fresh: Mapping[str, OptionValue] | None = None) -> list[Step]:
    """Everything up to a socket that is complete and deaf. `fresh`: as of restoreplan.dormant_steps."""
    fresh = fresh or {}
    return [Deafen(), AllowAnyReuse(), ForceBuffers(sum(one.cost for one in state.datagrams) + _BUFFER_SLACK,
                                                    _SEND_BYTES),
            BeTransparent(), *_options(state, When.BEFORE_BIND, fresh), Bind(state.flow.local),
            Connect(state.flow.peer), Hear(), *map(Deliver, state.datagrams),
            *_options(state, When.CONNECTED, fresh), *_device(state, fresh), Deafen()]


def opening_steps(state: DatagramState) -> list[Step]:
    """From dormant to one that hears, through the filter of its program if there is one."""
    return [Hear(), *(SetOption(name, state.options[name]) for name in _FILTERS if state.options.get(name))]


def activation_steps(state: DatagramState) -> list[Step]:
    """From one that hears to one that its program can have. May be done again."""
    return _options(state, When.RUNNING, {})
