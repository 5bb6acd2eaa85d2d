"""Which problem comes next: the published rules, the statistics behind them, the fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common import wire
from common.codec import Codec
from common.errors import DataError, JournalError
from common.journal import Position
from common.records import Admit, AnyRecord, Drop, Issue, Step
from learner.config import LearnerConfig
from learner.follow import followers
from learner.ledger import Ledger
from learner.prompts import curriculum
from learner.prompts.config import CurriculumConfig, MixedSource, PromptsConfig
from learner.prompts.curriculum import Curriculum, Track, moved, weights
from learner.prompts.mixture import Mixture
from learner.prompts.source import Problem
from learner.prompts.stream import Prompts
from tests import chat_model
from tests.builders import make_group, make_rollout, make_ticket


class Rows:
    """`count` problems, told apart by their numbers; `count` None: endless."""

    def __init__(self, count: int | None, name: str = "rows", difficulty: Sequence[Any] = ()):
        self.name, self.rows, self._difficulty = name, count, difficulty

    def train(self, index: int) -> Problem:
        number = index % self.rows if self.rows else index
        columns = {"hard": self._difficulty[number]} if self._difficulty else {}
        return Problem(f"{self.name}/{number}", f"{number}?", f"{number}", columns)

    def heldout(self, index: int) -> Problem | None:
        return None


class Run:
    """A ledger with a curriculum, and a short way to say what happened to it."""

    def __init__(
        self, source: Any, seed: int = 0, mixed: tuple[MixedSource, ...] = (), **settings: Any
    ) -> None:
        self.config = LearnerConfig(
            prompts=PromptsConfig(curriculum=CurriculumConfig(**settings)), threads=1
        )
        self.ledger = Ledger(followers=followers(self.config, seed))
        self.source = source
        self.records: list[AnyRecord] = []
        asked = PromptsConfig(sources=mixed)
        self.prompts = Prompts(source, asked, chat_model.tokenizer(None), (), seed, 99)

    @property
    def wanted(self) -> Curriculum:
        found = curriculum.of(self.ledger.followers)
        assert found is not None
        return found

    def apply(self, record: AnyRecord) -> None:
        self.ledger.apply(record, Position("s", len(self.records)))
        self.records.append(record)

    def issue(self, kind: wire.Kind = "main", **fields: Any) -> int:
        """The next ticket of the stream."""
        id_ = self.ledger.next_id
        draft = self.prompts.draw(self.ledger.cursor, self.wanted)
        chosen = {"source": draft.source, "cursor": draft.cursor, "problem": draft.problem}
        self.apply(Issue(ticket=make_ticket(id=id_, n=8, kind=kind, **{**chosen, **fields})))
        return id_

    def admit(
        self,
        id_: int,
        right: int,
        of: int = 8,
        version: int = 0,
        errors: int = 0,
        marks: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        ticket = self.ledger.open[id_].ticket
        rollouts = [make_rollout(marks[i < right], version=version) for i in range(of)]
        rollouts += [make_rollout(0.0, version=version, error="crash") for _ in range(errors)]
        group = make_group(
            rollouts=tuple(rollouts), ticket=id_, kind=ticket.kind, problem=ticket.problem
        )
        self.apply(Admit(ticket=id_, frame=bytes(Codec(wire.FromActor).encode(group))))

    def step(self, consumed: Sequence[int] = (), dropped: Sequence[tuple[int, str]] = ()) -> None:
        t = self.ledger.t
        self.apply(
            Step(
                t=t,
                version=t + 1,
                digest="",
                consumed=tuple(consumed),
                dropped=tuple(dropped),
            )
        )

    def taught(self, right: Sequence[int]) -> None:
        """Ask once for every problem of the source, `right[i]` of 8 answers to problem i right."""
        for position, k in enumerate(right):
            id_ = self.ledger.next_id
            ticket = make_ticket(id=id_, n=8, source=self.source.name, cursor=position)
            self.apply(Issue(ticket=ticket))
            self.admit(id_, k)
            self.step([id_])


# ---- the published numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "change"),
    [(0, -38.079708), (0.25, -23.105857), (0.5, 0), (0.75, 23.105857), (1, 38.079708)],
)
def test_the_target_follows_the_accuracy_as_published(accuracy: float, change: float) -> None:
    assert moved(50, accuracy, CurriculumConfig()) - 50 == pytest.approx(change, abs=1e-6)


def test_the_target_goes_its_published_way_and_picks_the_nearest() -> None:
    target, trace = 0.0, []
    for accuracy in (1, 0.8, 0.5, 0.2):
        target = moved(target, accuracy, CurriculumConfig())
        trace.append(target)
    assert trace == pytest.approx([38.079708, 64.932186, 64.932186, 38.079708], abs=1e-6)
    run = Run(
        Rows(6, difficulty=[2, 10, 33, 35, 40, 60]), rule="target", start=target, difficulty="hard"
    )
    assert sorted(run.ledger.open[run.issue()].ticket.cursor for _ in range(3)) == [2, 3, 4]


def test_probabilities_are_the_published_ones() -> None:
    success = np.array([0.9, 0.5, 0.1, 0.0])
    for rule, expected in (
        ("prioritised", [0.04, 0.2, 0.36, 0.4]),
        ("learnability", [0.209302, 0.581395, 0.209302, 0]),
    ):
        found = weights(success, rule, 0.0)
        assert found / found.sum() == pytest.approx(expected, abs=1e-6)
        assert (weights(success, rule, 0.02) > 0).all(), "nothing is out of reach for ever"


def test_tracked_success_is_the_published_one() -> None:
    track, means = Track(), []
    for right in (2, 5, 8):
        track = track.seen(right, 8, 0, 0.9)
        means.append(track.success(0, 0.99))
    assert means == pytest.approx([0.295918, 0.452438, 0.641758], abs=1e-6)
    spread = [s * (1 - s) for s in means]
    assert spread == pytest.approx([0.208351, 0.247738, 0.229905], abs=1e-6)


def test_evidence_fades_with_the_versions_since() -> None:
    track = Track().seen(8, 8, 3, 0.9)
    at = [track.success(t, 0.9) for t in (3, 4, 10, 1000)]
    assert at[0] == track.success(0, 0.9) > at[1] > at[2] > at[3]
    assert at[3] == pytest.approx(0.5)
    assert track.seen(0, 8, 1, 0.9).version == 3, "a late group does not make it older"


# ---- drawing -------------------------------------------------------------------------------------


def test_draws_follow_the_weights() -> None:
    """Twelve problems of known success, and how often each of them is drawn first of all."""
    right = [0, 2, 4, 6, 8, 8, 8, 8, 8, 8, 8, 0]
    for rule in ("prioritised", "learnability"):
        run = Run(Rows(12), rule=rule, fade=1.0)
        run.taught(right)
        success = np.array([run.wanted.success("rows", i) for i in range(12)])
        weight = weights(success, rule, 0.02)
        drawn = Counter[int]()
        for _ in range(1500):
            run.issue(kind="aux")
            drawn[run.ledger.open[run.ledger.next_id - 1].ticket.cursor] += 1
            run.wanted._recent.clear()
        expected = 1500 * weight / weight.sum()
        counts = np.array([drawn[i] for i in range(12)])
        assert ((counts - expected) ** 2 / expected).sum() < 31.3, "chi-square, 11 degrees"


def test_no_problem_comes_twice_before_the_step_while_there_are_others() -> None:
    run = Run(Rows(8))
    first = [run.ledger.open[run.issue()].ticket.problem for _ in range(8)]
    assert len(set(first)) == 8
    assert run.issue() == 8, "with all of them asked, one is asked again"
    run.step()
    again = [run.ledger.open[run.issue()].ticket.problem for _ in range(8)]
    assert len(set(again)) == 8


def test_a_draw_is_pure_in_seed_number_and_journal() -> None:
    def story(seed: int) -> list[str]:
        run = Run(Rows(500), seed=seed, candidates=16)
        asked = []
        for i in range(40):
            id_ = run.issue()
            asked.append(run.ledger.open[id_].ticket.problem)
            run.admit(id_, i % 9)
            if i % 4 == 3:
                run.step([id_])
        return asked

    assert story(0) == story(0)
    assert story(0) != story(1)


def test_an_endless_source_goes_back_to_a_pool_of_its_problems() -> None:
    run = Run(Rows(None), pool=20, candidates=8)
    for _ in range(60):
        run.issue()
        run.wanted._recent.clear()
    assert {entry.ticket.cursor for entry in run.ledger.open.values()} <= set(range(20))


def test_the_shares_of_a_mixture_are_kept_and_each_source_has_its_own_statistics() -> None:
    shares = (MixedSource(weight=1.0), MixedSource(weight=3.0))
    run = Run(Mixture([Rows(30, "a"), Rows(30, "b")], shares, 0), mixed=shares)
    for _ in range(200):
        run.issue()
        run.wanted._recent.clear()
    sources = Counter(entry.ticket.source for entry in run.ledger.open.values())
    assert sources["a"] == pytest.approx(50, abs=20)
    id_ = run.issue()
    ticket = run.ledger.open[id_].ticket
    run.admit(id_, 8)
    other = {"a": "b", "b": "a"}[ticket.source]
    assert run.wanted.success(ticket.source, ticket.cursor) > 0.8
    assert run.wanted.success(other, ticket.cursor) == 0.5


def test_rows_without_a_difficulty_are_passed_over_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(Rows(4, difficulty=["easy", 101, 2, 90]), rule="target", difficulty="hard")
    with caplog.at_level("WARNING"):
        asked = [run.ledger.open[run.issue()].ticket.cursor for _ in range(4)]
    assert asked[:2] == [2, 3]
    assert set(asked) == {2, 3}
    assert caplog.text.count("problem rows/0 passed over, its difficulty is 'easy'") == 1
    assert caplog.text.count("passed over") == 1


def test_a_column_that_is_no_difficulty_anywhere_is_named() -> None:
    run = Run(Rows(3, difficulty=["easy", 101, None]), rule="target", difficulty="hard")
    with pytest.raises(DataError, match=r"'rows': learner\.prompts\.curriculum.* column 'hard'"):
        run.issue()


# ---- the fold ------------------------------------------------------------------------------------


def test_every_group_counts_once_whatever_becomes_of_it() -> None:
    run = Run(Rows(1), fade=1.0)
    useless, stale, good = run.issue(), run.issue(), run.issue()
    run.admit(useless, 8)
    run.admit(stale, 4)
    run.admit(good, 2)
    expected = Track().seen(8, 8, 0, 0.9).seen(4, 8, 0, 0.9).seen(2, 8, 0, 0.9)
    assert run.wanted.success("rows", 0) == expected.success(0, 1.0)
    run.step([good], [(useless, "zero_variance"), (stale, "stale")])
    assert run.wanted.success("rows", 0) == expected.success(0, 1.0)


def test_a_prompt_that_is_asked_again_is_the_same_problem() -> None:
    run = Run(Rows(9), fade=1.0)
    stale = run.issue()
    place = run.ledger.open[stale].ticket.cursor
    run.admit(stale, 0)
    run.step([], [(stale, "stale")])
    again = run.issue(cursor=-1, parent=stale)
    run.admit(again, 8)
    expected = Track().seen(0, 8, 0, 0.9).seen(8, 8, 0, 0.9)
    assert run.wanted.success("rows", place) == expected.success(0, 1.0)


def test_what_was_not_graded_or_not_asked_by_the_policy_is_no_evidence() -> None:
    run = Run(Rows(1))
    crashed, aux, failed = run.issue(), run.issue(kind="aux"), run.issue()
    run.admit(crashed, 0, of=0, errors=8)
    run.admit(aux, 8)
    run.apply(Drop(ticket=failed, reason="failed"))
    assert run.wanted.success("rows", 0) == 0.5
    half = run.issue()
    run.admit(half, 2, of=4, errors=4)
    assert run.wanted.success("rows", 0) == Track().seen(2, 4, 0, 0.9).success(0, 1.0)


def test_a_grader_that_marks_below_0_and_above_1_is_evidence_of_right_and_wrong() -> None:
    run = Run(Rows(1), fade=1.0)
    run.admit(run.issue(), 2, marks=(-1.0, 3.0))
    expected = Track().seen(2, 8, 0, 0.9)
    assert run.wanted.success("rows", 0) == expected.success(0, 1.0)


def test_the_accuracy_of_a_step_is_that_of_all_groups_since_the_last() -> None:
    run = Run(Rows(50), rule="target")
    right = [8, 8, 8, 0]
    ids = [run.issue() for _ in right]
    for id_, k in zip(ids, right, strict=True):
        run.admit(id_, k)
    run.step(ids[3:], [(id_, "zero_variance") for id_ in ids[:3]])
    assert run.wanted.facts()["target"] == moved(0.0, 0.75, CurriculumConfig())
    run.step()
    assert run.wanted.facts()["target"] == moved(0.0, 0.75, CurriculumConfig()), "no news"


def test_it_is_the_same_from_a_checkpoint_as_from_the_whole_journal() -> None:
    run = Run(Rows(200), candidates=16, rule="target")
    for i in range(30):
        id_ = run.issue()
        if i % 5:
            run.admit(id_, i % 9, version=i // 10)
        if i % 7 == 6:
            run.step([id_] if i % 5 else [])
    restored = Curriculum(CurriculumConfig(candidates=16, rule="target"), 0)
    restored.restore(run.wanted.dump())
    folded = Ledger(followers=followers(run.config, 0))
    for at, record in enumerate(run.records):
        folded.apply(record, Position("s", at))
    twin = curriculum.of(folded.followers)
    assert twin is not None
    assert restored.dump() == twin.dump() == run.wanted.dump()
    for other in (restored, twin):
        ours, theirs = run.wanted.choose(run.source), other.choose(run.source)
        assert [next(ours) for _ in range(40)] == [next(theirs) for _ in range(40)]


def test_a_damaged_state_is_refused() -> None:
    with pytest.raises(JournalError, match="curriculum is damaged"):
        Curriculum(CurriculumConfig(), 0).restore(b"nonsense")


def test_off_it_is_not_there_and_draws_are_the_plain_ones() -> None:
    assert followers(LearnerConfig(threads=1), 0) == {}
    prompts = Prompts(Rows(9), PromptsConfig(), chat_model.tokenizer(None), (), 0, 99)
    plain = [prompts.draw(cursor) for cursor in range(9)]
    assert [draft.cursor for draft in plain] == list(range(9))
    assert curriculum.of({}) is None
