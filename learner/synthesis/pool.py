"""The pool of proposed problems, as a fold over the journal: who may be a parent, what is being
proposed, what was made of it, what may be asked.

It decides nothing: server.py reads it and writes records, and only these change it. So it is the
same after a restart, whatever the proposer, a labeller or a machine did in between.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from common.errors import JournalError
from common.proposals import PREFIX, name
from common.records import Admit, AnyRecord, Drop, Halt, Issue, Proposal, Ready, Step
from common.wire import Group, Rollout, Ticket
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.reward import diversity, in_band, smoothed

if TYPE_CHECKING:
    from learner.ledger import Entry

SETTLED = ("active", "rejected", "expired")
OF = f"{PREFIX}/of/"  # what the problem of a propose ticket begins with; then its parent


class Seed(msgspec.Struct, kw_only=True):
    """A problem that others may be made from: it was solved sometimes."""

    ticket: int
    problem: str
    text: str
    gold: str
    source: str
    p: float
    response: list[int]  # tokens of its shortest right response
    columns: dict[str, Any] = {}


class Asked(msgspec.Struct, kw_only=True):
    """An open propose ticket, and the problem that it wants others made from."""

    n: int
    parent: str
    text: str
    gold: str
    source: str
    depth: int
    columns: dict[str, Any] = {}
    admitted: bool = False


class Made(msgspec.Struct, kw_only=True):
    """A proposed problem. `found`: what its score ticket found, until a record says so."""

    ticket: int
    rollout: int
    state: str = "proposed"
    reason: str = ""
    text: str = ""
    gold: str = ""
    origin: str = ""  # the stage that the label is of
    source: str = ""
    parent: str = ""
    depth: int = 1
    columns: dict[str, Any] = {}  # the parent's, where its label is inherited
    p: float | None = None
    found: float | None = None
    answers: list[list[int]] = []  # tokens of the responses, where a label is made of them
    score: int = -1  # its score ticket
    lost: str = ""  # why that found nothing, or nothing is to be found: its label is wrong
    born: int = 0  # step at which it became active
    uses: int = 0

    @property
    def id(self) -> str:
        return name(self.ticket, self.rollout)


class State(msgspec.Struct, kw_only=True):
    t: int = 0
    halted: str = ""
    seeds: list[Seed] = []
    asked: dict[int, Asked] = {}
    made: dict[str, Made] = {}
    taken: dict[str, tuple[int, str]] = {}  # (depth, source) of what the pool took lately
    baselines: dict[str, float] = {}  # mean diversity of proposals, by source
    fresh: int = 0  # main tickets that asked a problem for the first time …
    mixed: int = 0  # … and those of them that asked one of the pool's
    proposing: int = 0  # propose tickets so far
    last: int = 0  # step of the newest of them
    barren: int = 0  # of them in a row, until today, that brought nothing
    proposals: int = 0
    accepted: int = 0
    scored: int = 0
    sum_p: float = 0.0
    audited: int = 0
    wrong: int = 0


class Pool:
    """A Follower (learner/follow.py)."""

    def __init__(self, config: SynthesisConfig) -> None:
        self.config = config
        self.state = State()
        self.changes = 0  # records that mattered so far, in this process

    def follow(self, record: AnyRecord, entry: Entry | None) -> None:
        self.changes += 1
        match record:
            case Issue(ticket=ticket):
                self._issue(ticket)
            case Admit():
                assert entry is not None, "an admission comes with its ticket"
                self._admit(entry.ticket, entry.item.group)
            case Proposal():
                self._move(record)
            case Ready(ticket=id_):
                self._end(id_)
            case Drop(ticket=id_, reason=reason):
                self._drop(id_, reason)
            case Halt(reason=reason):
                self.state.halted = reason
            case Step(t=t):
                self.state.t = t + 1

    def dump(self) -> bytes:
        return msgspec.msgpack.encode(self.state)

    def restore(self, data: bytes) -> None:
        try:
            self.state = msgspec.msgpack.decode(data, type=State)
        except msgspec.MsgspecError as error:
            raise JournalError(f"the checkpoint's pool of problems is damaged: {error}") from None

    # ---- what may be read --------------------------------------------------------------------

    def active(self) -> list[Made]:
        """What may be asked, by age."""
        config, t = self.config, self.state.t
        return [
            m for m in self.state.made.values() if m.state == "active" and not worn(m, t, config)
        ]

    def of(self, ticket: int) -> list[Made]:
        """What rollouts of a propose ticket became, in their order."""
        return [made for made in self.state.made.values() if made.ticket == ticket]

    def label_error(self) -> float | None:
        """Share of the audited labels that were wrong."""
        return self.state.wrong / self.state.audited if self.state.audited else None

    # ---- the fold ----------------------------------------------------------------------------

    def _issue(self, ticket: Ticket) -> None:
        state = self.state
        made = state.made.get(ticket.problem)
        if ticket.kind == "main" and is_fresh(ticket):
            state.fresh += 1
            if ticket.problem.startswith(f"{PREFIX}/"):
                state.mixed += 1
                if made is not None:
                    made.uses += 1
        elif ticket.kind == "score" and made is not None:
            made.score = ticket.id
        elif ticket.kind == "propose":
            state.seeds = [seed for seed in state.seeds if seed.ticket != ticket.parent]
            state.asked[ticket.id] = self._asked(ticket)
            state.proposing, state.last = state.proposing + 1, state.t

    def _admit(self, ticket: Ticket, group: Group) -> None:
        if ticket.kind == "main":
            self._consider(ticket, group)
        elif ticket.kind == "propose":
            asked = self.state.asked.get(ticket.id)
            if asked is None:
                return  # issued before synthesis was off for a while: server.py rejects it
            asked.admitted = True
            self.state.proposals += asked.n
            for rollout in range(asked.n):
                self._propose(ticket.id, rollout, asked)
        elif ticket.kind == "score":
            self._score(ticket, group)

    def _asked(self, ticket: Ticket) -> Asked:
        parent = ticket.problem.removeprefix(OF)
        depth = self._depth(parent)
        return Asked(
            n=ticket.n,
            parent=parent,
            text=ticket.question,
            gold=ticket.grading.gold,
            source=ticket.source,
            depth=self.config.depth if depth is None else depth,
            columns=ticket.grading.columns,
        )

    def _propose(self, ticket: int, rollout: int, asked: Asked) -> None:
        made = Made(
            ticket=ticket,
            rollout=rollout,
            source=asked.source,
            parent=asked.parent,
            depth=asked.depth,
            columns=asked.columns if self.config.label == "inherited" else {},
        )
        self.state.made[made.id] = made

    def _consider(self, ticket: Ticket, group: Group) -> None:
        """A group whose answers are sometimes right makes its problem a parent.

        Where feedback gave an answer further turns, p and what is right are those of the last one,
        and so is the response.
        """
        right = [rollout for rollout in group.rollouts if rollout.correct >= 1.0]
        p = math.fsum(rollout.correct for rollout in group.rollouts) / len(group.rollouts)
        depth = self._depth(ticket.problem)
        usable = ticket.question and right and not any(r.error for r in group.rollouts)
        if not usable or depth is None or not in_band(p, self.config.parents):
            return
        best = min(right, key=lambda rollout: rollout.length)
        seed = Seed(
            ticket=ticket.id,
            problem=ticket.problem,
            text=ticket.question,
            gold=ticket.grading.gold,
            source=self._source(ticket),
            p=p,
            response=_last_said(best),
            columns=ticket.grading.columns,
        )
        seeds = [old for old in self.state.seeds if old.problem != seed.problem]
        self.state.seeds = [*seeds, seed][-self.config.seeds :]

    def _source(self, ticket: Ticket) -> str:
        """The one that a problem comes from in the end."""
        return self.state.taken.get(ticket.problem, (0, ticket.source))[1]

    def _depth(self, problem: str) -> int | None:
        """How often removed from the source a problem made from this one is; None: too often."""
        if not problem.startswith(f"{PREFIX}/"):
            return 1
        depth = self.state.taken.get(problem, (self.config.depth, ""))[0]
        return depth + 1 if depth < self.config.depth else None

    def _score(self, ticket: Ticket, group: Group) -> None:
        made = self.state.made.get(ticket.problem)
        if made is None or made.state in SETTLED:
            return
        graded = [rollout for rollout in group.rollouts if not rollout.error]
        if self.config.label == "consensus":
            made.answers = [
                [int(t) for s in rollout.segments if s.role == "policy" for t in s.tokens]
                for rollout in group.rollouts
            ]
        elif 2 * len(graded) < len(group.rollouts):
            made.lost = "verifier_error"
        else:
            made.found = math.fsum(rollout.correct for rollout in graded) / len(graded)

    def _move(self, record: Proposal) -> None:
        state, made = self.state, self.state.made.get(name(record.ticket, record.rollout))
        if made is None:
            return
        made.state, made.reason = record.state, record.reason
        made.text, made.gold = record.text or made.text, record.gold or made.gold
        made.origin = record.origin or made.origin
        if record.state == "labelled" and record.audit:
            state.audited += 1
            state.wrong += record.audit == "wrong"
            made.lost = "wrong label" if record.audit == "wrong" else made.lost
        if record.state == "scored" and record.p is not None:
            made.p, made.answers = record.p, []
            state.scored, state.sum_p = state.scored + 1, state.sum_p + record.p
        if record.state == "active":
            made.born, state.accepted = state.t, state.accepted + 1
            state.taken[made.id] = made.depth, made.source
            if len(state.taken) > 4 * self.config.size:
                del state.taken[next(iter(state.taken))]
        settled = made.state in ("rejected", "expired")
        if settled and made.ticket not in state.asked:
            del state.made[made.id]

    def _drop(self, id_: int, reason: str) -> None:
        if id_ in self.state.asked:
            self._end(id_)
            return
        for made in self.state.made.values():
            if made.score == id_ and made.state not in SETTLED:
                made.lost = reason

    def _end(self, id_: int) -> None:
        """A propose ticket is done with: all that was proposed is settled, or never came."""
        state = self.state
        asked, made = state.asked.pop(id_, None), self.of(id_)
        if asked is None:
            return
        scored = [diversity(each.p) for each in made if each.p is not None]
        before = state.baselines.get(asked.source)
        baseline = smoothed(before, scored, self.config.smoothing)
        if baseline is not None:
            state.baselines[asked.source] = baseline
        taken = any(each.state in ("active", "expired") for each in made)
        state.barren = 0 if taken else state.barren + 1
        for each in made:
            if each.state != "active":
                del state.made[each.id]


def is_fresh(ticket: Ticket) -> bool:
    """Whether its problem is asked for the first time, not again because its group was stale."""
    return ticket.cursor >= 0 or ticket.problem.startswith(f"{PREFIX}/{ticket.parent}/")


def _last_said(rollout: Rollout) -> list[int]:
    """The tokens that the policy sampled in its last turn."""
    own = [s for s in rollout.segments if s.role == "policy"]
    return [int(t) for s in own if s.turn == own[-1].turn for t in s.tokens]


def worn(made: Made, t: int, config: SynthesisConfig) -> str:
    """Why an active problem is not asked any more, "" when it may be."""
    if made.uses >= config.uses:
        return "used"
    return "old" if t - made.born >= config.life else ""
