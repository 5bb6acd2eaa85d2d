"""What the comparison with a peer calls "reached"."""

from __future__ import annotations

import math

import pytest

from scripts.benches._peer_judge import Curve, crossing


def curve(*accuracy: float) -> Curve:
    """Evaluated every 2 steps; a step takes 3 seconds and 16 groups."""
    steps = range(2 * len(accuracy))
    return Curve(
        seconds={t: 3.0 * t for t in steps[1:]},
        weights={},
        groups={t: 16 * t for t in steps[1:]},
        others=0.0,
        accuracy={2 * i: value for i, value in enumerate(accuracy)},
    )


def test_the_time_to_the_goal_is_interpolated_between_two_evaluations() -> None:
    found = crossing(curve(0.4, 0.7, 0.9, 0.95))
    assert found.step == pytest.approx(3.0)
    assert found.seconds == pytest.approx(9.0)


def test_a_single_lucky_evaluation_does_not_reach_the_goal() -> None:
    found = crossing(curve(0.4, 0.81, 0.79, 0.85, 0.9))
    assert 4 < found.step < 6


def test_a_goal_that_is_not_reached_is_no_number() -> None:
    assert math.isnan(crossing(curve(0.4, 0.5, 0.6)).seconds)
