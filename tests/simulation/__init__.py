"""Passes of one connection, simulated with every fault that handoff.py is there for; everything derives from a seed.

What is real: the tables and `Machine` of `core.handoff`, run by `driver`, which does what `executor.Executor` does (a
test holds the two against each other). What is simulated: what each action does to two hosts (`world`, `actions`), the
processes that run the machines and what recovery reads from a journal (`processes`), and the order of everything
(`scenario`): one step of one process after another, chosen by the seed, with faults between them.

`python -m tests.simulation SEED` prints what happened, step by step.
"""

from __future__ import annotations

from .processes import Rules, Taken
from .scenario import Result, simulate
from .world import Property, Violation

__all__ = ["Property", "Result", "Rules", "Taken", "Violation", "simulate"]
