"""What the comparison with a peer calls "reached"."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[1] / "scripts" / "benches" / "peer.py"


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_peer", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def curve(peer: ModuleType, *accuracy: float) -> object:
    """Evaluated every 2 steps; a step takes 3 seconds and 16 groups."""
    steps = range(2 * len(accuracy))
    return peer.Curve(
        seconds={t: 3.0 * t for t in steps[1:]},
        weights={},
        groups={t: 16 * t for t in steps[1:]},
        others=0.0,
        accuracy={2 * i: value for i, value in enumerate(accuracy)},
    )


def test_the_time_to_the_goal_is_interpolated_between_two_evaluations(peer: ModuleType) -> None:
    found = peer.crossing(curve(peer, 0.4, 0.7, 0.9, 0.95))
    assert found.step == pytest.approx(3.0)
    assert found.seconds == pytest.approx(9.0)


def test_a_single_lucky_evaluation_does_not_reach_the_goal(peer: ModuleType) -> None:
    found = peer.crossing(curve(peer, 0.4, 0.81, 0.79, 0.85, 0.9))
    assert 4 < found.step < 6


def test_a_goal_that_is_not_reached_is_no_number(peer: ModuleType) -> None:
    assert math.isnan(peer.crossing(curve(peer, 0.4, 0.5, 0.6)).seconds)
