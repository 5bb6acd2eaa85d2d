"""Who fails to judge a proposal is no judgement on it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from common import wire
from common.records import Drop, Ready
from tests.builders import make_rollout
from tests.synthesis_world import (
    World,
    digits,
    eval_sum,
    words,
)


def scores_of(world: World) -> dict[int, tuple[float, ...]]:
    return {record.ticket: record.scores for record in world.records if isinstance(record, Ready)}


SLOW = r"^((?:\d|\d\d)+)=$"  # takes for ever to find that # stands between the number and the =


LONG = "1" * 60 + "#="


def test_a_proposal_that_a_regex_takes_too_long_for_is_not_judged_and_teaches_nothing() -> None:
    def sometimes(ticket: wire.Ticket, i: int) -> str:
        return LONG if i == 0 else digits(ticket, i)

    world = World(sometimes, extract=SLOW, proposing=1, patience=1000)
    while not scores_of(world):
        world.turn()
    ((ticket, (first, *others)),) = scores_of(world).items()
    reason = world.proposals().made[f"synthesis/{ticket}/0"].reason
    assert reason.startswith("verifier_error: learner.synthesis.extract: no verdict on")
    assert first == pytest.approx(np.mean(others), abs=1e-12)


def test_a_regex_that_is_always_too_slow_ends_proposals_as_errors_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        world = World(lambda ticket, i: LONG, extract=SLOW, patience=2).until(4)
    assert not scores_of(world)
    ended = {r.ticket: r.reason for r in world.records if isinstance(r, Drop)}
    assert {ended[t.id] for t in world.tickets("propose") if t.id in ended} == {"verifier_error"}
    assert caplog.text.count("learner.synthesis.extract: no verdict") == 2


def test_a_labeller_that_fails_leaves_the_proposer_without_a_judgement_on_it() -> None:
    world, checked = World(labeller="python:tests.test_synthesis_faults:picky"), 0
    while not checked:  # the labeller works beside the steps: how many pass is nobody's promise
        world.turn()
        made = world.proposals().made
        for ticket, found in scores_of(world).items():
            reasons = [made[f"synthesis/{ticket}/{i}"].reason for i in range(4)]
            failed = ["the labeller failed: KeyError" in reason for reason in reasons]
            judged = [s for s, fault in zip(found, failed, strict=True) if not fault]
            for score, fault in zip(found, failed, strict=True):
                if fault:
                    assert score == pytest.approx(np.mean(judged), abs=1e-12)
                    checked += 1


def picky(problem: str) -> str:
    """A labeller with a fault: it breaks over sums that are even."""
    total = eval_sum(problem)
    return {1: str(total)}[total % 2]


def test_an_answer_that_a_regex_takes_too_long_for_makes_no_majority_and_no_label() -> None:
    class Shy(World):
        def rollout(self, ticket: wire.Ticket, i: int) -> wire.Rollout:
            if ticket.kind != "score" or i:
                return super().rollout(ticket, i)
            tokens = words().encode("1" * 60 + "#", add_special_tokens=False)
            return make_rollout(0.0, tokens, version=self.ledger.t)

    asks: dict[str, Any] = {"label": "consensus", "labeller": "", "accept": (0.5, 1.0)}
    world = Shy(answer=r"((?:\d|\d\d)+)$", **asks).until(3)
    reasons = {reason for _, _, reason in world.proposals().moves}
    assert any(reason.startswith("verifier_error: learner.synthesis.answer") for reason in reasons)
    assert not [made for made in world.proposals().made.values() if made.gold]
