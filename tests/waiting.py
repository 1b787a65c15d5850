"""To wait for a condition: with a deadline, and without a guess of how long it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_S = 20.0


def until(condition: Callable[[], object], what: str = "", timeout_s: float = PATIENCE_S) -> None:
    """Return once the condition holds; the test fails where it does not in time."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        pause.wait(0.002)
