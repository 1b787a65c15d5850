"""Where CRIU's message classes come from: pycriu, which Debian packages and PyPI does not.

Tried in this order: a plain import (CRIU_TCPCP_PYCRIU, a directory, is searched first), then Debian's
/usr/lib/python3/dist-packages, which a virtual environment without --system-site-packages does not see. Loaded lazily:
it costs some 60 ms.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

from .errors import Refused

_DEBIAN = "/usr/lib/python3/dist-packages"


@dataclass(frozen=True)
class Messages:
    """The classes that a connection's images are made of, and CRIU's magic numbers by name."""

    inet_sk: Any
    tcp_stream: Any
    sk_packet: Any
    fown: Any
    file: Any
    fdinfo: Any
    magic: dict[str, int]


@dataclass(frozen=True)
class DirectoryMessages:
    """The classes of those images of a dump that say whose a connection was."""

    inventory: Any
    ids: Any


def _import(name: str) -> Any:
    for extra in (os.environ.get("CRIU_TCPCP_PYCRIU"), None, _DEBIAN):
        added = extra is not None and extra not in sys.path
        if added and extra is not None:
            sys.path.insert(0, extra)
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
        finally:
            if added and extra is not None:
                sys.path.remove(extra)
    raise Refused("pycriu (CRIU's image format for Python) is not installed",
                  hint="Debian 12: apt install criu; Debian 13: apt install python3-pycriu; "
                       "elsewhere set CRIU_TCPCP_PYCRIU to the directory that holds pycriu")


@functools.cache
def messages() -> Messages:
    """Load pycriu. Refused names the package to install where it is missing."""
    images = _import("pycriu.images")
    parts = {name: importlib.import_module(f"pycriu.images.{name}_pb2")
             for name in ("sk_inet", "tcp_stream", "sk_packet", "fown", "fdinfo")}
    return Messages(parts["sk_inet"].inet_sk_entry, parts["tcp_stream"].tcp_stream_entry,
                    parts["sk_packet"].sk_packet_entry, parts["fown"].fown_entry, parts["fdinfo"].file_entry,
                    parts["fdinfo"].fdinfo_entry, dict(images.magic.by_name))


@functools.cache
def directory_messages() -> DirectoryMessages:
    """Apart from `messages`, since these bring the classes of all architectures with them, and no pass needs them."""
    _import("pycriu.images")
    return DirectoryMessages(_import("pycriu.images.inventory_pb2").inventory_entry,
                             _import("pycriu.images.core_pb2").task_kobj_ids_entry)
