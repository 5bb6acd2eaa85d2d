"""An evaluation point: what it says of accuracy, and how sure it is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learner.evaluation import Evaluation
from tests.builders import make_group, make_rollout


def point(*groups: list[float]) -> Evaluation:
    found = Evaluation()
    for rewards in groups:
        found.add(make_group(rewards, kind="eval"))
    return found


def test_one_rollout_a_problem_has_the_binomial_error() -> None:
    found = point(*[[1.0]] * 30, *[[0.0]] * 10)
    assert found.accuracy == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))


def test_more_rollouts_of_a_problem_are_not_more_problems() -> None:
    once = point(*[[1.0]] * 30, *[[0.0]] * 10)
    eightfold = point(*[[1.0] * 8] * 30, *[[0.0] * 8] * 10)
    assert eightfold.standard_error == pytest.approx(once.standard_error)


def test_the_error_is_that_of_means_over_problems() -> None:
    draw = np.random.default_rng(0).integers(0, 2, (50, 4)).astype(float)
    found = point(*draw.tolist())
    assert found.accuracy == pytest.approx(draw.mean())
    assert found.standard_error == pytest.approx(draw.mean(axis=1).std() / math.sqrt(50))
    assert found.facts()["pass_any"] == draw.max(axis=1).mean()


def test_what_no_grader_judged_says_nothing_about_the_error() -> None:
    failed = make_rollout(0.0, error="timeout")
    found = point(*[[1.0]] * 9, [0.0])
    before = found.standard_error
    for _ in range(5):
        found.add(make_group(rollouts=(failed,), kind="eval"))
    assert (found.errors, found.rollouts) == (5, 10)
    assert found.standard_error == before
    assert math.isnan(point().standard_error)


def test_each_source_has_an_accuracy_of_its_own() -> None:
    found = Evaluation()
    for rewards, source in (([1.0, 0.0], "sums"), ([1.0, 1.0], "words"), ([0.0, 0.0], "sums")):
        found.add(make_group(rewards, kind="eval", source=source))
    assert found.by_source == {"sums": 0.25, "words": 1.0}
    assert found.accuracy == 0.5
