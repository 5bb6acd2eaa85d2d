"""The ledger is a fold: nothing is lost, nothing counts twice, and a restored fold is the same
fold.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from common import wire
from common.codec import Codec
from common.errors import JournalError
from common.journal import Journal, Position, read
from common.records import Admit, AnyRecord, Drop, Issue, Open, Ready, Step
from common.runfolder import RunFolder
from learner.config import LearnerConfig
from learner.course import Course
from learner.follow import Follower
from learner.inbox import select
from learner.ledger import Entry, Ledger
from learner.synthesis.config import SynthesisConfig
from tests.builders import make_group, make_ticket

CODEC = Codec(wire.FromActor)
CONFIG = LearnerConfig(
    groups_per_step=2, group_size=2, max_lag=1, refill_limit=4, synthesis=SynthesisConfig()
)


def issue(id_: int, kind: wire.Kind = "main", **fields: object) -> Issue:
    return Issue(ticket=make_ticket(id=id_, kind=kind, **fields))


def admit(
    id_: int, rewards: tuple[float, ...] = (1, 0), kind: wire.Kind = "main", version: int = 0
) -> Admit:
    return Admit(
        ticket=id_,
        frame=bytes(CODEC.encode(make_group(rewards, ticket=id_, kind=kind, version=version))),
    )


class Book:
    """A ledger beside a list of all that it was told."""

    def __init__(self, **followers: Follower) -> None:
        self.ledger = Ledger(followers=dict(followers))
        self.records: list[tuple[Position, AnyRecord]] = []

    def tell(self, *records: AnyRecord) -> None:
        for record in records:
            at = Position("00000001-00000000", len(self.records))
            self.records.append((at, record))
            self.ledger.apply(record, at)

    def restored(self, **followers: Follower) -> Ledger:
        fold = Ledger.peek(self.ledger.dump(Position("00000001-00000000", len(self.records))))
        first = fold.oldest[1]
        return Ledger.restore(fold, self.records[first:], dict(followers))


def test_every_fate_has_its_place_in_the_conservation_line() -> None:
    book = Book()
    book.tell(
        *(issue(i) for i in range(6)),
        *(admit(i) for i in (0, 1, 3)),
        Drop(ticket=2, reason="failed"),
    )
    book.tell(Step(t=0, version=1, digest="", consumed=(0,), dropped=((1, "zero_variance"),)))
    sums = book.ledger.sums()["main"]
    assert (sums.issued, sums.trained, sums.buffered, sums.in_flight) == (6, 1, 1, 2)
    assert sums.dropped == {"failed": 1, "zero_variance": 1}
    assert sums.holds


def test_a_ticket_is_issued_once_admitted_once_and_ends_once() -> None:
    book = Book()
    book.tell(issue(0), admit(0))
    with pytest.raises(JournalError, match="issued twice"):
        book.tell(issue(0))
    with pytest.raises(JournalError, match="admitted twice"):
        book.tell(admit(0))
    book.tell(Drop(ticket=0, reason="failed"))
    with pytest.raises(JournalError, match="not open"):
        book.tell(Drop(ticket=0, reason="failed"))


def test_an_admission_of_nothing_that_was_issued_is_an_error() -> None:
    with pytest.raises(JournalError, match="never issued"):
        Book().tell(admit(7))


def test_steps_are_recorded_in_order() -> None:
    book = Book()
    with pytest.raises(JournalError, match="step 3"):
        book.tell(Step(t=3, version=4, digest="", consumed=()))


def test_a_stale_group_gives_its_prompt_back_until_it_is_asked_again() -> None:
    book = Book()
    book.tell(issue(0, problem="p"), admit(0))
    book.tell(Step(t=0, version=1, digest="", consumed=(), dropped=((0, "stale"),)))
    assert [old.problem for old in book.ledger.again] == ["p"]
    assert [old.problem for old in book.restored().again] == ["p"]
    book.tell(issue(1, parent=0))
    assert not book.ledger.again


def test_evaluations_end_when_admitted_and_are_never_in_a_batch() -> None:
    book = Book()
    book.tell(issue(0, kind="eval", label="before"), admit(0, (1, 1), kind="eval", version=3))
    point = book.ledger.evaluations["before"]
    assert (point.accuracy, point.oldest, point.newest) == (1.0, 3, 3)
    assert book.ledger.sums()["eval"].evaluated == 1
    assert not book.ledger.open


def test_what_was_evaluated_at_the_end_of_a_run_that_goes_on_is_not_its_end(tmp_path: Path) -> None:
    """Else a longer run would have nothing left to ask at its own end, and tell the old number."""
    book = Book()
    step = {"digest": "", "consumed": (), "dropped": ()}
    book.tell(Step(t=0, version=1, **step), issue(0, kind="eval", label="after"))
    book.tell(admit(0, (1, 1), kind="eval", version=1))
    folder = RunFolder.create(tmp_path / "run")
    ended = Course(folder, msgspec.structs.replace(CONFIG, steps=1), book.ledger)
    assert ended.points["after"][0] == 1
    longer = Course(folder, msgspec.structs.replace(CONFIG, steps=2), book.ledger)
    assert {label: at for label, (at, _) in longer.points.items()} == {"step-1": 1}
    book.tell(issue(1, kind="eval", label="after"), Step(t=1, version=2, **step))
    assert "after" in book.ledger.evaluations, "an answer to it is still to come"
    book.tell(admit(1, (1, 0), kind="eval", version=1), Step(t=2, version=3, **step))
    assert list(book.ledger.evaluations) == ["step-2"]
    assert book.restored().evaluations == book.ledger.evaluations


def test_a_proposer_waits_for_its_scores_and_a_scored_problem_for_nothing() -> None:
    book = Book()
    book.tell(issue(0, "propose"), issue(1, "score"), admit(0, (0, 0), "propose"))
    book.tell(admit(1, (1, 0), "score"))
    assert book.ledger.sums()["score"].scored == 1
    assert not book.ledger.buffered("propose")
    assert book.restored().open[0].order == -1
    with pytest.raises(JournalError, match="3 scores"):
        book.tell(Ready(ticket=0, scores=(1.0, 0.0, 0.0)))
    book.tell(Ready(ticket=0, scores=(1.0, 0.0)))
    assert book.ledger.buffered("propose")[0].item.scores == (1.0, 0.0)
    assert book.restored().buffered("propose")[0].item.scores == (1.0, 0.0)
    with pytest.raises(JournalError, match="no propose group that waits"):
        book.tell(Ready(ticket=0, scores=(1.0, 0.0)))


def test_what_is_made_from_a_stale_problem_does_not_answer_for_it() -> None:
    book = Book()
    book.tell(issue(0, problem="p"), admit(0))
    book.tell(Step(t=0, version=1, digest="", consumed=(), dropped=((0, "stale"),)))
    book.tell(issue(1, "propose", problem="synthesis/of/p", parent=0))
    assert [old.id for old in book.ledger.again] == [0]


def test_the_prompt_cursor_follows_what_was_issued() -> None:
    book = Book()
    book.tell(issue(0, cursor=0), issue(1, cursor=1), issue(2, cursor=-1, parent=0))
    assert book.ledger.cursor == 2
    assert book.restored().cursor == 2


@pytest.mark.parametrize("seed", range(30))
def test_a_random_life_conserves_every_ticket_and_survives_restoring_at_any_moment(
    seed: int,
) -> None:
    rng, book, next_id, t = random.Random(seed), Book(), 0, 0
    for _ in range(120):
        deed = rng.random()
        flying = [e.ticket for e in book.ledger.in_flight()]
        if deed < 0.45:
            kind = rng.choice(["main", "main", "main", "aux", "eval", "propose", "score"])
            book.tell(issue(next_id, kind=kind, label="e", cursor=next_id))
            next_id += 1
        elif deed < 0.85 and flying:
            ticket = rng.choice(flying)
            rewards = rng.choice([(1, 0), (1, 1), (0, 0)])
            book.tell(admit(ticket.id, rewards, ticket.kind, version=rng.randint(max(0, t - 2), t)))
        elif deed < 0.9 and flying:
            book.tell(Drop(ticket=rng.choice(flying).id, reason="failed"))
        proposed = [e for e in book.ledger.open.values() if e.group and e.ticket.kind == "propose"]
        waiting = [e.ticket.id for e in proposed if not e.scores]
        if waiting and rng.random() < 0.3:
            book.tell(Ready(ticket=rng.choice(waiting), scores=(1.0, 0.0)))
        batch = select(book.ledger, CONFIG)
        if batch is not None and rng.random() < 0.5:
            book.tell(
                Step(t=t, version=t + 1, digest="", consumed=batch.consumed, dropped=batch.dropped)
            )
            t += 1
        assert all(sums.holds for sums in book.ledger.sums().values())
        if rng.random() < 0.1:
            again = book.restored()
            assert again.dump(Position("x", 0)) == book.ledger.dump(Position("x", 0))
            book.ledger = again
    assert all(book.ledger.is_closed(i) != (i in book.ledger.open) for i in range(next_id))


class Right:
    """A follower: how many answers to each problem were right."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()

    def follow(self, record: AnyRecord, entry: Entry | None) -> None:
        if isinstance(record, Admit):
            assert entry is not None
            rollouts = entry.item.group.rollouts
            self.right[entry.ticket.problem] += sum(rollout.correct > 0 for rollout in rollouts)

    def dump(self) -> bytes:
        return json.dumps(self.right).encode()

    def restore(self, data: bytes) -> None:
        self.right = Counter(json.loads(data))


def test_a_follower_sees_every_group_once_and_comes_back_with_a_checkpoint() -> None:
    live, again = Right(), Right()
    book = Book(right=live)
    book.tell(*(issue(i) for i in range(3)), issue(3, "eval", label="before"))
    book.tell(admit(0), admit(1, (1, 1)), admit(3, (1, 1), "eval"))
    book.tell(Step(t=0, version=1, digest="", consumed=(0,), dropped=((1, "zero_variance"),)))
    restored = book.restored(right=again)
    assert live.right == again.right == {"p": 5}
    restored.apply(admit(2), Position("00000001-00000000", 99))
    assert (again.right["p"], live.right["p"]) == (6, 5)


def test_folding_the_journal_from_disk_gives_the_same_ledger(tmp_path: Path) -> None:
    journal, live = Journal(tmp_path, 1), Ledger()
    opened = Open(run="r", incarnation=1, config={"learner": {}})
    records: list[AnyRecord] = [
        opened,
        *(issue(i) for i in range(4)),
        *(admit(i) for i in range(3)),
    ]
    for record in records:
        live.apply(record, journal.append(record))
    journal.commit()
    end = journal.end()
    journal.close()
    again = Ledger()
    for at, record in read(tmp_path):
        again.apply(record, at)
    assert again.dump(end) == live.dump(end)
