"""Every ticket's state, as a fold over the journal: `apply` is the only way it changes.

     issue ──▶ open ──▶ admit ──▶ buffered ──▶ step ──▶ trained | dropped: zero_variance | stale |
                 │                                                          suspect_label | …
                 └──▶ drop: failed | surplus          (eval: admit ──▶ evaluated, score: ──▶ scored)
                          (propose: admit ──▶ buffered ──▶ ready ──▶ step)

At every instant, for every kind: issued = trained + evaluated + dropped (by reason) + buffered + in
flight. Who holds which ticket just now is not here (leases.py): that may be forgotten, this may
not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from common import wire
from common.codec import Codec
from common.errors import JournalError
from common.journal import Position
from common.records import (
    Admit,
    AnyRecord,
    ConfigChange,
    Drop,
    Finish,
    Halt,
    Issue,
    Open,
    Ready,
    Step,
)
from common.wire import Group, Ticket
from learner.evaluation import Evaluation
from learner.fold import Fold, Sums
from learner.follow import Follower
from learner.item import Item

TERMINAL = {
    "main": "trained",
    "aux": "trained",
    "eval": "evaluated",
    "propose": "trained",
    "score": "scored",
}


@dataclass(slots=True)
class Entry:
    """An open ticket. `order` is its place among the groups that came in, -1 before it has one: a
    propose group comes in with its scores, which are known later than the group.
    """

    ticket: Ticket
    issued_at: Position
    group: Group | None = None
    order: int = -1
    oldest: int = -1  # version of the group's oldest token
    scores: tuple[float, ...] = ()
    verdict: tuple[object, str] | None = None  # inbox.py's memory of (config, defect)

    def admit(self, group: Group, order: int) -> None:
        self.group, self.order = group, order
        versions = [v for r in group.rollouts for s in r.segments for _, v in s.spans]
        self.oldest = min(versions, default=0)

    @property
    def item(self) -> Item:
        assert self.group is not None, f"ticket {self.ticket.id} has no group yet"
        return Item(self.ticket, self.group, self.scores)


@dataclass(slots=True)
class Ledger:
    open: dict[int, Entry] = field(default_factory=dict)
    main: list[int] = field(default_factory=list)  # admitted, not yet consumed, in admission order
    aux: list[int] = field(default_factory=list)
    propose: list[int] = field(default_factory=list)  # ready, not yet consumed, as they became it
    again: list[Ticket] = field(default_factory=list)  # dropped as stale: their prompts come first
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    t: int = 0  # steps done
    cursor: int = 0  # next position of the prompt stream
    next_id: int = 0
    finished: str = ""
    halted: int | None = None  # first step that trains on nothing of the synthesis pool's
    learner_config: dict[str, Any] | None = None  # as the journal last said
    followers: dict[str, Follower] = field(default_factory=dict)
    flying: Counter[str] = field(default_factory=Counter)  # tickets of each kind in flight
    _low: int = 0  # every id below is closed
    _closed: set[int] = field(default_factory=set)  # closed ids from _low on
    _admitted: int = 0
    _sums: dict[str, Sums] = field(default_factory=dict)
    _codec: Codec = field(default_factory=lambda: Codec(wire.FromActor))
    _tickets: Codec = field(default_factory=lambda: Codec(Ticket))

    def apply(self, record: AnyRecord, at: Position, group: Group | None = None) -> None:
        """Fold one record in. `group` is the decoded frame of an Admit, where the caller has it
        already.
        """
        entry: Entry | None = None
        match record:
            case Issue(ticket=ticket):
                self._issue(ticket, at)
                entry = self.open[ticket.id]
            case Admit(ticket=id_, frame=frame):
                entry = self._admit(id_, group or self._codec.decode(frame))
            case Ready(ticket=id_, scores=scores):
                self._ready(id_, scores)
            case Step(t=t, consumed=consumed, dropped=dropped):
                self._step(t, consumed, dropped)
            case Drop(ticket=id_, reason=reason):
                self._close(id_, reason)
                self._leave({id_})
            case Finish(reason=reason):
                self.finished = reason
            case Halt(t=t) if t is not None:
                self.halted = t if self.halted is None else min(t, self.halted)
            case Open(config=config):
                self.learner_config = self.learner_config or config.get("learner")
                self.finished = ""
            case ConfigChange(overrides=overrides):
                self.learner_config = overrides.get("learner", self.learner_config)
        for follower in self.followers.values():
            follower.follow(record, entry)

    def is_closed(self, id_: int) -> bool:
        return id_ < self._low or id_ in self._closed

    def in_flight(self) -> Iterator[Entry]:
        return (entry for entry in self.open.values() if entry.group is None)

    def buffered(self, kind: str, first: int = 0) -> list[Entry]:
        """In admission order, from the `first` on."""
        ids = {"main": self.main, "aux": self.aux, "propose": self.propose}[kind]
        return [self.open[id_] for id_ in ids[first:]]

    def sums(self) -> dict[str, Sums]:
        """A conservation line for every kind seen; buffered and in flight are counted, not
        derived.
        """
        for sums in self._sums.values():
            sums.buffered = sums.in_flight = 0
        for entry in self.open.values():
            sums = self._sums[entry.ticket.kind]
            if entry.group is None:
                sums.in_flight += 1
            else:
                sums.buffered += 1
        return self._sums

    # ---- the fold, saved and restored ------------------------------------------------------------

    def dump(self, end: Position) -> bytes:
        oldest = min((e.issued_at for e in self.open.values()), default=end)
        fold = Fold(
            end=(end.segment, end.offset),
            oldest=(oldest.segment, oldest.offset),
            next_id=self.next_id,
            low=self._low,
            closed=sorted(self._closed),
            sums=self._sums,
            t=self.t,
            cursor=self.cursor,
            admitted=self._admitted,
            main=self.main,
            aux=self.aux,
            propose=self.propose,
            again=[ticket.id for ticket in self.again],
            again_frames=[bytes(self._tickets.encode(ticket)) for ticket in self.again],
            open=[(id_, entry.order) for id_, entry in self.open.items()],
            evaluations=self.evaluations,
            learner_config=self.learner_config,
            finished=self.finished,
            halted=self.halted,
            followers={name: each.dump() for name, each in self.followers.items()},
        )
        return msgspec.msgpack.encode(fold)

    @staticmethod
    def peek(data: bytes) -> Fold:
        """Raises JournalError when `data` is no fold."""
        try:
            return msgspec.msgpack.decode(data, type=Fold)
        except msgspec.MsgspecError as error:
            raise JournalError(f"the checkpoint's fold is damaged: {error}") from None

    @classmethod
    def restore(
        cls,
        fold: Fold,
        records: Iterable[tuple[Position, AnyRecord]],
        followers: dict[str, Follower],
    ) -> Ledger:
        """The ledger of a checkpoint. `records` are those from the fold's `oldest` up to its
        `end`.
        """
        orders = dict(fold.open)
        codec = Codec(Ticket)
        self = cls(
            main=fold.main,
            aux=fold.aux,
            propose=fold.propose,
            again=[codec.decode(frame) for frame in fold.again_frames],
            evaluations=fold.evaluations,
            t=fold.t,
            cursor=fold.cursor,
            next_id=fold.next_id,
            finished=fold.finished,
            halted=fold.halted,
            learner_config=fold.learner_config,
            followers=followers,
            _low=fold.low,
            _closed=set(fold.closed),
            _admitted=fold.admitted,
            _sums=fold.sums,
        )
        for name, follower in followers.items():
            if name in fold.followers:
                follower.restore(fold.followers[name])
        for at, record in records:
            if isinstance(record, Issue) and record.ticket.id in orders:
                self.open[record.ticket.id] = Entry(record.ticket, at)
            elif isinstance(record, Admit) and record.ticket in self.open:
                entry = self.open[record.ticket]
                entry.admit(self._codec.decode(record.frame), orders[record.ticket])
            elif isinstance(record, Ready) and record.ticket in self.open:
                self.open[record.ticket].scores = record.scores
        self.flying.update(entry.ticket.kind for entry in self.in_flight())
        missing = [
            i
            for i, order in fold.open
            if i not in self.open or (order >= 0) != (self.open[i].order >= 0)
        ]
        if missing:
            raise JournalError(
                f"the journal lacks tickets {missing[:5]} of the checkpoint of step {fold.t}"
            )
        return self

    # ---- transitions -----------------------------------------------------------------------------

    def _issue(self, ticket: Ticket, at: Position) -> None:
        if ticket.id in self.open or self.is_closed(ticket.id):
            raise JournalError(f"ticket {ticket.id} is issued twice (at {at})")
        self.open[ticket.id] = Entry(ticket, at)
        self.flying[ticket.kind] += 1
        self.next_id = max(self.next_id, ticket.id + 1)
        self.cursor = max(self.cursor, ticket.cursor + 1)
        if ticket.kind == "main" and ticket.parent is not None:
            same = (ticket.parent, ticket.problem)  # not one that was made from it
            self.again = [old for old in self.again if (old.id, old.problem) != same]
        self._sums.setdefault(ticket.kind, Sums()).issued += 1
        if ticket.kind == "eval":
            self.evaluations.setdefault(ticket.label, Evaluation()).issued.append(ticket.problem)

    def _admit(self, id_: int, group: Group) -> Entry:
        entry = self.open.get(id_)
        if entry is None or entry.group is not None:
            raise JournalError(f"ticket {id_} is admitted twice, or was never issued")
        kind = entry.ticket.kind
        entry.admit(group, -1 if kind == "propose" else self._admitted)
        self._admitted += kind != "propose"
        self.flying[kind] -= 1
        if kind == "main":
            self.main.append(id_)
        elif kind == "aux":
            self.aux.append(id_)
        elif kind == "score":
            self._close(id_, "scored")
        elif kind == "eval":
            self.evaluations[entry.ticket.label].add(group)
            self._close(id_, "evaluated")
        return entry

    def _ready(self, id_: int, scores: tuple[float, ...]) -> None:
        entry = self.open.get(id_)
        if entry is None or entry.group is None or entry.scores or entry.ticket.kind != "propose":
            raise JournalError(f"ticket {id_} is ready, but no propose group that waits for it")
        if len(scores) != len(entry.group.rollouts):
            raise JournalError(f"ticket {id_} is ready with {len(scores)} scores")
        entry.scores, entry.order = scores, self._admitted
        self._admitted += 1
        self.propose.append(id_)

    def _step(
        self, t: int, consumed: tuple[int, ...], dropped: tuple[tuple[int, str], ...]
    ) -> None:
        if t != self.t:
            raise JournalError(f"step {t} is recorded where step {self.t} was due")
        for id_, reason in dropped:
            if reason == "stale" and self.open[id_].ticket.kind == "main":
                self.again.append(self.open[id_].ticket)
            self._close(id_, reason)
        for id_ in consumed:
            self._close(id_, TERMINAL[self.open[id_].ticket.kind])
        self._leave({*consumed, *(id_ for id_, _ in dropped)})
        if "after" in self.evaluations and self.evaluations["after"].is_answered:
            point = self.evaluations.pop("after")  # the run goes on: that was not its end
            self.evaluations.setdefault(f"step-{t}", point)
        self.t = t + 1

    def _leave(self, gone: set[int]) -> None:
        self.main = [id_ for id_ in self.main if id_ not in gone]
        self.aux = [id_ for id_ in self.aux if id_ not in gone]
        self.propose = [id_ for id_ in self.propose if id_ not in gone]

    def _close(self, id_: int, fate: str) -> None:
        entry = self.open.pop(id_, None)
        if entry is None:
            raise JournalError(f"ticket {id_} ends as {fate!r} but is not open")
        if entry.group is None:
            self.flying[entry.ticket.kind] -= 1
        sums = self._sums[entry.ticket.kind]
        if fate in ("trained", "evaluated", "scored"):
            setattr(sums, fate, getattr(sums, fate) + 1)
        else:
            sums.dropped = dict(Counter(sums.dropped) + Counter({fate: 1}))
            if entry.ticket.kind == "eval":
                self.evaluations[entry.ticket.label].failed += 1
        self._closed.add(id_)
        while self._low in self._closed:
            self._closed.discard(self._low)
            self._low += 1
