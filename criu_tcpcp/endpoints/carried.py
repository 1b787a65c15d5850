"""What the restorations of all protocols have alike: a state, and what a restorer needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from ..core.datagram import DatagramState
from ..core.endpoint import Flow
from ..core.options import OptionValue
from ..core.state import ConnectionState
from ..kernel.rawpacket import Injector

State = TypeVar("State", bound=ConnectionState | DatagramState)


class Carried(Generic[State]):
    """Half of an `endpoints.Restoration`."""

    def __init__(self, state: State, injector: Callable[[], Injector], transparent: bool) -> None:
        self.state: State = state
        self.notes: list[str] = []
        self._injector, self._transparent = injector, transparent

    def rename(self, flow: Flow) -> None:
        """The same connection, as it is known here."""
        self.state = replace(self.state, flow=flow)

    @property
    def flow(self) -> Flow:
        return self.state.flow

    @property
    def options(self) -> Mapping[str, OptionValue]:
        return self.state.options
