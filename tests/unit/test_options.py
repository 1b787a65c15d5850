"""The two tables of socket options have every option that there is, and the document says what they say."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_tcpcp.core import criu
from criu_tcpcp.core.options import NOT_CARRIED, TABLE, Absent, Form, Missing, Option

DOCUMENT = Path(__file__).parents[2] / "docs" / "socket-options.md"
HEADERS = {"asm-generic/socket.h": (socket.SOL_SOCKET, "SO"), "linux/tcp.h": (socket.IPPROTO_TCP, "TCP"),
           "linux/in.h": (socket.IPPROTO_IP, "IP|MCAST"), "linux/in6.h": (socket.IPPROTO_IPV6, "IPV6")}
#: Values of options, not options. (A constant of TCP_REPAIR has the number of an option, too.)
VALUES = re.compile("TCP_MSS_|TCP_REPAIR_O[NF]|TCP_MD5SIG_(MAX|FLAG)|TCP_RECEIVE_ZERO|TCP_AO_MAX|IP(V6)?_PMTUDISC|"
                    "IP_DEFAULT|IP_MSFILTER_|MCAST_(EX|IN)CLUDE|IPV6_(FL_|FLOWINFO_(FLOWL|PRI)|PRIORITY|TLV|PREFER)")
LEVELS = (socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6)
LAST_NUMBER = 127
#: Of netfilter, which has numbers among those of IP: SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST, SO_IP_SET.
FOREIGN = {(socket.IPPROTO_IP, 80), (socket.IPPROTO_IPV6, 80), (socket.IPPROTO_IP, 83)}
LEVEL_NAMES = dict(zip(LEVELS, ("socket", "TCP", "IP", "IPv6"), strict=True))


def known() -> set[tuple[int, int]]:
    return {(one.level, one.number) for one in (*TABLE, *NOT_CARRIED)}


def test_no_option_stands_twice() -> None:
    places = [(one.level, one.number) for one in (*TABLE, *NOT_CARRIED)]
    names = [one.name for one in (*TABLE, *NOT_CARRIED)]
    assert len(set(places)) == len(places)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("header", HEADERS)
def test_every_option_of_the_kernels_headers_is_carried_or_said_not_to_be(header: str) -> None:
    level, prefix = HEADERS[header]
    text = Path("/usr/include", header).read_text()
    found = {name: int(number) for name, number in re.findall(rf"^#define\s+((?:{prefix})_\w+)\s+(\d+)\b", text, re.M)
             if not VALUES.match(name)}
    assert len(found) > 30
    assert {name for name, number in found.items() if (level, number) not in known()} == set()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_every_option_that_this_kernel_answers_for_is_known(family: socket.AddressFamily) -> None:
    """Its headers may be older than it."""
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    with (socket.create_server((address, 0), family=family) as listener,
          socket.create_connection(listener.getsockname()[:2]) as sock):
        answered = {(level, number) for level in LEVELS for number in range(LAST_NUMBER)
                    if answers(sock, level, number)}
    assert len(answered) > 100
    assert answered - FOREIGN - known() == set()


def answers(sock: socket.socket, level: int, number: int) -> bool:
    """Errors about the moment, not about the option, are an answer, too."""
    try:
        sock.getsockopt(level, number, 64)
    except OSError as error:
        return error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENODATA)
    return True


def test_every_field_of_crius_for_options_is_in_a_row() -> None:
    entry = criu.messages().inet_sk.DESCRIPTOR
    fields = {f"opts.{one.name}" for one in entry.fields_by_name["opts"].message_type.fields}
    fields |= {f"ip_opts.{one.name}" for one in entry.fields_by_name["ip_opts"].message_type.fields}
    fields |= {"ifname", "v6only"}
    for pair in ("so_snd_tmo", "so_rcv_tmo"):
        fields -= {f"opts.{pair}_sec", f"opts.{pair}_usec"}
        fields.add(f"opts.{pair}")
    # Fields that CRIU 3.17 has not (4.0 has them): these options travel beside the images.
    fields -= {"ip_opts.pktinfo", "ip_opts.tos", "ip_opts.ttl"}
    # The index of the interface that ifname names; and what a raw socket has.
    assert fields - {one.criu for one in TABLE} == {"opts.so_bound_dev", "ip_opts.raw"}


def test_the_document_has_both_tables() -> None:
    text = DOCUMENT.read_text()
    for line in (*map(carried, TABLE), *absent(NOT_CARRIED)):
        assert line in text.splitlines(), f"{DOCUMENT.name} lacks this line, or has another: {line}"
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(TABLE) + len(list(absent(NOT_CARRIED)))


def carried(option: Option) -> str:
    """A line of the first table."""
    where = "CRIU's image" if option.criu else "beside it"
    version = " (IPv6 sockets)" if option.ip_version else ""
    missing = "is refused" if option.missing is Missing.REFUSE else "goes on, and the report says so"
    form = {Form.INT: "number", Form.LONG: "long number", Form.PAIR: "two numbers", Form.TIMEVAL: "time",
            Form.LINGER: "on, seconds", Form.TEXT: "name", Form.BYTES: "bytes", Form.FILTER: "classic BPF program"}
    when = option.when.name.lower().replace("_", " ")
    return f"| `{option.name}`{version} | {form[option.form]} | {where} | {when} | {missing} |"


def absent(options: tuple[Absent, ...]) -> Iterator[str]:
    """Lines of the second table: one for all that have the level and the reason in common."""
    groups: dict[tuple[int, str], list[str]] = {}
    for one in options:
        groups.setdefault((one.level, one.why), []).append(one.name)
    for (level, why), names in groups.items():
        yield f"| {', '.join(f'`{name}`' for name in names)} | {LEVEL_NAMES[level]} | {why} |"
