"""Pass one live TCP connection from a process on one host to a process on another; the peer never notices.

    report = criu_tcpcp.pass_connection(pid=42, fd=7, host="dest")     the command's `pass`, as a call
    report = criu_tcpcp.dump_connection(pid=42, fd=7, directory=...)   and its `dump`
    criu_tcpcp.Receiver, criu_tcpcp.register                           a cooperating application's half
    criu_tcpcp.get, criu_tcpcp.create, criu_tcpcp.activate, .end       the bare mechanism

What an application uses is imported with it; everything else comes in when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import Dormant, activate, create, end, get
    from .application import Passed, Receiver, Registration, register
    from .core.errors import ExitCode, Owner, TcpcpError
    from .dump import dump_connection
    from .passing import pass_connection
    from .report import PassError, Report

_HOME = {"Dormant": "api", "activate": "api", "create": "api", "end": "api", "get": "api",
         "Passed": "application", "Receiver": "application", "Registration": "application", "register": "application",
         "ExitCode": "core.errors", "Owner": "core.errors", "TcpcpError": "core.errors",
         "dump_connection": "dump", "pass_connection": "passing", "PassError": "report", "Report": "report"}

__all__ = ["Dormant", "ExitCode", "Owner", "PassError", "Passed", "Receiver", "Registration", "Report", "TcpcpError",
           "__version__", "activate", "create", "dump_connection", "end", "get",
           "pass_connection", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
