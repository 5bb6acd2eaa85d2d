"""An independent check of a run: did it keep its promises? Reads the journal and the checkpoints,
nothing else.

It shares with the learner the bytes of the journal and the meaning of its records, and no code
that decides anything: conservation, the batch rule, lags and digests are worked out here a second
time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.audit_checkpoints import check_checkpoints
from common.audit_found import Audit, KindSums
from common.audit_rule import Facts, allowed_lag, batch, facts_of
from common.codec import Codec
from common.episodes import PLAIN
from common.errors import JournalError, WireError
from common.journal import Position, read
from common.proposals import Proposals, is_made
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
from common.wire import FromActor, Group, Ticket

FATES = {
    *("zero_variance", "stale", "invalid", "verifier_error", "truncated", "failed", "surplus"),
    "suspect_label",
}
TRAINABLE = ("main", "aux", "propose")


def audit(run_folder: Path) -> Audit:
    """Check a run, finished or not. What is wrong with it is a violation, never an exception."""
    auditor = _Auditor()
    try:
        for at, record in read(run_folder / "journal"):
            auditor.take(at, record)
    except JournalError as error:
        auditor.violations.append(f"journal: {error}")
    checked, faults = check_checkpoints(
        run_folder / "checkpoints", auditor.digests, auditor.weights_dtype
    )
    auditor.violations += faults
    return auditor.result(checked)


@dataclass(slots=True)
class _Life:
    """What is known of one ticket. `fate`: "in_flight", "buffered", or how it ended."""

    kind: str
    n: int
    fate: str = "in_flight"
    step: int = -1  # that trained on it
    facts: Facts | None = None
    ready: bool = False
    gamma: float = 1.0  # of its episodes
    made: bool = False  # it asks a proposed problem, or for proposals


@dataclass(slots=True)
class _Auditor:
    """A fold over the journal that believes nothing."""

    violations: list[str] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)  # version -> digest of its step record
    weights_dtype: str = ""  # of published versions; "" while no record says it
    _lives: dict[int, _Life] = field(default_factory=dict)
    _buffer: list[int] = field(default_factory=list)  # as they came in: proposers when ready
    _proposals: Proposals = field(default_factory=Proposals)
    _config: dict[str, Any] = field(default_factory=dict)
    _run: str = ""
    _incarnation: int = 0
    _incarnations: int = 0
    _t: int = 0
    _pruned: bool = False
    _last: Position | None = None
    _finished: str = ""
    _halted: int | None = None  # first step that may train on nothing that was proposed
    _lags: Counter[int] = field(default_factory=Counter)
    _codec: Codec = field(default_factory=lambda: Codec(FromActor, 1 << 30))

    def take(self, at: Position, record: AnyRecord) -> None:
        if self._last is None:
            first = isinstance(record, Open) and (record.sealed is None or record.sealed[1] == 0)
            self._pruned = not first
        match record:
            case Open():
                self._open(record)
            case Issue(ticket=ticket):
                self._issue(ticket)
            case Admit(ticket=id_, frame=frame):
                self._admit(id_, frame)
            case Ready(ticket=id_, scores=scores):
                self._ready(id_, len(scores))
            case Step():
                self._step(record)
            case Drop(ticket=id_, reason=reason):
                self._end(id_, reason, "is dropped")
            case Halt(t=t) if t is not None:
                self._halt(t)
            case ConfigChange(overrides=overrides):
                self._config |= overrides.get("learner", {})
            case Finish(t=t, reason=reason):
                self._finished = reason
                self._expect(t == self._t, f"the run finished at step {t}, after {self._t} steps")
        faults = self._proposals.take(record)
        self.violations += [] if self._pruned else faults
        self._last = at

    def result(self, checkpoints: int) -> Audit:
        sums: dict[str, KindSums] = {}
        for life in self._lives.values():
            line = sums.setdefault(life.kind, KindSums())
            line.issued += 1
            if life.fate in ("trained", "evaluated", "scored", "buffered", "in_flight"):
                setattr(line, life.fate, getattr(line, life.fate) + 1)
            else:
                line.dropped = dict(Counter(line.dropped) + Counter({life.fate: 1}))
        for kind, line in sums.items():
            self._expect(
                line.conserved, f"{kind}: issued {line.issued} is not the sum of the fates"
            )
        count = sum(self._lags.values())
        return Audit(
            run=self._run,
            ok=not self.violations,
            violations=self.violations,
            complete=not self._pruned,
            sums=sums,
            steps=self._t,
            incarnations=self._incarnations,
            checkpoints=checkpoints,
            max_lag=int(self._config.get("max_lag", 0)),
            lag_max=max(self._lags, default=0),
            lag_mean=sum(lag * k for lag, k in self._lags.items()) / count if count else 0.0,
            finished=self._finished,
        )

    def _open(self, record: Open) -> None:
        name = f"incarnation {record.incarnation}"
        self._expect(
            record.incarnation > self._incarnation, f"{name} opened after {self._incarnation}"
        )
        self._expect(not self._run or record.run == self._run, f"{name} is of run {record.run}")
        if self._last is not None:
            sealed = record.sealed
            fits = (
                sealed is not None
                and sealed[0] == self._last.segment
                and sealed[1] > self._last.offset
            )
            self._expect(fits, f"{name} sealed {sealed}; the last record is at {tuple(self._last)}")
        self._run, self._incarnation = record.run, record.incarnation
        self._incarnations += 1
        self._finished = ""
        self._config = self._config or dict(record.config.get("learner", {}))
        self.weights_dtype = record.config.get("run", {}).get("weights_dtype", "fp32")

    def _issue(self, ticket: Ticket) -> None:
        if ticket.id in self._lives:
            self.violations.append(f"ticket {ticket.id} is issued twice")
            return
        gamma, made = (ticket.episode or PLAIN).gamma, is_made(ticket.problem)
        self._lives[ticket.id] = _Life(ticket.kind, ticket.n, gamma=gamma, made=made)

    def _admit(self, id_: int, frame: bytes) -> None:
        life = self._known(id_, "is admitted")
        if life is None:
            return
        if life.fate != "in_flight":
            self.violations.append(f"ticket {id_} is admitted although it is {life.fate}")
            return
        try:
            group = self._codec.decode(frame)
        except WireError as error:
            self.violations.append(f"ticket {id_}: the admitted group is unreadable ({error})")
            return
        if not isinstance(group, Group) or (group.ticket, group.kind) != (id_, life.kind):
            self.violations.append(f"ticket {id_}: what was admitted is not its group")
            return
        n, spans = len(group.rollouts), [[s.spans for s in r.segments] for r in group.rollouts]
        if n != life.n or not all(lists and all(lists) for lists in spans):
            self.violations.append(
                f"ticket {id_}: {n} rollouts, some empty, where {life.n} were due"
            )
            return
        self._expect_versions(id_, group)
        life.facts = facts_of(group, life.gamma, life.made)
        life.fate = {"eval": "evaluated", "score": "scored"}.get(life.kind, "buffered")
        if life.fate == "buffered" and life.kind != "propose":
            self._buffer.append(id_)

    def _ready(self, id_: int, scores: int) -> None:
        life = self._known(id_, "is ready")
        if life is None:
            return
        waits = life.kind == "propose" and life.fate == "buffered" and not life.ready
        self._expect(waits, f"ticket {id_} is ready; it is {life.kind} and {life.fate}")
        self._expect(scores == life.n, f"ticket {id_} is ready with {scores} scores of {life.n}")
        if waits:
            life.ready = True
            self._buffer.append(id_)

    def _halt(self, t: int) -> None:
        due = self._pruned or t in (self._t, self._t + 1)
        self._expect(due, f"a halt holds from step {t} on, said when step {self._t} was due")
        self._halted = t if self._halted is None else min(t, self._halted)

    def _step(self, record: Step) -> None:
        t = record.t
        due = t == self._t or (self._pruned and not self.digests)
        self._expect(due, f"step {t} is recorded where step {self._t} was due")
        self._expect(
            record.version == t + 1, f"step {t} made version {record.version}, not {t + 1}"
        )
        self._expect(record.version not in self.digests, f"step {t} is recorded twice")
        if due and not self._pruned:
            self._check_batch(record)
        for id_, reason in record.dropped:
            self._end(id_, reason, f"is dropped by step {t}")
        for id_ in record.consumed:
            self._train(id_, t)
        self.digests.setdefault(record.version, record.digest)
        self._t = t + 1

    def _train(self, id_: int, t: int) -> None:
        life = self._known(id_, f"is trained by step {t}")
        if life is None:
            return
        name = f"step {t}: ticket {id_}"
        if life.fate == "trained":
            self.violations.append(f"{name} is trained again; step {life.step} trained on it")
        elif life.kind not in TRAINABLE:
            self.violations.append(f"{name} is an {life.kind} ticket, which is never trained on")
        elif life.fate != "buffered" or life.facts is None:
            self.violations.append(f"{name} is trained although it is {life.fate}")
        else:
            self._expect(
                life.kind != "propose" or life.ready, f"{name} is trained before its score is known"
            )
            worst, allowed = life.facts.lag(t), allowed_lag(life.kind, self._config)
            self._expect(worst <= allowed, f"{name} has lag {worst}; max_lag is {allowed}")
            if life.kind != "propose":  # they have a limit of their own
                self._lags.update(max(0, t - version) for version in life.facts.oldest)
            life.fate, life.step = "trained", t
            self._leave(id_)

    def _end(self, id_: int, reason: str, how: str) -> None:
        life = self._known(id_, how)
        if life is None:
            return
        self._expect(reason in FATES, f"ticket {id_} {how} for no known reason ({reason!r})")
        if reason == "suspect_label" and not self._pruned:
            suspect = life.made and self._halted is not None
            self._expect(suspect, f"ticket {id_} {how} as suspect, and no halt made it so")
        if life.fate not in ("in_flight", "buffered"):
            self.violations.append(f"ticket {id_} {how} although it is {life.fate}")
            return
        self._leave(id_)
        life.fate = reason or "dropped"

    def _leave(self, id_: int) -> None:
        if id_ in self._buffer:
            self._buffer.remove(id_)

    def _check_batch(self, record: Step) -> None:
        t = record.t
        consumed = [i for i in record.consumed if self._kind(i) in TRAINABLE]
        buffered = [self._lives[i].facts for i in self._buffer]
        halted = self._halted is not None and t >= self._halted
        expected = batch([facts for facts in buffered if facts], t, self._config, halted)
        if expected is None:
            self.violations.append(f"step {t} was trained before its batch was determined")
            return
        if consumed != expected.tickets:
            self.violations.append(
                f"step {t} trained on {_some(consumed)}; "
                f"the batch rule gives {_some(expected.tickets)}"
            )
        if dict(record.dropped) != expected.dropped:
            odd = sorted(set(record.dropped) ^ set(expected.dropped.items()))
            self.violations.append(
                f"step {t} dropped other tickets than the batch rule: {_some(odd)}"
            )

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.violations.append(otherwise)

    def _expect_versions(self, id_: int, group: Group) -> None:
        newest = max(v for r in group.rollouts for s in r.segments for _, v in s.spans)
        made = self._pruned or newest <= self._t
        self._expect(made, f"ticket {id_} has tokens of version {newest}, which no step had made")

    def _kind(self, id_: int) -> str:
        return self._lives[id_].kind if id_ in self._lives else "main"

    def _known(self, id_: int, how: str) -> _Life | None:
        life = self._lives.get(id_)
        if life is None and not self._pruned:
            self.violations.append(f"ticket {id_} {how} but was never issued")
        return life


def _some(things: list[Any]) -> str:
    if len(things) <= 8:
        return str(things)
    return f"[{', '.join(map(str, things[:8]))}, … {len(things)} in all]"
