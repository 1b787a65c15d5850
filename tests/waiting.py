"""To wait for a condition: with a deadline, and without a guess of how long it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_S = 60.0


def until(condition: Callable[[], object], what: str = "", timeout_s: float = PATIENCE_S, *,
          every_s: float = 0.002) -> None:
    """Return once the condition holds; the test fails where it does not in time. `every_s`: more where it costs."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        pause.wait(every_s)
