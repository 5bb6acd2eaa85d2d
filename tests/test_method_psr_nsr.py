"""W-REINFORCE, the estimator psr_nsr: right answers a little, wrong ones fully, no group needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import recipe
from learner.advantage import advantages, informative
from learner.config import LearnerConfig
from learner.inbox import select
from learner.item import Item
from tests.builders import make_group, make_rollout, make_ticket
from tests.test_inbox import book_of
from tests.test_inbox import config as batch_config
from tests.test_methods import train


def test_right_answers_have_the_weight_and_wrong_ones_minus_one_whatever_their_group() -> None:
    right = np.array([1.0, 0, 1, 1, 0])
    group = np.array([0, 0, 1, 1, 2])
    found = advantages(right, group, "psr_nsr")
    np.testing.assert_array_equal(found, [0.1, -1, 0.1, 0.1, -1])
    np.testing.assert_array_equal(
        advantages(right, group, "psr_nsr", psr_weight=0.0), [0, -1, 0, 0, -1]
    )


def test_it_switches_the_zero_variance_filter_off() -> None:
    assert informative(make_group([1, 1]), "psr_nsr")
    assert not informative(make_group([1, 1]), "grpo")
    selection = select(book_of((1, 1), (0, 0)).ledger, batch_config(advantage="psr_nsr"))
    assert selection is not None
    assert selection.consumed == (0, 1)
    assert selection.dropped == ()


def one_sided(correct: float, parts: Any) -> Any:
    rollouts = tuple(make_rollout(correct, tokens=[5, 6, 7], parts=parts) for _ in range(2))
    return lambda seed: [Item(make_ticket(n=2), make_group([1, 1], rollouts=rollouts))]


def test_it_looks_at_raw_correctness_not_at_shaped_rewards() -> None:
    own: dict[str, Any] = {"advantage": "psr_nsr", "loss": "reinforce", "steps": 1}
    plain = train([], items=one_sided(1.0, ({"correct": 1.0},)), **own)[1].metrics
    shaped = train([], items=one_sided(1.0, ({"correct": 1.0, "short": -3.0},)), **own)[1].metrics
    wrong = train([], items=one_sided(0.0, ({"correct": 0.0},)), **own)[1].metrics
    assert plain["loss"] == shaped["loss"]
    assert wrong["loss"] == pytest.approx(-10 * plain["loss"])  # type: ignore[operator]


def test_a_single_rollout_a_prompt_will_do() -> None:
    LearnerConfig(advantage="psr_nsr", group_size=1).check()


def test_its_recipe_is_the_published_weight() -> None:
    found = recipe.load_all("psr_nsr")["learner"]
    assert isinstance(found, LearnerConfig)
    assert (found.advantage, found.psr_weight) == ("psr_nsr", 0.1)
