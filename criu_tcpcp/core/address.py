"""An address as an interface has it, with all that is kept when it moves to another host. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any, Self

from .endpoint import IPAddress
from .errors import ProtocolError

#: IFA_F_* that were somebody's choice: NODAD, HOMEADDRESS, NOPREFIXROUTE, MCAUTOJOIN (linux/if_addr.h).
NODAD, HOMEADDRESS, NOPREFIXROUTE, MCAUTOJOIN = 0x02, 0x10, 0x200, 0x400
KEPT_FLAGS = NODAD | HOMEADDRESS | NOPREFIXROUTE | MCAUTOJOIN
_LABEL = re.compile(r"(:[A-Za-z0-9._-]{1,14})?")
_U8, _U32 = range(1 << 8), range(1 << 32)


@dataclass(frozen=True)
class InterfaceAddress:
    """`scope`: rtnetlink's number. `label`: of IPv4, what stands behind the interface's name (":vip"), or ''. `metric`:
    of its route, 0 for the kernel's own. `deprecated`: in use, but not chosen for what is new (RFC 4862 5.5.4)."""

    address: IPAddress
    prefix_length: int
    broadcast: IPAddress | None = None
    scope: int = 0
    label: str = ""
    flags: int = 0
    metric: int = 0
    deprecated: bool = False

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        return ipaddress.ip_network((self.address, self.prefix_length), strict=False)

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix_length}"

    def to_json(self) -> dict[str, Any]:
        return {"address": str(self.address), "prefix_length": self.prefix_length,
                "broadcast": str(self.broadcast) if self.broadcast is not None else None, "scope": self.scope,
                "label": self.label, "flags": self.flags, "metric": self.metric, "deprecated": self.deprecated}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; ProtocolError for anything else, since it reads what another host wrote."""
        try:
            address = ipaddress.ip_address(str(value["address"]))
            broadcast = ipaddress.ip_address(str(value["broadcast"])) if value["broadcast"] is not None else None
            found = cls(address, value["prefix_length"], broadcast, value["scope"], value["label"], value["flags"],
                        value["metric"], value["deprecated"])
            if not all(type(one) is int for one in (found.prefix_length, found.scope, found.flags, found.metric)) \
                    or type(found.deprecated) is not bool or type(found.label) is not str \
                    or not 0 < found.prefix_length <= address.max_prefixlen or found.scope not in _U8 \
                    or found.metric not in _U32 or found.flags & ~KEPT_FLAGS or not _LABEL.fullmatch(found.label) \
                    or (broadcast is not None and broadcast.version != 4) \
                    or (isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None) \
                    or (address.version == 6 and (broadcast is not None or found.label)) \
                    or any((address.is_multicast, address.is_loopback, address.is_unspecified, address.is_link_local)):
                raise ValueError("a field is out of bounds")
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not an address of an interface: {error}") from None
        return found
