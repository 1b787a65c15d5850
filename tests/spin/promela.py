"""The handoff's tables in Promela: what `handoff.pml` includes as `tables.pml`.

Nothing of the tables is written by hand in the model, so the two cannot drift. A wrong protocol is a macro: its changed
transitions stand beside the right ones, and `spin -DNAME` takes them.

    O_X, D_X, E_X, A_X            numbers of states, events, actions; no action is 0
    ORIGIN_TRANSITION(s, e), DESTINATION_TRANSITION(s, e)      0 where the table has none
    ORIGIN_ACTION(pc), DESTINATION_ACTION(pc)                  the action at a place, 0 behind the last
    BEST_EFFORT(a), O_FINAL(s), D_FINAL(s)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from criu_tcpcp.core.handoff import (
    BEST_EFFORT,
    DESTINATION,
    DESTINATION_FINAL,
    ORIGIN,
    ORIGIN_FINAL,
    Action,
    DestinationState,
    Event,
    OriginState,
)

Table = Mapping[Any, Any]
#: A macro, and the tables that stand for it.
Variants = Mapping[str, tuple[Table, Table]]


def tables(variants: Variants) -> str:
    """The text of tables.pml."""
    lines = ["/* Made from criu_tcpcp/core/handoff.py by promela.py. */"]
    for prefix, members in (("O", OriginState), ("D", DestinationState), ("E", Event), ("A", Action)):
        lines += [f"#define {prefix}_{one.name} {number}" for number, one in enumerate(members, 1)]
    lines += [_any("BEST_EFFORT", "A", BEST_EFFORT), _any("O_FINAL", "O", ORIGIN_FINAL),
              _any("D_FINAL", "D", DESTINATION_FINAL)]
    lines += _machine("ORIGIN", "O", ORIGIN, {name: pair[0] for name, pair in variants.items()})
    lines += _machine("DESTINATION", "D", DESTINATION, {name: pair[1] for name, pair in variants.items()})
    return "\n".join(lines) + "\n"


def _any(macro: str, prefix: str, members: frozenset[Any]) -> str:
    """Sorted: the same tables give the same text."""
    return f"#define {macro}(x) ({' || '.join(f'(x) == {prefix}_{one.name}' for one in sorted(members))})"


def _machine(name: str, prefix: str, right: Table, variants: Mapping[str, Table]) -> list[str]:
    """NAME_TRANSITION(state, ev) is 256 * the next state + the place of its first action, or 0; NAME_ACTION(pc). They
    are expressions: as statements they would be too many for one d_step."""
    places: dict[tuple[Action, ...], int] = {(): 0}
    program: list[Action | None] = [None]
    lines = []

    def expression(table: Table) -> str:
        text = "0"
        for (state, event), transition in table.items():
            if transition.actions not in places:
                places[transition.actions] = len(program)
                program.extend([*transition.actions, None])
            code = f"256 * {prefix}_{transition.state.name} + {places[transition.actions]}"
            text = f"((s) == {prefix}_{state.name} && (e) == E_{event.name} -> {code} : {text})"
        return text

    for macro, table in variants.items():
        if table != right:
            lines += [f"#if defined({macro})", f"#define {name}_TRANSITION(s, e) {expression(table)}", "#else"]
    lines += [f"#define {name}_TRANSITION(s, e) {expression(right)}", *["#endif"] * (len(lines) // 3)]
    text = "0"
    for place, action in enumerate(program):
        if action is not None:
            text = f"((pc) == {place} -> A_{action.name} : {text})"
    return [*lines, f"#define {name}_ACTION(pc) {text}"]
