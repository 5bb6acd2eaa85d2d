"""The learner's counter over a real ROUTER: what it asks, and what the trainer gets of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from common import wire
from common.records import Halt
from learner.config import EvalConfig, LearnerConfig
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Draft, Prompts
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.pool import Pool
from tests.counter import CONFIG, Counter, Letters, take, train


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    made = Counter(tmp_path)
    yield made
    made.close()


def test_nothing_is_issued_before_the_first_version_is_published(counter: Counter) -> None:
    actor = counter.actor()
    assert actor.hear(wire.Welcome).version == -1
    assert actor.hears_nothing_but_pulses()
    counter.desk.announce(0)
    assert actor.grants(1)[0].ticket.id == 0


def test_no_wait_is_lost_while_the_desk_turns(counter: Counter) -> None:
    counter.desk.announce(0)
    for number in range(500):
        assert counter.desk.wait(lambda: number, lambda: False) == number  # noqa: B023


def test_no_more_tickets_than_the_lag_bound_allows(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    grants = actor.grants(4)  # (max_lag + 1) × groups_per_step
    assert actor.hears_nothing_but_pulses()
    for grant in grants[:2]:
        actor.answer(grant)
    assert actor.hears_nothing_but_pulses(), "buffered groups count too"
    train(counter, take(counter))
    assert len(actor.grants(2)) == 2
    assert actor.hears_nothing_but_pulses()


def test_a_group_that_teaches_nothing_makes_room_at_once(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    actor.answer(actor.grants(4)[0], (1, 1))
    assert len(actor.grants(1)) == 1


def test_tickets_ask_for_a_version_that_keeps_them_within_the_lag_bound(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    for step in range(3):
        for grant in actor.grants(4 if step == 0 else 2):
            assert grant.ticket.min_version <= step
            actor.answer(grant, version=step)
        train(counter, take(counter))
    assert max(grant.ticket.min_version for grant in actor.grants(2)) >= 2


def test_evaluations_come_first_and_only_the_missing_problems_are_asked(tmp_path: Path) -> None:
    counter = Counter(
        tmp_path,
        LearnerConfig(
            groups_per_step=2, group_size=2, heartbeat_s=0.05, eval=EvalConfig(problems=3)
        ),
    )
    try:
        counter.desk.announce(0)
        drafts = counter.prompts.heldout(3)
        counter.desk.evaluate("before", drafts, 0)
        actor = counter.actor(capacity=3)
        grants = actor.grants(3)
        assert {g.ticket.kind for g in grants} == {"eval"}
        counter.desk.evaluate("before", drafts, 0)
        for grant in grants:
            actor.answer(grant, (1,))
        point = counter.ledger.evaluations["before"]
        assert counter.desk.wait(lambda: point.is_complete(3) or None, lambda: False)
        assert actor.grants(1)[0].ticket.kind == "main"
    finally:
        counter.close()


def test_a_group_dropped_as_stale_has_its_prompt_asked_again(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    old, *rest = actor.grants(4)
    problem = old.ticket.problem
    asked = list(rest)
    for step in range(3):
        for grant in asked[:2]:
            actor.answer(grant, version=step)
        train(counter, take(counter))
        asked = asked[2:] + actor.grants(1 if step == 2 else 2)
    actor.answer(old, version=0)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for grant in asked[:2]:
            actor.answer(grant, version=3)
        selection = take(counter)
        train(counter, selection)
        asked = actor.grants(2)
        if (old.ticket.id, "stale") in selection.dropped:
            break
    assert any(
        g.ticket.parent == old.ticket.id and g.ticket.problem == problem
        for g in asked + actor.grants(1)
    )


def test_labels_found_wrong_while_a_step_is_trained_are_out_of_the_next_one(tmp_path: Path) -> None:
    wrong = SynthesisConfig(label="program_verified", labeller="arithmetic")
    counter = Counter(tmp_path, msgspec.structs.replace(CONFIG, synthesis=wrong))

    def find_out() -> None:
        pool = counter.ledger.followers["synthesis"]
        assert isinstance(pool, Pool)
        pool.state.audited = pool.state.wrong = 8
        pool.changes += 1

    try:
        counter.desk.announce(0)
        actor = counter.actor(capacity=99)
        for grant in actor.grants(2):
            actor.answer(grant)
        batch = take(counter)
        counter.desk.call(find_out)
        assert counter.desk.wait(lambda: counter.ledger.halted, lambda: False) == 1
        train(counter, batch)
        (halt,) = (record for record in counter.records() if isinstance(record, Halt))
        assert (halt.t, halt.reason[:4]) == (1, "8 of")
    finally:
        counter.close()


def test_an_error_in_the_desks_thread_is_raised_in_the_trainers(counter: Counter) -> None:
    def boom(*_: object) -> Draft:
        raise RuntimeError("the prompt stream broke")

    counter.prompts.draw = boom  # type: ignore[method-assign]
    counter.desk.announce(0)
    counter.actor()
    with pytest.raises(RuntimeError, match="the prompt stream broke"):
        counter.desk.take(lambda: False)


def test_prompts_are_the_same_whoever_asks_and_whenever() -> None:
    prompts = Prompts(Arithmetic(0), CONFIG.prompts, Letters(), (2,), 0, 64)  # type: ignore[arg-type]
    one, two = prompts.draw(5), prompts.draw(5)
    assert one.problem == two.problem
    assert np.array_equal(one.prompt, two.prompt)
    assert prompts.sampling(3, 1.0, 8).seed != prompts.sampling(4, 1.0, 8).seed
