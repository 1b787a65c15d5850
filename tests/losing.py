"""Packets that are lost on their last step, or their first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from criu_tcpcp.lab import Host


@contextlib.contextmanager
def losing(host: Host, hook: str, priority: int, rule: str) -> Iterator[Callable[[], None]]:
    """The host loses, at this point of its own, what the rule matches. Yields what ends it early."""
    host.run(["nft", "-f", "-"], input=f"""table inet losing {{
        chain losing {{ type filter hook {hook} priority {priority}; {rule} drop; }}
    }}""")
    stands = True

    def end() -> None:
        nonlocal stands
        if stands:
            host.run(["nft", "delete", "table", "inet", "losing"])
        stands = False
    try:
        yield end
    finally:
        end()
