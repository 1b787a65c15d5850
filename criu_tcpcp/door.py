"""`serve` as a guarded door: what the key that came in by SSH may do here, asked whenever it could matter.

    at the greeting    the key is in the policy at all
    at Stage           some rule allows this connection, and what the way in names (`admit_way`); its socket does not
                       steer packets here (`admit_options`, asked again of the state); nothing was touched
    once it is found   some rule allows it into a program that could get it, and has room (`admit`)
    once it is known   the same of the program that has accepted, before anything is said to it (Ground.admit)
    before an address  moves here: the rule that let the pass in says that it may (`admit_address`)
    before the commit  the same once more: a process may have executed another program, or changed its user

Which rule let a pass in, and for which key, stands in the pass's journal: a key may ask about its own passes and no
others, whichever serve began them. The other side learns that it was denied; why, only the audit tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from . import graft, policy
from . import journal as journals
from .audit import Audit
from .core.endpoint import Flow, IPAddress
from .core.errors import JournalError, Refused, TcpcpError
from .core.options import STEERING, OptionValue
from .core.policy import DEFAULT_AUDIT, NO_PORT, Rule, Taker, check_name
from .core.tcp import TcpState
from .journal import Journal, structure_lock
from .kernel import sockdiag

ADMITTED = "admitted"
_DENIED, _HINT = "the policy of the destination does not allow this", "its administrator finds the reason in the audit"


class Denied(Refused):
    """By the policy. `why` is for the audit alone."""

    def __init__(self, why: str) -> None:
        super().__init__(_DENIED, hint=_HINT)
        self.why = why


class Door:
    """For one key, as long as its serve runs. A policy that changes is that of the next one."""

    def __init__(self, path: str, key: str) -> None:
        """Refused where the policy cannot be used."""
        self.key = check_name("--key", key)
        self._policy = policy.read(path)
        self._audit = Audit(self._policy.audit)

    def greet(self) -> None:
        """Denied to a key that may do nothing here."""
        if not self._policy.knows(self.key):
            why = f"no rule names the key {self.key}"
            self._audit.tell("denied", key=self.key, reason=why)
            raise Denied(why)

    def entry(self, record: Journal, flow: Flow, into: str) -> Entry:
        return Entry(self, record, flow, into)

    def check_own(self, record: Journal) -> None:
        """Denied of a pass that another key began, or nobody behind a door. Of one that nobody knows, there is nothing
        to hide."""
        admitted = record.field(ADMITTED)
        if record.exists() and (admitted is None or admitted["key"] != self.key):
            self.tell("denied", record.pass_id, reason="it asks about a pass that is not its own")
            raise Denied("the pass is not its own")

    def check_flow(self, record: Journal, flow: Flow) -> None:
        """Denied where this is not the connection of a pass of its own, and none that it might pass."""
        self.check_own(record)
        staged = record.field("staged")
        if staged is not None and staged["flow"] == flow.to_json():
            return
        if not self._policy.allowing(self.key, flow, [Taker()]):
            self.tell("denied", record.pass_id, flow=str(flow), reason="it asks about a connection of others")
            raise Denied("the connection is not its own")

    def tell(self, verdict: str, pass_id: str, **facts: str) -> None:
        self._audit.tell(verdict, **{"pass": pass_id, "key": self.key, **facts})

    def allowing(self, flow: Flow, takers: list[Taker]) -> list[Rule]:
        """Denied where there is none."""
        found = self._policy.allowing(self.key, flow, takers)
        if not found:
            raise Denied(self._policy.why_denied(self.key, flow, takers))
        return found


def open_door(path: str, key: str) -> Door:
    """For a client, which is not to read in the policy: where that cannot be used, the log has the reason."""
    try:
        return Door(path, key)
    except Refused as error:
        with contextlib.suppress(Refused):  # nothing is let in
            Audit(DEFAULT_AUDIT).tell("unusable", key=key, reason=str(error))
        raise Refused("the policy of the destination cannot be used", hint="its log has the reason, and `serve "
                      "--policy FILE --key NAME` there, at a terminal") from None


class Entry:
    """One pass at the door. `into`: the way in that the origin named."""

    def __init__(self, door: Door, record: Journal, flow: Flow, into: str) -> None:
        self._door, self._record, self._flow, self._into = door, record, flow, into
        admitted = record.field(ADMITTED)
        self._rule: str | None = admitted["rule"] if admitted is not None else None

    def admit_way(self) -> None:
        """Before anything is looked for: a key that may not pass into a process is told nothing of it."""
        graft.check_name(self._into)
        self._door.allowing(self._flow, [_named(self._into, self._flow)])

    def admit_options(self, options: Mapping[str, OptionValue]) -> None:
        """Denied where the socket would come with what is its host's to say, whatever the policy allows."""
        found = sorted(name for name in STEERING if options.get(name))
        if found:
            raise Denied(f"the socket has {' and '.join(found)}, by which it would choose among this host's rules and "
                         "routes")

    def admit(self, takers: list[Taker]) -> None:
        """Denied unless a rule allows one of these programs, and has room for one connection more."""
        fitting = self._door.allowing(self._flow, takers)
        if self._rule in [rule.name for rule in fitting]:
            return
        with structure_lock():
            free = next((rule for rule in fitting if _taken(rule, self._record) < rule.limit), None)
            if free is None:
                raise Denied(f"rule {fitting[0].name} allows {fitting[0].limit} connections at once, and has them")
            self._record.write(ADMITTED, key=self._door.key, rule=free.name)
        self._rule = free.name

    def admit_address(self, address: IPAddress, now: bool) -> None:
        """Denied unless the rule that let the pass in lets the connection's local address come along. Refused where it
        comes `now` and the audit cannot be written."""
        fitting = self._door.allowing(self._flow, [Taker()])
        if not any(rule.name == self._rule and rule.lets_move(address) for rule in fitting):
            denied = Denied(f"rule {self._rule} does not let the address {address} move here (adopts)")
            self.tell_refused(denied)
            raise denied
        if now:
            self._tell("address", address=str(address))

    def confirm(self, takers: list[Taker]) -> None:
        """Within the freeze, where no lock is taken: Denied unless the rule that let the pass in still allows it."""
        if self._rule not in [rule.name for rule in self._door.allowing(self._flow, takers)]:
            raise Denied(f"rule {self._rule}, by which it was admitted, does not allow what the program is now")

    def tell_accepted(self, program: str, takers: list[Taker]) -> None:
        """Refused where the audit cannot be written: then nothing is let in."""
        users = {str(user) for one in takers for user in one.users or ()}
        self._tell("accepted", program=program, user=",".join(sorted(users)),
                   executable=",".join(one.executable or "" for one in takers))

    def tell_refused(self, error: TcpcpError) -> None:
        with contextlib.suppress(Refused):  # there is nothing to hold back any more
            self._tell("denied" if isinstance(error, Denied) else "refused", reason=_reason(error))

    def tell_ended(self, how: str, program: str, error: TcpcpError | None) -> None:
        with contextlib.suppress(Refused):  # it was let in with a line, and has ended
            self._tell(how, program=program, reason=_reason(error) if error is not None else "")

    def _tell(self, verdict: str, **facts: str) -> None:
        self._door.tell(verdict, self._record.pass_id, flow=str(self._flow), way=self._into, rule=self._rule or "",
                        **facts)


def _reason(error: TcpcpError) -> str:
    return error.why if isinstance(error, Denied) else error.message


def _named(into: str, flow: Flow) -> Taker:
    """What is known of the program by the name of the way in alone."""
    kind, _, rest = into.partition(":")
    if kind in ("pid", "accept"):
        return graft.taker_of(int(rest.partition(":")[0]), None if kind == "accept" else NO_PORT)
    if kind == "listen":
        return Taker(port=int(rest))
    return Taker(port=NO_PORT if rest else flow.local.port)


def _taken(rule: Rule, but: Journal) -> int:
    """How many connections this rule has let in that are alive here, or about to be."""
    let_in = (_let_in(one, rule) for one in journals.all_journals() if one.directory != but.directory)
    return len({flow for flow in let_in if flow is not None})


def _let_in(record: Journal, rule: Rule) -> Flow | None:
    with contextlib.suppress(JournalError):  # it has gone meanwhile
        admitted, claimed = record.field(ADMITTED), record.field("claimed")
        if admitted is None or claimed is None or admitted["rule"] != rule.name:
            return None
        flow = Flow.from_json(claimed["flow"])
        with record.locked(wait=False) as is_idle:
            if not is_idle or sockdiag.state_of(flow) not in (None, TcpState.TIME_WAIT):
                return flow
    return None
