"""The ledger as a state machine: whatever happens in whatever order, every ticket has one place,
and what was restored from a checkpoint cannot be told from what was not.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec.structs import replace

from common import wire
from common.codec import Codec
from common.errors import JournalError
from common.journal import Position
from common.proposals import PREFIX, is_made
from common.records import (
    Admit,
    AnyRecord,
    ConfigChange,
    Drop,
    Finish,
    Halt,
    Issue,
    Open,
    Proposal,
    Ready,
    Step,
)
from learner.config import LearnerConfig
from learner.inbox import SUSPECT, select
from learner.ledger import TERMINAL, Ledger
from tests.builders import make_group, make_ticket

CODEC = Codec(wire.FromActor)
CONFIG = LearnerConfig(groups_per_step=2, group_size=2, max_lag=1, refill_limit=2, n_aux=1)
KINDS: tuple[wire.Kind, ...] = ("main", "main", "main", "aux", "eval", "propose", "score")
AT_ONCE = ("eval", "score")  # these end when their group comes


class Machine(RuleBasedStateMachine):
    """`places` is an account of its own: where each ticket is."""

    flying = Bundle("flying")
    unready = Bundle("unready")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.records: list[tuple[Position, AnyRecord]] = []
        self.kinds: dict[int, wire.Kind] = {}
        self.places: dict[int, str] = {}
        self.problems: dict[int, str] = {}
        self.halted: int | None = None  # from this step on nothing that was proposed is trained on
        self.lives = 1

    def tell(self, record: AnyRecord) -> None:
        at = Position("000001-000000", len(self.records))
        self.records.append((at, record))
        self.ledger.apply(record, at)

    @initialize()
    def begin(self) -> None:
        assert self.ledger.sums() == {}

    @rule(target=flying, kind=st.sampled_from(KINDS), made=st.booleans())
    def issue(self, kind: wire.Kind, made: bool) -> int:
        """`made`: its problem was proposed."""
        id_ = self.ledger.next_id
        problem = f"{f'{PREFIX}/' if made and kind in ('main', 'score') else 'p'}{id_}"
        self.tell(Issue(ticket=make_ticket(id=id_, kind=kind, problem=problem, label="e")))
        self.kinds[id_], self.places[id_], self.problems[id_] = kind, "in_flight", problem
        return id_

    @precondition(lambda self: bool(self.ledger.again))
    @rule(target=flying)
    def ask_again(self) -> int:
        """The prompt of a group that went stale, once."""
        old, id_ = self.ledger.again[0], self.ledger.next_id
        again = make_ticket(id=id_, kind="main", problem=old.problem, parent=old.id)
        self.tell(Issue(ticket=again))
        assert old.id not in [ticket.id for ticket in self.ledger.again]
        self.kinds[id_], self.places[id_], self.problems[id_] = "main", "in_flight", old.problem
        return id_

    @rule(
        target=unready,
        id_=consumes(flying),
        rewards=st.sampled_from([(1, 0), (1, 1), (0, 0)]),
        late=st.integers(0, 3),
        flaw=st.sampled_from(["", "", "", "verifier_error"]),
    )
    def admit(self, id_: int, rewards: tuple[int, int], late: int, flaw: str) -> int:
        if self.places[id_] != "in_flight":  # it was dropped
            return id_
        kind, version = self.kinds[id_], max(0, self.ledger.t - late)
        of = {"ticket": id_, "kind": kind, "problem": self.problems[id_]}
        group = make_group(rewards, version=version, **of)
        if flaw:
            rollouts = tuple(replace(rollout, error="it hung") for rollout in group.rollouts)
            group = replace(group, rollouts=rollouts)
        self.tell(Admit(ticket=id_, frame=bytes(CODEC.encode(group))))
        self.places[id_] = TERMINAL[kind] if kind in AT_ONCE else "buffered"
        return id_

    @rule(id_=consumes(unready))
    def ready(self, id_: int) -> None:
        record = Ready(ticket=id_, scores=(0.5, 0.0))
        if self.kinds[id_] == "propose" and self.places[id_] == "buffered":
            self.tell(record)
        else:
            self.refused(record)

    @rule(data=st.data(), reason=st.sampled_from(["failed", "surplus"]))
    def drop(self, data: st.DataObject, reason: str) -> None:
        """Also of what came in already, as at the end of a run."""
        still = [id_ for id_, p in self.places.items() if p in ("in_flight", "buffered")]
        if still:
            id_ = data.draw(st.sampled_from(still))
            self.tell(Drop(ticket=id_, reason=reason))
            self.places[id_] = reason

    @precondition(lambda self: select(self.ledger, CONFIG) is not None)
    @rule()
    def step(self) -> None:
        batch = select(self.ledger, CONFIG)
        assert batch is not None
        groups = [item.group for item in batch.items]
        ages = [self.ledger.t - self.ledger.open[g.ticket].oldest for g in groups]
        assert all(age <= CONFIG.max_lag for age in ages)
        main = [id_ for id_ in batch.consumed if self.kinds[id_] == "main"]
        assert len(main) <= CONFIG.groups_per_step
        if self.halted is not None and batch.t >= self.halted:
            assert not [id_ for id_ in main if is_made(self.problems[id_])]
        assert all(reason != SUSPECT or self.halted is not None for _, reason in batch.dropped)
        self.tell(
            Step(
                t=batch.t,
                version=batch.t + 1,
                digest="",
                consumed=batch.consumed,
                dropped=batch.dropped,
            )
        )
        self.places |= dict.fromkeys(batch.consumed, "trained") | dict(batch.dropped)

    @rule(later=st.integers(0, 1))
    def halt(self, later: int) -> None:
        """Nothing is proposed any more, and what was is not trained on; said again, the earliest
        holds."""
        t = self.ledger.t + later
        self.tell(Halt(reason="too many wrong labels", t=t))
        self.halted = t if self.halted is None else min(t, self.halted)
        assert self.ledger.halted == self.halted

    @rule(
        record=st.sampled_from(
            [
                Proposal(ticket=0, rollout=0, state="extracted", text="1+1?", parent="p0"),
                Halt(reason="the pool is off"),
                ConfigChange(t=0, overrides={"learner": {"lr": 1.0}}),
            ]
        )
    )
    def what_is_said_of_no_ticket_moves_none(self, record: AnyRecord) -> None:
        before = dict(self.ledger.open), dict(self.ledger.flying), self.ledger.t
        self.tell(record)
        assert (dict(self.ledger.open), dict(self.ledger.flying), self.ledger.t) == before
        if isinstance(record, ConfigChange):
            assert self.ledger.learner_config == {"lr": 1.0}

    @rule()
    def finish_and_resume(self) -> None:
        """A run that ended goes on with the next life."""
        self.tell(Finish(t=self.ledger.t, reason="solved"))
        assert self.ledger.finished == "solved"
        self.restart()
        assert self.ledger.finished == "solved"
        self.lives += 1
        self.tell(Open(run="r", incarnation=self.lives, config={"learner": {}}))
        assert self.ledger.finished == ""

    @rule(data=st.data())
    def what_ended_does_not_happen_again(self, data: st.DataObject) -> None:
        ended = [id_ for id_, p in self.places.items() if p not in ("in_flight", "buffered")]
        if ended:
            id_ = data.draw(st.sampled_from(ended))
            frame = bytes(CODEC.encode(make_group(ticket=id_)))
            self.refused(Issue(ticket=make_ticket(id=id_)))
            self.refused(Admit(ticket=id_, frame=frame))
            self.refused(Drop(ticket=id_, reason="failed"))

    @rule()
    def restart(self) -> None:
        end = Position("000001-000000", len(self.records))
        data = self.ledger.dump(end)
        fold = Ledger.peek(data)
        restored = Ledger.restore(fold, self.records[fold.oldest[1] :], {})
        assert restored.dump(end) == data
        assert +restored.flying == +self.ledger.flying  # without zeros
        self.ledger = restored

    def refused(self, record: AnyRecord) -> None:
        """It raises, and nothing is changed by it."""
        end = Position("000001-000000", len(self.records))
        before = self.ledger.dump(end)
        with pytest.raises(JournalError):
            self.ledger.apply(record, end)
        assert self.ledger.dump(end) == before

    @invariant()
    def every_ticket_is_in_its_place(self) -> None:
        for kind, sums in self.ledger.sums().items():
            assert sums.holds
            mine = [self.places[id_] for id_, k in self.kinds.items() if k == kind]
            assert sums.issued == len(mine)
            told = msgspec.structs.asdict(sums)
            flat = {**told, **told.pop("dropped")}
            for place in set(mine):
                assert flat[place] == mine.count(place), (kind, place)

    @invariant()
    def an_id_is_open_or_closed(self) -> None:
        for id_, place in self.places.items():
            is_open = place in ("in_flight", "buffered")
            assert (id_ in self.ledger.open) == is_open
            assert self.ledger.is_closed(id_) != is_open


TestLedger = Machine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
