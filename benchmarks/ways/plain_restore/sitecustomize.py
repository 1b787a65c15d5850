"""A restore by TCP_REPAIR alone, for benchmarks/resume.py to compare with: what else is done for speed is left out.

Python imports a module of this name by itself when it starts, if its directory is on PYTHONPATH: with it, this tool
restores as the libraries do that know only what TCP_REPAIR says (libsoccr, for one). Hold, order and redirect stay.
"""

from __future__ import annotations

import sys
from typing import Any

_FOR_SPEED = ("SetMaxSegment",)


def _restore_plainly() -> None:
    from criu_tcpcp.kernel.repair import Restorer
    whole = Restorer.run

    def run(self: Restorer, steps: list[Any]) -> None:
        whole(self, [step for step in steps if type(step).__name__ not in _FOR_SPEED])

    Restorer.run = run  # type: ignore[method-assign]


if sys.argv[0].endswith("criu-tcpcp") or "criu-tcpcp" in " ".join(sys.orig_argv):
    _restore_plainly()
