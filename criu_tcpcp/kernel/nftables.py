"""nf_tables in the few shapes that this project needs: a table, and *components* in it.

A component is a set of connections and the chains that act on it; it is made whole, changed by adding and removing
elements, and removed in one transaction that fails when an element is left (`NLM_F_NONREC`), so that two commands
at once cannot pull the rules from under each other. An element is a connection as its incoming packets name it:
peer address, peer port, local address, local port, each padded to four bytes.

Numbers are those of linux/netfilter/nf_tables.h. `nft list ruleset` shows all of it in its own words.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.endpoint import Endpoint, Flow, Protocol
from ..core.errors import KernelError
from . import netlink
from .netlink import F_CREATE, F_EXCL, attribute, be16, be32, be64, nested, text

SUBSYSTEM = 10
_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE = 0, 2, 3, 5, 6, 8
_GETTABLE, _NEWSET, _GETSET, _DELSET, _NEWELEM, _GETELEM, _DELELEM = 1, 9, 10, 11, 12, 13, 14
_F_NONREC, _F_APPEND = 0x100, 0x800

TABLE_OWNER = 2
_SET_TIMEOUT, _SET_EVAL, _SET_CONCAT = 0x10, 0x20, 0x80
PREROUTING, OUTPUT = 0, 3  # NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT

_REG32_00, _REG32_12 = 8, 20
_META_MARK, _META_IIFNAME, _META_L4PROTO = 3, 6, 16
_NETWORK, _TRANSPORT = 1, 2
_CT_ZONE = 17
_CMP_EQ, _CMP_NEQ = 0, 1
_CSUM_INET = 1  # NFT_PAYLOAD_CSUM_INET
_DYNSET_ADD, _DYNSET_UPDATE, _DYNSET_DELETE = 0, 1, 2
_ACCEPT, _DROP = 1, 0
_FIN_OR_RST = 0x05

# What `nft list` prints an element as: its type numbers, six bits each, ip(6)_addr . inet_service . twice.
_ADDR_TYPE = {4: 7, 6: 8}
_PORT_TYPE = 13


def family(version: int) -> int:
    """The nf_tables family of packets of this IP version: always `ip` or `ip6`, where xt targets work too."""
    return socket.AF_INET if version == 4 else socket.AF_INET6


def element_key(flow: Flow) -> bytes:
    """The flow as an element: network byte order, ports padded."""
    return b"".join(end.address.packed + struct.pack(">Hxx", end.port) for end in (flow.peer, flow.local))


def _flow_of_key(key: bytes, protocol: Protocol) -> Flow:
    import ipaddress
    half = len(key) // 2
    ends = [Endpoint(ipaddress.ip_address(part[:-4]), struct.unpack(">H", part[-4:-2])[0])
            for part in (key[:half], key[half:])]
    return Flow(local=ends[1], peer=ends[0], protocol=protocol)


# -- expressions: each function is one statement of a rule, as `nft --debug=netlink` would print it ------------------

def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *attributes))


def _value(kind: int, data: bytes) -> bytes:
    return nested(kind, attribute(1, data))


def _meta_load(key: int) -> bytes:
    return _expression("meta", be32(1, _REG32_12), be32(2, key))


def _compare(operator: int, data: bytes) -> bytes:
    return _expression("cmp", be32(1, _REG32_12), be32(2, operator), _value(3, data))


def _payload(base: int, offset: int, length: int, register: int) -> bytes:
    return _expression("payload", be32(1, register), be32(2, base), be32(3, offset), be32(4, length))


def _immediate(register: int, data: bytes) -> bytes:
    return _expression("immediate", be32(1, register), _value(2, data))


def _verdict(code: int) -> bytes:
    return _expression("immediate", be32(1, 0), nested(2, nested(2, be32(1, code))))


def mark_is(mark: int) -> bytes:
    return _meta_load(_META_MARK) + _compare(_CMP_EQ, struct.pack("=I", mark))


def set_mark(mark: int) -> bytes:
    return _immediate(_REG32_12, struct.pack("=I", mark)) + _expression("meta", be32(2, _META_MARK), be32(3, _REG32_12))


def comes_by(prefix: str) -> bytes:
    """Matches what came in by an interface whose name begins so."""
    return _meta_load(_META_IIFNAME) + _compare(_CMP_EQ, prefix.encode())


def is_for_link_local(version: int) -> bytes:
    """Matches a packet to 169.254.0.0/16 or fe80::/64."""
    offset, network = (16, b"\xa9\xfe") if version == 4 else (24, b"\xfe\x80" + bytes(6))
    return _payload(_NETWORK, offset, len(network), _REG32_12) + _compare(_CMP_EQ, network)


def ends_connection() -> bytes:
    """Matches a segment that carries FIN or RST."""
    mask = _expression("bitwise", be32(1, _REG32_12), be32(2, _REG32_12), be32(3, 1),
                       _value(4, bytes([_FIN_OR_RST])), _value(5, b"\0"))
    return _payload(_TRANSPORT, 13, 1, _REG32_12) + mask + _compare(_CMP_NEQ, b"\0")


def is_knock(protocol: Protocol) -> bytes:
    """Matches what no peer sends, and no socket takes or answers: a TCP segment without any flag (RFC 9293 3.10.7.4), a
    UDP datagram that says it is shorter than its header (RFC 768)."""
    if protocol is Protocol.UDP:
        return _payload(_TRANSPORT, 4, 2, _REG32_12) + _compare(_CMP_EQ, b"\0\0")
    return _payload(_TRANSPORT, 13, 1, _REG32_12) + _compare(_CMP_EQ, b"\0")


def load_flow(version: int, protocol: Protocol, *, outgoing: bool = False) -> bytes:
    """Matches the protocol and loads the packet's connection as an element: the source is the peer unless
    `outgoing`."""
    width, source, destination = (4, 12, 16) if version == 4 else (16, 8, 24)
    words = width // 4
    ends = [(source, 0), (destination, 2)]
    (peer, peer_port), (local, local_port) = reversed(ends) if outgoing else ends
    first = _REG32_00
    return (_meta_load(_META_L4PROTO) + _compare(_CMP_EQ, bytes([protocol]))
            + _payload(_NETWORK, peer, width, first) + _payload(_TRANSPORT, peer_port, 2, first + words)
            + _payload(_NETWORK, local, width, first + words + 1)
            + _payload(_TRANSPORT, local_port, 2, first + 2 * words + 1))


def in_set(name: str) -> bytes:
    """Goes on only where the loaded connection is an element of the set."""
    return _expression("lookup", text(1, name), be32(2, _REG32_00))


def refresh(name: str, timeout_s: int) -> bytes:
    """The loaded connection's element lives `timeout_s` from now."""
    return _change(name, _DYNSET_UPDATE, be64(6, timeout_s * 1000))


def put_in(name: str) -> bytes:
    """The loaded connection becomes an element of the set."""
    return _change(name, _DYNSET_ADD)


def take_out(name: str) -> bytes:
    """The loaded connection is no element of the set any more (since Linux 5.4, d0a8d877da97)."""
    return _change(name, _DYNSET_DELETE)


def _change(name: str, operation: int, *more: bytes) -> bytes:
    return _expression("dynset", text(1, name), be32(3, operation), be32(4, _REG32_00), *more)


def duplicate(nexthop: bytes, interface: int) -> bytes:
    """A copy of the packet goes to the next hop (nft `dup to ADDRESS device DEVICE`)."""
    return (_immediate(_REG32_00, nexthop) + _immediate(_REG32_12, struct.pack("=I", interface))
            + _expression("dup", be32(1, _REG32_00), be32(2, _REG32_12)))


def track_again() -> bytes:
    """What conntrack was to pass over, it looks at after all (nft `ct zone set 0`): a packet that is untracked has no
    connection (since Linux 4.12, cc41c84b7e7f), and so gets the template of the zone (net/netfilter/nft_ct.c,
    nft_ct_set_zone_eval). Needs CONFIG_NF_CONNTRACK_ZONES, and has conntrack work from then on."""
    return _immediate(_REG32_12, struct.pack("=H", 0)) + _expression("ct", be32(2, _CT_ZONE), be32(4, _REG32_12))


def raise_even_ttl(version: int) -> bytes:
    """An even TTL (hop limit) becomes one more; an odd one stays, as there is no addition."""
    offset, mask, change = (8, b"\xfe\xff", b"\1\0") if version == 4 else (6, b"\xff\xfe", b"\0\1")
    odd = _expression("bitwise", be32(1, _REG32_12), be32(2, _REG32_12), be32(3, 2), _value(4, mask), _value(5, change))
    checksum = (be32(6, _CSUM_INET), be32(7, 10)) if version == 4 else ()
    return _payload(_NETWORK, offset, 2, _REG32_12) + odd + _expression(
        "payload", be32(5, _REG32_12), be32(2, _NETWORK), be32(3, offset), be32(4, 2), *checksum)


def drop() -> bytes:
    return _verdict(_DROP)


def accept() -> bytes:
    return _verdict(_ACCEPT)


def reassemble(version: int) -> bytes:
    """Never to be reached: as long as a rule has it, the kernel puts the fragments of datagrams together before any
    rule sees them (net/netfilter/nft_tproxy.c, nft_tproxy_init: nf_defrag_ipv4_enable; CONFIG_NFT_TPROXY)."""
    port = _immediate(_REG32_00, b"\0\1")
    return port + _expression("tproxy", be32(1, family(version)), be32(3, _REG32_00))


def queue_natively(number: int) -> bytes:
    """nf_tables' own `queue` expression (CONFIG_NFT_QUEUE)."""
    return _expression("queue", be16(1, number), be16(2, 1))


def queue_by_xt(number: int) -> bytes:
    """The xt NFQUEUE target as an expression (CONFIG_NFT_COMPAT), for kernels without the former."""
    return _expression("target", text(1, "NFQUEUE"), be32(2, 0), attribute(3, struct.pack("=Hxxxxxx", number)))


# -- components -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chain:
    """A base chain: `hook` and `priority` as in nft, `rules` in order, each the bytes of its expressions."""

    name: str
    hook: int
    priority: int
    rules: tuple[bytes, ...]


@dataclass(frozen=True)
class Component:
    """`sets[0]` holds the connections; further sets are the rules' own bookkeeping."""

    version: int
    sets: tuple[str, ...]
    chains: tuple[Chain, ...]


class Table:
    """One table of one family, in the network namespace in which `wire` was opened. `protocol`: of the connections that
    are in its sets."""

    def __init__(self, wire: netlink.NetlinkSocket, name: str, version: int,
                 protocol: Protocol = Protocol.TCP) -> None:
        self._wire = wire
        self.name = name
        self.version, self.protocol = version, protocol
        self._family = family(version)

    def _part(self, kind: int, flags: int, *attributes: bytes) -> tuple[int, int, int, bytes]:
        return kind, flags, self._family, b"".join(attributes)

    def _run(self, what: str, *parts: tuple[int, int, int, bytes]) -> None:
        self._wire.batch(f"nftables: {what} (table {self.name})", SUBSYSTEM, parts)

    def create(self, flags: int = 0) -> None:
        """Make the table; one that is there already is as good, unless it has an owner."""
        self._run("new table", self._part(_NEWTABLE, F_CREATE, text(1, self.name), be32(2, flags)))

    def exists(self) -> bool:
        with contextlib.suppress(KernelError):
            self._wire.request("nftables", SUBSYSTEM << 8 | _GETTABLE, 0, self._family, 0, text(1, self.name))
            return True
        return False

    def install(self, component: Component) -> None:
        """Make the component's sets and chains in one transaction; does nothing where they are."""
        flags = F_CREATE | F_EXCL
        parts = [self._part(_NEWSET, flags, *self._set_attributes(name, number))
                 for number, name in enumerate(component.sets, 1)]
        for chain in component.chains:
            hook = nested(4, be32(1, chain.hook), be32(2, chain.priority))
            parts.append(self._part(_NEWCHAIN, flags, text(1, self.name), text(3, chain.name), hook,
                                    text(7, "filter"), be32(5, _ACCEPT)))
            parts += [self._part(_NEWRULE, F_CREATE | _F_APPEND, text(1, self.name), text(2, chain.name),
                                 nested(4, rule)) for rule in chain.rules]
        try:
            self._run(f"install {component.sets[0]}", *parts)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise

    def install_first(self, components: Sequence[Component]) -> int:
        """Make the first of these that the kernel knows; returns its number. KernelError, the first one, where it knows
        none."""
        failure: KernelError | None = None
        for number, component in enumerate(components):
            try:
                self.install(component)
                return number
            except KernelError as error:
                failure = failure or error
        raise failure or ValueError("no component given")

    def _set_attributes(self, name: str, number: int) -> list[bytes]:
        kind = 0
        for part in (_ADDR_TYPE[self.version], _PORT_TYPE) * 2:
            kind = kind << 6 | part
        width = 4 if self.version == 4 else 16
        flags = _SET_TIMEOUT | _SET_EVAL | _SET_CONCAT
        fields = nested(2, *(nested(1, be32(1, size)) for size in (width, 4, width, 4)))
        # No size: the kernel would make room for that many at once, and shrinking a large empty hash table again, after
        # the first element has gone, keeps a CPU busy for 3 ms (lib/rhashtable.c, rht_deferred_worker).
        return [text(1, self.name), text(2, name), be32(3, flags), be32(4, kind), be32(5, 2 * (width + 4)),
                nested(9, fields), be32(10, number)]

    def remove_if_unused(self, component: Component) -> bool:
        """Remove the component unless a connection is in it; False where one is. One transaction."""
        parts = [self._part(_DELRULE, 0, text(1, self.name), text(2, chain.name)) for chain in component.chains]
        parts += [self._part(_DELCHAIN, 0, text(1, self.name), text(3, chain.name)) for chain in component.chains]
        parts += [self._part(_DELSET, _F_NONREC, text(1, self.name), text(2, name)) for name in component.sets]
        return self._unless_busy(f"remove {component.sets[0]}", parts)

    def delete_if_unused(self) -> bool:
        """Delete the table unless a component is in it; False where one is."""
        return self._unless_busy("delete", [self._part(_DELTABLE, _F_NONREC, text(1, self.name))])

    def _unless_busy(self, what: str, parts: list[tuple[int, int, int, bytes]]) -> bool:
        try:
            self._run(what, *parts)
        except KernelError as error:
            if error.errno == errno.EBUSY:
                return False
            if not netlink.is_missing(error):
                raise
        return True

    def add(self, set_name: str, flows: Iterable[Flow], timeout_s: int = 0) -> None:
        """Add connections to a set; one that is there already stays, with its own timeout."""
        items = [nested(1, _value(1, element_key(flow)), *([be64(4, timeout_s * 1000)] if timeout_s else []))
                 for flow in flows]
        self._run(f"add to {set_name}",
                  self._part(_NEWELEM, F_CREATE, text(1, self.name), text(2, set_name), nested(3, *items)))

    def remove_all(self, set_names: Iterable[str], flow: Flow) -> None:
        """Remove a connection from several sets in which it is, in one transaction; KernelError where it is not."""
        items = nested(3, nested(1, _value(1, element_key(flow))))
        self._run("remove a connection", *(self._part(_DELELEM, 0, text(1, self.name), text(2, name), items)
                                           for name in set_names))

    def remove(self, set_name: str, flow: Flow) -> bool:
        """Remove a connection from a set; False where it was not there.

        Looked for first: a transaction that fails waits for a grace period before it returns, some 15 ms
        (net/netfilter/nf_tables_api.c, __nf_tables_abort)."""
        if not self.contains(set_name, flow):
            return False
        try:
            self.remove_all([set_name], flow)
        except KernelError as error:
            if netlink.is_missing(error):
                return False
            raise
        return True

    def contains(self, set_name: str, flow: Flow) -> bool:
        """The connection is in the set."""
        item = nested(1, _value(1, element_key(flow)))
        try:
            self._wire.request("nftables: look for a connection", SUBSYSTEM << 8 | _GETELEM, 0, self._family, 0,
                               text(1, self.name) + text(2, set_name) + nested(3, item))
        except KernelError as error:
            if netlink.is_missing(error):
                return False
            raise
        return True

    def set_names(self) -> list[str]:
        """The sets of the table; none where there is no table."""
        try:
            found = self._wire.dump("nftables: sets", SUBSYSTEM << 8 | _GETSET, self._family, text(1, self.name))
        except KernelError as error:
            if netlink.is_missing(error):
                return []
            raise
        return [_text_of(item, 2) for item in found]

    def flows(self, set_name: str) -> list[Flow]:
        """The connections in a set; none where there is no such set."""
        try:
            answers = self._wire.dump("nftables: elements", SUBSYSTEM << 8 | _GETELEM, self._family,
                                      text(1, self.name) + text(2, set_name))
        except KernelError as error:
            if netlink.is_missing(error):
                return []
            raise
        keys = [bytes(value) for answer in answers for kind, items in netlink.attributes(answer) if kind == 3
                for _one, item in netlink.attributes(items)
                for field, wrapped in netlink.attributes(item) if field == 1
                for _value_kind, value in netlink.attributes(wrapped)]
        return [_flow_of_key(key, self.protocol) for key in keys]


def _text_of(data: bytes, wanted: int) -> str:
    values: Sequence[bytes] = [bytes(payload) for kind, payload in netlink.attributes(data) if kind == wanted]
    return values[0].rstrip(b"\0").decode() if values else ""
