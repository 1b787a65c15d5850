"""The origin's side of a pass: `Origin` is what the executor runs (side.py), with what is behind it in a file each:
the origin process (process.py), what is read of its connection (extraction.py), the destination (counterpart.py)."""

from .counterpart import Counterpart
from .side import STATE_FILE, Options, Origin

__all__ = ["STATE_FILE", "Counterpart", "Options", "Origin"]
