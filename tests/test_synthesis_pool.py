"""Synthesis from ticket to pool: what is asked, what is kept, what is trained on."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from common.journal import Position
from common.recipe import load_all
from common.records import AnyRecord, Issue, Ready, Step
from learner.config import LearnerConfig
from learner.follow import followers
from learner.issuer import Issuer
from learner.ledger import Ledger
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.pool import Pool
from tests.builders import make_group, make_rollout, make_segment, make_ticket
from tests.synthesis_world import (
    SEGMENT,
    SUMS,
    World,
    eval_sum,
    words,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World().until(16)


def test_problems_are_proposed_labelled_scored_pooled_and_asked(world: World) -> None:
    found = world.proposals()
    states = {made.state for made in found.made.values()}
    assert {"rejected", "expired"} <= states
    asked = [ticket for ticket in world.tickets("main") if ticket.source == "synthesis"]
    assert asked
    assert all(ticket.grading.gold == str(eval_sum(ticket.question)) for ticket in asked)
    assert {"no problem in it", "duplicate"} <= {reason for _, _, reason in found.moves}


def test_proposals_and_answers_to_them_are_asked_of_the_latest_weights(world: World) -> None:
    t, asked = 0, 0
    for record in world.records:
        if isinstance(record, Step):
            t = record.t + 1
        elif isinstance(record, Issue) and record.ticket.kind in ("propose", "score"):
            assert record.ticket.min_version == t
            asked += t > 0
    assert asked > 4


def test_every_step_of_a_proposal_has_its_reason(world: World) -> None:
    moves = world.proposals().moves
    assert {(before, after) for before, after, _ in moves} >= {
        ("proposed", "extracted"),
        ("extracted", "labelled"),
        ("labelled", "scored"),
        ("scored", "active"),
        ("active", "expired"),
        ("proposed", "rejected"),
    }
    assert all(reason for _, _, reason in moves)


def test_every_kind_conserves_its_tickets_and_the_auditor_agrees(
    world: World, tmp_path: Path
) -> None:
    sums = world.ledger.sums()
    assert {"main", "propose", "score"} <= set(sums)
    assert all(line.holds for line in sums.values())
    assert sums["score"].scored > 0
    assert sums["propose"].trained > 0
    found = world.audited(tmp_path / "run")
    assert found.violations == []
    for kind, line in sums.items():
        assert (found.sums[kind].trained, found.sums[kind].dropped) == (line.trained, line.dropped)


def test_any_run_of_main_prompts_has_its_share_of_the_pool_within_one(world: World) -> None:
    """From when the pool is never empty; prompts asked again keep their places out of it."""
    config = SUMS | {"uses": 1000, "life": 1000}
    for ratio in (0.5, 0.25, 0.3):
        w = World(**config | {"ratio": ratio}).until(10)
        fresh = [t for t in w.tickets("main") if t.cursor >= 0 or t.source == "synthesis"]
        first = next(i for i, t in enumerate(fresh) if t.source == "synthesis")
        mixed = np.cumsum([0] + [t.source == "synthesis" for t in fresh[first:]])
        for length in (4, 8):
            share = mixed[length:] - mixed[:-length]
            assert np.abs(share - ratio * length).max() < 1.0


def test_nothing_rejected_worn_or_old_is_asked_and_none_more_often_than_allowed() -> None:
    world = World(uses=1, life=3, ratio=0.5).until(12)
    found = world.proposals()
    assert max(made.uses for made in found.made.values()) == 1
    assert {reason for _, after, reason in found.moves if after == "expired"} == {"used", "old"}


def test_an_inherited_label_is_exactly_the_parents_and_what_is_made_is_never_the_parent() -> None:
    world = World(label="inherited", labeller="", ratio=0.25).until(6)
    golds = {ticket.problem: ticket.grading.gold for ticket in world.tickets("main")}
    texts = {ticket.problem: ticket.question for ticket in world.tickets("main")}
    labelled = [made for made in world.proposals().made.values() if made.gold]
    assert labelled
    for made in labelled:
        assert made.gold == golds[made.parent]
        assert made.text != texts[made.parent]


def test_a_proposer_that_emits_nothing_usable_is_said_once_and_asked_ever_more_seldom(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        world = World(lambda ticket, i: "=?", patience=3).until(40)
    assert caplog.text.count("brings nothing usable") == 1
    steps, proposed = [], 0
    for record in world.records:
        if isinstance(record, Issue) and record.ticket.kind == "propose":
            proposed += 1
        if isinstance(record, Step):
            steps.append(proposed)
    assert steps[-1] < 15
    assert steps[-1] - steps[-9] <= 1
    assert all(ticket.source == "arithmetic" for ticket in world.tickets("main"))


def test_a_consensus_is_made_of_the_answers_and_says_so() -> None:
    world = World(
        label="consensus", labeller="", answer=r"#(\d+)$", accept=(0.5, 1.0), ratio=0.25
    ).until(6)
    found = [made for made in world.proposals().made.values() if made.gold]
    assert found
    assert {made.origin for made in found} == {"consensus"}
    assert {"no majority"} <= {reason for _, _, reason in world.proposals().moves}


def test_r_zero_pays_for_doubt_also_where_it_is_too_great_for_a_label() -> None:
    """min(s, 1 − s) is largest at one half, where no answer has the majority."""
    world = World(
        label="consensus", labeller="", answer=r"#(\d+)$", accept=(0.5, 1.0), reward="r_zero"
    ).until(4)
    made, doubted, useless = world.proposals().made, [], []
    for record in world.records:
        if isinstance(record, Ready):
            for rollout, score in enumerate(record.scores):
                reason = made[f"synthesis/{record.ticket}/{rollout}"].reason
                doubted += [score] * (reason == "no majority")
                useless += [score] * (reason == "no problem in it")
    assert max(doubted) > 0
    assert min(doubted) >= -1 > max(useless)


def test_queues_are_bounded_whatever_the_policy_does() -> None:
    world = World(seeds=3, proposing=1, scoring=2, size=4, uses=1000, life=1000)
    for _ in range(60):
        world.turn()
        state = world.pool.state
        assert len(state.seeds) <= 3
        assert len(state.asked) <= 1
        assert len(state.made) <= 4 + 2 * world.config.synthesis.proposals  # type: ignore[union-attr]


def test_problems_made_from_made_ones_stop_at_the_depth_allowed() -> None:
    flat, deep = World(seeds=6).until(12), World(seeds=6, depth=2).until(12)
    for world, deepest in ((flat, 1), (deep, 2)):
        parents = [made.parent for made in world.proposals().made.values() if made.parent]
        made = [parent for parent in parents if parent.startswith("synthesis/")]
        assert bool(made) == (deepest == 2)


def test_after_feedback_a_parents_response_is_that_of_the_last_turn() -> None:
    pool = Pool(SynthesisConfig(parents=(0.5, 0.5)))
    turns = [make_segment(tokens, turn=turn) for turn, tokens in enumerate(([5, 6], [7, 8, 9]))]
    right = make_rollout(1.0, segments=tuple(turns))
    group = make_group(rollouts=(right, make_rollout(0.0)), problem="p", kind="main")
    pool._consider(make_ticket(n=2, problem="p", question="1+1?"), group)
    (seed,) = pool.state.seeds
    assert (seed.response, seed.p) == ([7, 8, 9], 0.5)


def test_without_the_table_nothing_of_it_is_in_the_journal() -> None:
    plain = LearnerConfig(groups_per_step=4, prompts=load_all("tiny")["learner"].prompts)
    assert followers(plain, 0) == {}
    written: list[AnyRecord] = []
    ledger = Ledger()
    prompts = Prompts(Arithmetic(0), plain.prompts, words(), (2,), 0, 100)

    def write(record: AnyRecord) -> None:
        ledger.apply(record, Position(SEGMENT, len(written)))
        written.append(record)

    issuer, count = Issuer(plain, ledger, prompts, write), 0
    room = issuer.room()
    while count < 20:
        issuer.turn()
        _, room = issuer.next(room)
        count += 1
    assert all(isinstance(r, Issue) and not r.ticket.question for r in written)
    assert [r.ticket.cursor for r in written if isinstance(r, Issue)] == list(range(12))
