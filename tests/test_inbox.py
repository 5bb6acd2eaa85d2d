"""The batch rule: a pure function of the admission order."""

from __future__ import annotations

import pytest

from common.journal import Position
from common.records import Ready, Step
from common.wire import Group
from learner.config import LearnerConfig
from learner.inbox import Selection, select
from learner.inbox import fate as fate_of
from learner.ledger import Entry
from learner.synthesis.config import SynthesisConfig
from learner.tally import correct, seen
from tests.builders import make_group, make_rollout, make_ticket
from tests.test_ledger import Book, admit, issue


def config(**fields: object) -> LearnerConfig:
    return LearnerConfig(
        **{"groups_per_step": 2, "group_size": 2, "max_lag": 1, "refill_limit": 3.0, **fields}
    )


def fate(group: Group, t: int, settings: LearnerConfig) -> str:
    entry = Entry(make_ticket(), Position("", 0))
    entry.admit(group, 0)
    return fate_of(entry, t, settings)


def book_of(*rewards: tuple[float, ...], version: int = 0) -> Book:
    book = Book()
    book.tell(*(issue(i) for i in range(len(rewards))))
    book.tell(*(admit(i, r, version=version) for i, r in enumerate(rewards)))
    return book


def chosen(book: Book, settings: LearnerConfig | None = None) -> Selection:
    selection = select(book.ledger, settings or config())
    assert selection is not None
    return selection


def test_a_batch_is_the_first_usable_groups_in_admission_order() -> None:
    book = Book()
    book.tell(*(issue(i) for i in range(4)))
    book.tell(admit(3), admit(1), admit(0), admit(2))
    assert chosen(book).consumed == (3, 1)


def test_without_enough_usable_groups_there_is_no_batch_yet() -> None:
    assert select(book_of((1, 0)).ledger, config()) is None


def test_groups_that_teach_nothing_are_dropped_by_name_and_replaced() -> None:
    selection = chosen(book_of((1, 1), (1, 0), (0, 0), (0, 1)))
    assert selection.consumed == (1, 3)
    assert selection.dropped == ((0, "zero_variance"), (2, "zero_variance"))


def test_groups_after_the_last_one_used_stay_for_the_next_step() -> None:
    book = book_of((1, 0), (0, 1), (1, 1), (1, 0))
    selection = chosen(book)
    assert selection.dropped == ()
    book.tell(
        Step(t=0, version=1, digest="", consumed=selection.consumed, dropped=selection.dropped)
    )
    assert book.ledger.main == [2, 3]


def test_the_filter_compares_raw_correctness_not_shaped_reward() -> None:
    shaped = make_group(
        rollouts=(make_rollout(1.0, parts=({"a": 1.0},)), make_rollout(1.0, parts=({"a": 0.2},)))
    )
    assert fate(shaped, 0, config()) == "zero_variance"


@pytest.mark.parametrize(("t", "expected"), [(0, ""), (4, ""), (5, "stale")])
def test_lag_is_checked_at_use_and_negative_lag_counts_as_none(t: int, expected: str) -> None:
    assert fate(make_group([1, 0], version=3), t, config()) == expected


def test_one_old_token_makes_a_rollout_old() -> None:
    from tests.builders import make_segment

    old = make_rollout(segments=(make_segment(spans=((0, 1), (2, 9))),))
    assert fate(make_group(rollouts=(old, make_rollout(0.0, version=9))), 9, config()) == "stale"


def test_a_grader_that_failed_makes_the_group_a_verifier_error_never_a_zero() -> None:
    group = make_group(rollouts=(make_rollout(1.0), make_rollout(0.0, error="timeout")))
    assert fate(group, 0, config()) == "verifier_error"


def test_refill_has_an_end_and_trains_on_what_is_usable() -> None:
    selection = chosen(book_of((1, 1), (1, 1), (1, 0), (1, 1), (1, 1), (1, 1)))
    assert selection.consumed == (2,)
    assert len(selection.dropped) == 5


def test_refill_looks_at_no_more_than_its_limit_however_many_came() -> None:
    selection = chosen(book_of(*[(1, 1)] * 6, (1, 0), (1, 0)))
    assert selection.consumed == ()
    assert len(selection.dropped) == 6


def test_with_nothing_left_to_learn_the_batch_is_empty() -> None:
    assert chosen(book_of(*[(1, 1)] * 6)).items == ()


def test_an_empty_batch_knows_whether_its_answers_were_right_wrong_or_never_graded() -> None:
    assert chosen(book_of(*[(1, 1)] * 6)).right == 1.0
    assert chosen(book_of(*[(0, 0)] * 4, *[(1, 1)] * 2)).right == pytest.approx(1 / 3)
    failed = make_group(rollouts=(make_rollout(1.0, error="timeout"), make_rollout(1.0)))
    assert Selection(0, (), ((1, "verifier_error"),), (failed,)).right == 0.5


def test_all_that_was_looked_at_for_a_batch_counts_as_right_or_wrong() -> None:
    batch = chosen(book_of((1, 1), (0, 1), (1, 1), (0, 1), (0, 0)))
    assert (len(batch.items), len(batch.refused)) == (2, 2)
    assert correct(seen(batch)) == 6 / 8


def test_truncated_groups_are_dropped_only_when_asked() -> None:
    cut = make_group(
        rollouts=(make_rollout(1.0, finish="length"), make_rollout(0.0, finish="length"))
    )
    assert fate(cut, 0, config()) == ""
    assert fate(cut, 0, config(drop_truncated=True)) == "truncated"


def test_aux_groups_join_only_when_admitted_before_the_last_main_group() -> None:
    book = Book()
    book.tell(issue(0), issue(1), issue(2, kind="aux"), issue(3, kind="aux"), issue(4, kind="aux"))
    book.tell(
        admit(0),
        admit(2, (1, 1), "aux"),
        admit(3, (0, 0), "aux"),
        admit(1),
        admit(4, (1, 1), "aux"),
    )
    assert chosen(book, config(n_aux=1)).consumed == (0, 1, 2)
    assert chosen(book, config(n_aux=3)).consumed == (0, 1, 2, 3)


def test_aux_groups_are_not_asked_for_variance_but_for_freshness() -> None:
    assert fate(make_group([1, 1], kind="aux"), 0, config()) == ""
    assert fate(make_group([1, 1], kind="aux"), 2, config()) == "stale"


def with_proposer(**fields: object) -> LearnerConfig:
    return config(synthesis=SynthesisConfig(**fields))


def book_with_proposals(*ready: int) -> Book:
    """Three propose groups are admitted, the scores of some come in between two main groups."""
    book = Book()
    book.tell(issue(0), issue(1), *(issue(i, kind="propose") for i in (2, 3, 4)))
    book.tell(*(admit(i, (0, 0), "propose") for i in (2, 3, 4)), admit(0))
    book.tell(*(Ready(ticket=i, scores=(0.5, -0.5)) for i in ready), admit(1))
    return book


def test_proposers_join_in_the_order_in_which_their_scores_came() -> None:
    book = book_with_proposals(4, 2)
    selection = chosen(book, with_proposer(proposers=2))
    assert selection.consumed == (0, 1, 4, 2)
    assert [item.scores for item in selection.items] == [(), (), (0.5, -0.5), (0.5, -0.5)]
    assert chosen(book, with_proposer(proposers=1)).consumed == (0, 1, 4)
    assert chosen(book, with_proposer(proposers=0)).consumed == (0, 1)
    assert chosen(book).consumed == (0, 1)


def test_a_proposer_without_its_scores_or_with_late_ones_waits() -> None:
    book = book_with_proposals(3)
    book.tell(Ready(ticket=2, scores=(1.0, 0.0)))
    assert chosen(book, with_proposer()).consumed == (0, 1, 3)


def test_proposers_have_a_lag_limit_of_their_own() -> None:
    group = make_group([0, 0], kind="propose", version=0)
    entry = Entry(make_ticket(kind="propose"), Position("", 0))
    entry.admit(group, 0)
    assert [fate_of(entry, t, with_proposer()) for t in (2, 3)] == ["", "stale"]
    assert fate_of(entry, 5, with_proposer(max_lag=5)) == ""


def test_a_stale_proposer_is_dropped_and_its_prompt_is_not_asked_again() -> None:
    book = book_with_proposals(2)
    settings = with_proposer(max_lag=0)
    for t in range(2):
        book.tell(issue(10 + t), issue(20 + t), admit(10 + t, version=t), admit(20 + t, version=t))
    book.tell(Step(t=0, version=1, digest="", consumed=(0, 1)))
    selection = chosen(book, settings)
    assert selection.dropped == ((2, "stale"),)
    book.tell(
        Step(t=1, version=2, digest="", consumed=selection.consumed, dropped=selection.dropped)
    )
    assert not book.ledger.again
    assert book.ledger.sums()["propose"].dropped == {"stale": 1}
