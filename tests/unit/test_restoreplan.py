"""The order of the restore: each rule of restoreplan.py, over all states."""

from __future__ import annotations

from dataclasses import replace
from types import UnionType
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core import tcp
from criu_tcpcp.core.options import BY_NAME, When
from criu_tcpcp.core.restoreplan import (
    AllowAnyReuse,
    BeTransparent,
    Bind,
    BindToDevice,
    Connect,
    EnterRepair,
    FillQueue,
    ForceBuffers,
    InjectSegment,
    LeaveRepair,
    LimitWindow,
    QueueFin,
    RecallPath,
    SetMaxSegment,
    SetNegotiated,
    SetOption,
    SetSequence,
    SetTimestamp,
    SetWindow,
    ShutRead,
    Step,
    WriteUnsent,
    activation_steps,
    clock_steps,
    describe,
    dormant_steps,
    later_timestamp,
)
from criu_tcpcp.core.state import NOTHING_LEARNT, ConnectionState, Negotiated, Window
from criu_tcpcp.core.tcp import TcpState
from states import plain, states

T = TypeVar("T")
elapsed = st.integers(0, (1 << 31) - 4)  # 24 days


def alive_steps(state: ConnectionState, elapsed_ms: int = 0) -> list[Step]:
    """What an activation that nothing interrupts does."""
    return [*clock_steps(state, elapsed_ms), *activation_steps(state)]


def where(steps: list[Step], kind: type[T]) -> int:
    """The place of the one step of this kind."""
    places = [number for number, step in enumerate(steps) if isinstance(step, kind)]
    assert len(places) == 1, f"{len(places)} steps {kind.__name__}"
    return places[0]


def only(steps: list[Step], kind: type[T]) -> T:
    found = steps[where(steps, kind)]
    assert isinstance(found, kind)
    return found


def every(steps: list[Step], kind: type[T] | UnionType) -> list[T]:
    return [step for step in steps if isinstance(step, kind)]


def apart(steps: list[Step]) -> dict[str, int]:
    """Places of the steps of which there are two, by their queue."""
    return {f"{type(step).__name__} {step.queue}": number for number, step in enumerate(steps)
            if isinstance(step, SetSequence | FillQueue)}


@given(states())
def test_the_order_of_the_dormant_steps(state: ConnectionState) -> None:
    steps = dormant_steps(state)
    repair, bind, connect = where(steps, EnterRepair), where(steps, Bind), where(steps, Connect)
    assert where(steps, AllowAnyReuse) < repair < bind < connect
    assert repair < where(steps, BeTransparent) < bind
    assert where(steps, SetMaxSegment) < connect < where(steps, SetNegotiated)
    places = apart(steps)
    assert places["SetSequence receive"] < connect
    assert places["SetSequence send"] < connect
    window = where(steps, SetWindow)
    for name, number in places.items():
        if name.startswith("FillQueue"):
            assert where(steps, ForceBuffers) < where(steps, SetNegotiated) < number < window
    for number, step in enumerate(steps):
        if isinstance(step, SetTimestamp):
            assert where(steps, SetNegotiated) < number
        elif isinstance(step, InjectSegment):
            assert window < number
        elif isinstance(step, SetOption) and BY_NAME[step.name].when is When.BEFORE_BIND:
            assert number < bind
        elif isinstance(step, SetOption):
            assert number > connect


@given(states())
def test_nothing_leaves_the_host_while_dormant(state: ConnectionState) -> None:
    steps = dormant_steps(state)
    assert not every(steps, LeaveRepair)
    assert not every(steps, WriteUnsent)
    assert all(BY_NAME[step.name].when < When.ALIVE for step in every(steps, SetOption))
    assert [step.value for step in every(steps, SetOption) if step.name == "SO_RCVBUF"] == [state.options["SO_RCVBUF"]]
    assert b"".join(step.data for step in every(steps, FillQueue) if step.queue == "send") == state.sent


@given(states(), elapsed)
def test_the_order_of_the_activation(state: ConnectionState, elapsed_ms: int) -> None:
    steps = alive_steps(state, elapsed_ms)
    leave = where(steps, LeaveRepair)
    for number, step in enumerate(steps):
        if isinstance(step, SetTimestamp):
            assert number < leave
        elif not isinstance(step, LeaveRepair):
            assert number > leave, f"{step} before repair is left"
        if isinstance(step, SetOption) and state.unsent:
            again = BY_NAME[step.name].again
            assert (number < where(steps, WriteUnsent)) == (When.ALIVE in (BY_NAME[step.name].when, again))
    assert b"".join(step.data for step in every(steps, WriteUnsent)) == state.unsent_bytes
    assert bool(every(steps, SetTimestamp)) == state.negotiated.timestamps


@given(states(), st.data())
def test_an_interrupted_activation_writes_only_the_rest(state: ConnectionState, data: st.DataObject) -> None:
    written = data.draw(st.integers(0, state.unsent))
    steps = activation_steps(state, written)
    assert b"".join(step.data for step in every(steps, WriteUnsent)) == state.unsent_bytes[written:]
    assert len(every(steps, QueueFin)) == state.fin_unsent
    assert not every(activation_steps(state, state.unsent + 1), QueueFin | WriteUnsent)  # the FIN is in, too
    assert not every(steps, LeaveRepair)  # it is alive: neither probe nor clock may touch it again
    assert not every(steps, SetTimestamp)


@given(states())
def test_every_option_is_written_exactly_once_at_each_of_its_points(state: ConnectionState) -> None:
    written = every(dormant_steps(state), SetOption) + every(alive_steps(state), SetOption)
    assert {step.name: step.value for step in written} == dict(state.options)
    points = sum(2 if BY_NAME[name].again else 1 for name in state.options)
    assert len(written) == points


@given(states())
def test_a_socket_is_bound_to_no_device_while_it_is_to_hear_what_is_made_here(state: ConnectionState) -> None:
    steps = dormant_steps(replace(state, options={**state.options, "SO_BINDTODEVICE": "eth0"}))
    bound, at = "eth0", dict[type, set[str]]()
    for step in steps:
        if isinstance(step, BindToDevice):
            bound = step.name
        at.setdefault(type(step), set()).add(bound)
    assert at[Connect] == {"eth0"}
    assert at.get(InjectSegment, {""}) == at.get(RecallPath, {""}) == {""}
    assert bound == "eth0"


@given(states())
def test_the_queues_end_where_the_state_says(state: ConnectionState) -> None:
    """What the kernel will hold: rcv_nxt from the sequence, the bytes, the FIN; write_seq from all bytes."""
    steps = dormant_steps(state)
    at = {step.queue: step.sequence for step in every(steps, SetSequence)}
    filled = {step.queue: len(step.data) for step in every(steps, FillQueue)}
    fin = sum(step.fin for step in every(steps, InjectSegment))
    assert tcp.add(at["receive"], filled.get("receive", 0) + fin) == state.rcv_nxt
    unsent = sum(len(step.data) for step in every(alive_steps(state), WriteUnsent))
    ours = len(every(steps + alive_steps(state), QueueFin))
    recalled = sum(step.bytes_ for step in every(steps, RecallPath))
    assert tcp.add(at["send"], recalled + filled.get("send", 0) + unsent + ours) == state.write_seq
    assert fin == (state.tcp_state in tcp.FIN_RECEIVED_STATES)
    assert ours == (state.tcp_state in tcp.FIN_QUEUED_STATES)
    buffers = only(steps, ForceBuffers)
    assert buffers.receive >= 2 * len(state.received)
    assert buffers.send >= 2 * len(state.outgoing)


@given(states())
def test_the_two_ends_of_the_streams_come_in_the_order_that_makes_the_state(state: ConnectionState) -> None:
    """The first FIN decides (RFC 9293 3.3.2): the peer's leads to LAST_ACK, ours to CLOSING. One that was not sent is
    written behind the bytes that were not sent."""
    dormant, alive = dormant_steps(state), alive_steps(state)
    queued = [number for number, step in enumerate(dormant) if step == QueueFin(sent=True)]
    assert len(queued) == (state.fin_queued and not state.fin_unsent)
    assert [step.sent for step in every(alive, QueueFin)] == [False] * state.fin_unsent
    for number in queued:
        assert number > where(dormant, SetWindow)
        assert number > max(apart(dormant).values())
        if every(dormant, InjectSegment):
            assert (number < where(dormant, InjectSegment)) == (state.tcp_state is not TcpState.LAST_ACK)
    if state.fin_unsent:
        assert where(alive, QueueFin) > max(where(alive, LeaveRepair),
                                            where(alive, WriteUnsent) if state.unsent else 0)
    assert bool(every(dormant, ShutRead)) == state.shut_read


@given(states())
def test_what_is_recalled_is_acknowledged_before_anything_is_in_a_queue(state: ConnectionState) -> None:
    """Wholly, by a segment that is next in the peer's stream and echoes what this host said a round trip ago."""
    steps = dormant_steps(state)
    at = {step.queue: step.sequence for step in every(steps, SetSequence)}
    for number, step in enumerate(steps):
        if not isinstance(step, RecallPath):
            continue
        assert where(steps, SetNegotiated) < number
        assert not every(steps[:number], FillQueue)
        assert tcp.add(at["send"], step.bytes_) == step.segment.acknowledgement == state.first_outgoing
        assert (step.segment.sequence, step.segment.fin) == (at["receive"], False)
        assert (step.segment.timestamp is None) == (step.clock is None) == (state.timestamp is None)
        if step.clock is not None and state.congestion.rtt_us:
            age = tcp.distance(step.clock, step.segment.echo) % tcp.MODULUS
            us = age if step.clock & 1 else age * 1000
            assert age == 1 or abs(us - state.congestion.rtt_us) <= 500
        assert only(steps, ForceBuffers).send >= 2 * (step.bytes_ + len(state.outgoing))
    assert len(every(steps, RecallPath)) <= 1
    assert not every(dormant_steps(replace(state, congestion=NOTHING_LEARNT)), RecallPath)


@given(states())
def test_a_small_window_of_the_peers_makes_no_small_segments(state: ConnectionState) -> None:
    """The kernel binds their size to half of the largest window that it has heard of."""
    for step in every(dormant_steps(state), RecallPath):
        assert step.segment.window == 65535


@given(states())
def test_the_kernel_takes_the_window(state: ConnectionState) -> None:
    """tcp_repair_set_window (net/ipv4/tcp.c) refuses: rcv_wup past rcv_nxt; snd_wl1 past rcv_nxt + rcv_wnd; a window
    larger than the largest."""
    window = only(dormant_steps(state), SetWindow).window
    dormant_rcv_nxt = tcp.add(state.rcv_nxt, -state.fin_received)
    assert tcp.distance(dormant_rcv_nxt, window.rcv_wup) >= 0
    assert tcp.distance(tcp.add(dormant_rcv_nxt, window.rcv_wnd), window.snd_wl1) >= 0
    # What was promised to the peer is kept: the right edge does not move.
    assert tcp.add(window.rcv_wup, window.rcv_wnd) == tcp.add(state.window.rcv_wup, state.window.rcv_wnd)


@given(states())
def test_the_made_segment_is_one_that_the_stack_accepts(state: ConnectionState) -> None:
    steps = dormant_steps(state)
    made = every(steps, InjectSegment)
    assert bool(made) == (state.negotiated.timestamps or state.fin_received == 1
                          or state.tcp_state is TcpState.FIN_WAIT2)
    for segment in made:
        assert segment.timestamp == state.ts_recent
        assert segment.acknowledgement == state.snd_una  # acknowledges nothing anew
        assert 0 <= segment.window <= 65535
        assert segment.window << state.negotiated.snd_wscale <= max(state.window.snd_wnd, 0)
        window = only(steps, SetWindow).window
        if segment.fin:
            assert tcp.add(segment.sequence, 1) == state.rcv_nxt
        else:  # no later than the last acknowledgement, or ts_recent stays as it is (RFC 7323 4.3)
            assert segment.sequence == window.rcv_wup


@given(states())
def test_options_of_the_handshake(state: ConnectionState) -> None:
    steps = dormant_steps(state)
    step, negotiated = only(steps, SetNegotiated), state.negotiated
    assert step.wscale == ((negotiated.snd_wscale, negotiated.rcv_wscale) if negotiated.wscale else None)
    assert (step.sack, step.timestamps) == (negotiated.sack, negotiated.timestamps)
    assert step.mss_clamp == negotiated.mss_clamp
    assert only(steps, SetMaxSegment).mss == min(negotiated.mss_clamp, 32767)
    # Connect chooses a scale for what is announced, unless 65535 bytes are the most.
    assert [limit.size for limit in every(steps, LimitWindow)] == ([] if negotiated.wscale else [65535])
    assert all(number < where(steps, Connect) for number, one in enumerate(steps) if isinstance(one, LimitWindow))


@given(st.integers(0, tcp.MODULUS - 1), elapsed)
def test_the_clock_is_even_and_never_behind_what_was_sent(timestamp: int, elapsed_ms: int) -> None:
    timestamp &= ~1
    later = later_timestamp(timestamp, elapsed_ms)
    assert later % 2 == 0
    assert 0 <= later < tcp.MODULUS
    # What was sent may be one more than the kernel said, and the clock went on for elapsed_ms.
    assert tcp.distance(later, timestamp | 1) >= elapsed_ms - 1
    assert tcp.distance(later, timestamp | 1) >= 0
    assert tcp.distance(later, timestamp) <= elapsed_ms + 2


@given(st.integers(0, tcp.MODULUS - 1), st.integers(0, 2_000_000))
def test_a_clock_of_microseconds_is_odd_and_never_behind_what_was_sent(timestamp: int, elapsed_ms: int) -> None:
    """Half its range is 36 minutes: who says nothing for so long has the same trouble without a pass."""
    timestamp |= 1
    later = later_timestamp(timestamp, elapsed_ms)
    assert later % 2 == 1
    assert 0 <= later < tcp.MODULUS
    # The milliseconds of both ends were cut off.
    assert tcp.distance(later, timestamp) >= (elapsed_ms + 1) * 1000
    assert tcp.distance(later, timestamp) <= (elapsed_ms + 2) * 1000


def test_the_clock_wraps() -> None:
    assert later_timestamp(0xFFFFFFFE, 0) == 0
    assert later_timestamp(0xFFFFFFFF, 0) == 1999
    assert later_timestamp(0xFFFFFFFE, 10) == 10


@given(states(), elapsed)
def test_every_timestamp_of_the_plan_has_one_unit_and_grows(state: ConnectionState, elapsed_ms: int) -> None:
    steps = dormant_steps(state) + alive_steps(state, elapsed_ms)
    values = [step.value for step in every(steps, SetTimestamp)]
    assert all(value % 2 == (state.timestamp or 0) % 2 for value in values)
    assert len(values) == (2 if state.negotiated.timestamps else 0)
    if values and (not values[0] % 2 or elapsed_ms < 2_000_000):
        assert tcp.distance(values[1], values[0]) >= 0


def test_a_probe_only_where_the_peer_waits_for_an_acknowledgement() -> None:
    owing = Window(999, 100, 100, 65165, 995)
    assert not only(alive_steps(plain()), LeaveRepair).probe
    assert only(alive_steps(plain(window=owing)), LeaveRepair).probe
    closing = plain(window=owing, tcp_state=TcpState.CLOSE_WAIT)
    assert not only(alive_steps(closing), LeaveRepair).probe


def test_payload_is_not_in_the_plan_as_text() -> None:
    state = plain(received=b"SECRETin", outgoing=b"SECRETout", unsent=3)
    steps = dormant_steps(state) + alive_steps(state)
    assert len(every(steps, FillQueue)) == 2
    assert len(every(steps, WriteUnsent)) == 1
    text = "\n".join(describe(state.flow, steps))
    assert "SECRET" not in text
    assert "SEC" not in repr(steps)


def test_without_timestamps_the_clock_is_left_alone() -> None:
    bare = replace(plain(), negotiated=Negotiated(1460, False, 0, 0, False, False), timestamp=None, ts_recent=None)
    steps = dormant_steps(bare) + alive_steps(bare, 100)
    assert not every(steps, SetTimestamp)
    assert not every(steps, InjectSegment)
