"""The strict peer's endpoint against itself: two of them joined by a link that loses, delays and turns packets round.

Whatever the link does, both streams arrive whole, and neither judge has anything to say about the other end: so what
the judge objects to is never what an honest endpoint does.
"""

from __future__ import annotations

import heapq
import ipaddress
import itertools
import random
from dataclasses import replace

import pytest

from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.lab.answering import Responder
from criu_tcpcp.lab.strict.conversation import RequestResponse, Streams
from criu_tcpcp.lab.strict.judge import Path, Violation
from criu_tcpcp.lab.strict.segments import from_bytes, to_bytes, wrong_checksum
from criu_tcpcp.lab.strict.tcp import Settings, State, Tcp
from criu_tcpcp.verify.packet import Packet

HERE = Endpoint(ipaddress.ip_address("10.0.0.1"), 40000)
THERE = Endpoint(ipaddress.ip_address("10.0.0.2"), 9000)
NEAR_THE_END = (1 << 32) - 3000


class Answering:
    """The other half of RequestResponse."""

    def __init__(self, tcp: Tcp, size: int) -> None:
        self.tcp, self._responder = tcp, Responder(1, size)
        tcp.judge.fin_after = -1
        self._closed = False

    def step(self, now: float) -> None:
        owed = self._responder.feed(self.tcp.read(1 << 16, now))
        assert not self._responder.wrong
        self.tcp.write(owed, now)
        self._responder.took(len(owed))
        if self.tcp.fin_received and not self._closed:
            self._closed = True
            self.tcp.close(now)

    def deadline(self, now: float) -> float | None:
        return None

    @property
    def done(self) -> bool:
        return self.tcp.done


class Counted(RequestResponse):
    """It ends after 50 requests."""

    def step(self, now: float) -> None:
        if self.requests == 50:
            self.stop()
        super().step(now)


class Link:
    """Two endpoints and virtual time. Each packet takes 10 ms, plus up to `jitter_s`; `loss` of them never arrive."""

    def __init__(self, one: Tcp, other: Tcp, *, loss: float = 0.0, jitter_s: float = 0.0, seed: int = 1) -> None:
        self.ends = {one.settings.local: one, other.settings.local: other}
        self.now = 0.0
        self.lost = 0
        self._loss, self._jitter_s = loss, jitter_s
        self._random = random.Random(seed)
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, Packet]] = []

    def run(self, *conversations: RequestResponse | Streams | Answering, limit_s: float = 3600.0) -> None:
        while True:
            for conversation in conversations:
                if conversation.tcp.state is State.OPEN:
                    conversation.step(self.now)
            if all(conversation.done for conversation in conversations):
                return
            for end in self.ends.values():
                for packet in end.take():
                    self._send(packet)
            wanted = [end.deadline() for end in self.ends.values()]
            wanted += [conversation.deadline(self.now) for conversation in conversations]
            wanted += [self._under_way[0][0]] if self._under_way else []
            at = min((one for one in wanted if one is not None), default=None)
            assert at is not None, "everybody waits for somebody else"
            self.now = max(at, self.now)
            assert self.now < limit_s
            while self._under_way and self._under_way[0][0] <= self.now:
                _at, _number, packet = heapq.heappop(self._under_way)
                self._arrive(packet)
            for end in self.ends.values():
                end.tick(self.now)

    def _send(self, packet: Packet) -> None:
        if self._random.random() < self._loss:
            self.lost += 1
            return
        at = self.now + 0.010 + self._random.random() * self._jitter_s
        heapq.heappush(self._under_way, (at, next(self._order), packet))

    def _arrive(self, packet: Packet) -> None:
        data = to_bytes(packet)
        assert wrong_checksum(data) is None
        again = from_bytes(data, packet.number, 0)
        assert isinstance(again, Packet)
        self.ends[packet.dst].receive(again, self.now)


def ends(path: Path | None = None, other: dict[str, object] | None = None, **options: object) -> tuple[Tcp, Tcp]:
    """A client that connects, and a server that listens; `other` are the server's settings where they differ."""
    settings = replace(Settings(HERE, THERE, iss=NEAR_THE_END, tsval=NEAR_THE_END, path=path or Path()), **options)
    opposite = replace(settings, local=THERE, remote=HERE, iss=77, tsval=5, **(other or {}))
    client, server = Tcp(settings), Tcp(opposite)
    server.listen()
    client.connect(0.0)
    return client, server


def streams(client: Tcp, server: Tcp, amount: int, back: int, **options: float) -> tuple[Streams, Streams]:
    return (Streams(client, send=amount, receive=back, seed=1, **{"patience_s": 600, **options}),
            Streams(server, send=back, receive=amount, seed=2, seed_in=1, patience_s=600))


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {}, "no-timestamps": {"timestamps": False}, "no-sack": {"sack": False}, "no-scale": {"window_scale": None},
    "large-scale": {"window_scale": 14}, "bare": {"timestamps": False, "sack": False, "window_scale": None},
    "small-mss": {"mss": 100}, "tiny-window": {"buffer": 3000}, "slow-acks": {"ack_delay_s": 0.3}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_requests_are_answered_on_a_good_path(variant: str) -> None:
    client, server = ends(Path(lossless=True), **VARIANTS[variant])
    conversation = Counted(client, rate=100, size=300)
    Link(client, server).run(conversation, Answering(server, 300))
    assert conversation.answers == conversation.requests == 50
    assert client.counts["sent_again"] == server.counts["sent_again"] == 0


@pytest.mark.parametrize("loss", [0.0, 0.05])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_arrive_whole_over_a_path_that_loses(variant: str, loss: float) -> None:
    client, server = ends(**VARIANTS[variant])
    amount = 20_000 if variant == "small-mss" else 150_000
    one, other = streams(client, server, amount, amount // 2)
    link = Link(client, server, loss=loss, seed=len(variant))
    link.run(one, other)
    assert (one.received, other.received) == (amount // 2, amount)
    assert bool(link.lost) == bool(loss)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_arrive_whole_though_packets_overtake_each_other(variant: str, seed: int) -> None:
    client, server = ends(Path(ordered=False), **VARIANTS[variant])
    amount = 10_000 if variant == "small-mss" else 80_000
    one, other = streams(client, server, amount, amount)
    Link(client, server, loss=0.02, jitter_s=0.02, seed=seed).run(one, other)
    assert (one.received, other.received) == (amount, amount)
    assert client.counts["out_of_order"] > 0


def test_a_slow_reader_closes_the_window_and_opens_it_again() -> None:
    client, server = ends(buffer=4000)
    one, other = streams(client, server, 1000, 60_000, read_rate=2000)
    Link(client, server).run(one, other)
    assert one.received == 60_000
    assert client.counts["zero_windows_sent"] > 0
    assert server.counts["probes_sent"] > 0
    assert client.counts["probes_received"] > 0


@pytest.mark.parametrize("offered", ["timestamps", "sack", "window_scale"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_what_only_one_end_offers_is_not_used(offered: str, side: str) -> None:
    without: dict[str, object] = {offered: None if offered == "window_scale" else False}
    client, server = ends(**without, other={offered: 7 if offered == "window_scale" else True}) if side == "client" \
        else ends(other=without)
    one, other = streams(client, server, 40_000, 40_000)
    Link(client, server, loss=0.02).run(one, other)
    for end in (client, server):
        assert not (end.judge.our_scale if offered == "window_scale" else getattr(end.judge, offered))


def test_a_byte_that_never_comes_is_told_with_its_number() -> None:
    client, server = ends()
    one, other = streams(client, server, 0, 50_000, patience_s=5)
    hole = (77 + 1 + 14_000) % (1 << 32)
    link = Link(client, server)
    honest = link._arrive

    def arrive(packet: Packet) -> None:
        if not packet.seq <= hole < packet.seq + packet.payload_len:
            honest(packet)

    link._arrive = arrive  # type: ignore[method-assign]
    with pytest.raises(Violation, match=r"silence: for 5 s: the byte at seq \d+ never came, later ones did"):
        link.run(one, other)
    assert client.gap is not None
    assert client.gap <= hole < client.gap + 1460


def test_an_answer_that_never_comes_is_told() -> None:
    client, server = ends()
    conversation = RequestResponse(client, rate=10, size=100, patience_s=3)

    class Silent(Answering):
        def step(self, now: float) -> None:
            self.tcp.read(100, now)

    with pytest.raises(Violation, match="silence: for 3 s: nothing came behind seq 78"):
        Link(client, server).run(conversation, Silent(server, 100))


def test_wrong_bytes_are_told() -> None:
    client, server = ends()
    conversation = RequestResponse(client, rate=10, size=100)

    class Lying(Answering):
        def step(self, now: float) -> None:
            if self.tcp.read(100, now):
                self.tcp.write(bytes(100), now)

    with pytest.raises(Violation, match="stream: the bytes are not those of the stream"):
        Link(client, server).run(conversation, Lying(server, 100))


@pytest.mark.parametrize("addresses", [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")])
def test_checksums_are_right_and_a_changed_byte_is_noticed(addresses: tuple[str, str]) -> None:
    local, remote = (Endpoint(ipaddress.ip_address(one), 1000) for one in addresses)
    tcp = Tcp(Settings(local, remote))
    tcp.connect(0.0)
    packet, = tcp.take()
    data = to_bytes(replace(packet, payload=b"odd", payload_len=3))
    assert wrong_checksum(data) is None
    for place in (len(data) - 1, 25 if local.address.version == 4 else 45):
        changed = bytearray(data)
        changed[place] ^= 1
        assert wrong_checksum(bytes(changed)) == "the TCP checksum is wrong"
    if local.address.version == 4:
        changed = bytearray(data)
        changed[8] -= 1  # the TTL is in the header's checksum alone
        assert wrong_checksum(bytes(changed)) == "the IP header's checksum is wrong"
