"""What became of every proposed problem, as a fold over the journal that believes nothing: what
`isentrope synth` shows and `isentrope audit` checks.

    proposed ─▶ extracted ─▶ labelled ─▶ scored ─▶ active ─▶ expired
        └───────────┴────────────┴──────────┴────▶ rejected

A rollout of a propose ticket is proposed when its group is admitted; every other step is a record
of its own, with its reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from common.records import Admit, AnyRecord, Halt, Issue, Proposal, Step
from common.wire import Ticket

PREFIX = "synthesis"
NEXT = {
    "proposed": ("extracted", "rejected"),
    "extracted": ("labelled", "rejected"),
    "labelled": ("scored", "rejected"),
    "scored": ("active", "rejected"),
    "active": ("expired",),
}


def is_made(problem: str) -> bool:
    """Whether it was proposed, or asks for proposals."""
    return problem.startswith(f"{PREFIX}/")


def name(ticket: int, rollout: int) -> str:
    """The problem that rollout `rollout` of propose ticket `ticket` proposed."""
    return f"{PREFIX}/{ticket}/{rollout}"


@dataclass(slots=True)
class Made:
    """One proposed problem. `step`: steps done when it came to its state; `uses`: main tickets."""

    id: str
    state: str = "proposed"
    reason: str = ""
    step: int = 0
    text: str = ""
    parent: str = ""
    gold: str = ""
    origin: str = ""
    audit: str = ""
    p: float | None = None
    uses: int = 0


@dataclass(slots=True)
class Proposals:
    made: dict[str, Made] = field(default_factory=dict)
    moves: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (from, to, reason)
    halted: str = ""
    _t: int = 0
    _proposing: dict[int, int] = field(default_factory=dict)  # propose ticket -> n

    def take(self, record: AnyRecord) -> list[str]:
        """Fold a record in; what is wrong with it."""
        match record:
            case Issue(ticket=ticket):
                return self._issue(ticket)
            case Admit(ticket=id_) if id_ in self._proposing:
                for rollout in range(self._proposing.pop(id_)):
                    key = name(id_, rollout)
                    self.made[key] = Made(key, step=self._t)
            case Proposal():
                return self._move(record)
            case Halt(reason=reason):
                self.halted = reason
            case Step(t=t):
                self._t = t + 1
        return []

    def label_error(self) -> float | None:
        """Share of the audited labels that were found wrong."""
        found = [made.audit for made in self.made.values() if made.audit]
        return found.count("wrong") / len(found) if found else None

    def _issue(self, ticket: Ticket) -> list[str]:
        if ticket.kind == "propose":
            self._proposing[ticket.id] = ticket.n
        if not ticket.problem.startswith(f"{PREFIX}/") or ticket.kind not in ("main", "score"):
            return []
        made = self.made.get(ticket.problem)
        if made is None:
            return [f"ticket {ticket.id} asks {ticket.problem}, which was never proposed"]
        if ticket.kind == "score":
            return []
        if not made.id.startswith(f"{PREFIX}/{ticket.parent}/"):
            return []  # asked again, after it became stale
        made.uses += 1
        faults = []
        if made.state != "active":
            faults.append(f"ticket {ticket.id} asks {made.id}, which is {made.state}")
        if ticket.grading.gold != made.gold:
            faults.append(f"ticket {ticket.id} asks {made.id} with another answer than its label")
        return faults

    def _move(self, record: Proposal) -> list[str]:
        made = self.made.get(name(record.ticket, record.rollout))
        if made is None:
            return [f"{name(record.ticket, record.rollout)} is {record.state}, never proposed"]
        faults = []
        if record.state not in NEXT.get(made.state, ()):
            faults.append(f"{made.id} went from {made.state} to {record.state}")
        if record.state in ("rejected", "expired") and not record.reason:
            faults.append(f"{made.id} is {record.state} for no reason")
        self.moves[made.state, record.state, record.reason] += 1
        made.state, made.reason, made.step = record.state, record.reason, self._t
        for field_ in ("text", "parent", "gold", "origin", "audit"):
            setattr(made, field_, getattr(record, field_) or getattr(made, field_))
        made.p = made.p if record.p is None else record.p
        return faults
