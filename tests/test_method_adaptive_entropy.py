"""The adaptive entropy bonus: its golden run, its bounds, its state."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from learner.config import LearnerConfig
from learner.methods.adaptive_entropy import AdaptiveEntropy
from learner.model import Policy
from learner.state import state_of
from tests.builders import tiny_model
from tests.tables import golden, make_table
from tests.test_methods import bits, train

RUN = [0.5, 0.3, 0.19, 0.15, 0.18, 0.21, 0.2, 0.17]


def played(method: AdaptiveEntropy) -> tuple[list[float], float]:
    """(c, a) of every step, flat, and the last c."""
    state, seen = method.initial(), []
    for entropy in RUN:
        t = make_table([-1.0] * 4, 1.0, H=entropy)
        seen += [state["c"], method.govern(t, t.logp, state).bonus]
        state = method.observe(state, {"entropy": entropy})
    return seen, state["c"]


def test_the_golden_run_comes_out() -> None:
    seen, last = played(AdaptiveEntropy())
    golden(seen, "GV12.skywork")  # type: ignore[arg-type]
    golden(last, "GV12.final")


def test_with_the_previous_entropy_it_needs_no_table_and_acts_one_step_later() -> None:
    method = AdaptiveEntropy(signal="previous")
    assert not method.needs_table
    assert AdaptiveEntropy().needs_table
    state, seen = method.initial(), []
    for entropy in RUN:
        seen.append(method.govern(None, None, state).bonus)
        state = method.observe(state, {"entropy": entropy})
    assert seen == pytest.approx([0, 0, 0, 0.005, 0.01, 0.015, 0, 0.01])


def test_the_coefficient_stays_within_its_bounds() -> None:
    method = AdaptiveEntropy(start=0.4, delta=0.3, most=0.5)
    up = method.observe(method.initial(), {"entropy": 0.1})
    assert up["c"] == 0.5
    down = method.observe({"c": 0.1, "entropy": 0.1}, {"entropy": 0.9})
    assert down["c"] == 0.0
    with pytest.raises(ConfigError, match=r"adaptive_entropy.start = 2 is above most = 1"):
        AdaptiveEntropy(start=2.0).check()


@pytest.mark.parametrize("signal", ["current", "previous"])
def test_in_a_step_it_is_a_bonus_that_grows_below_the_target(signal: Any) -> None:
    method = AdaptiveEntropy(target=3.0, delta=0.01, signal=signal)  # the tiny model is below
    state, report = train([method], steps=4)
    own = state.methods_state["adaptive_entropy"]
    assert own["c"] == pytest.approx(0.04)
    assert own["entropy"] == report.metrics["entropy"]
    assert report.metrics["entropy_bonus"] == pytest.approx(0.03)
    assert report.metrics["methods/adaptive_entropy/coefficient"] == pytest.approx(0.03)
    assert report.metrics["methods/adaptive_entropy/target"] == 3.0


def test_off_or_above_its_target_it_is_the_empty_list_bit_for_bit() -> None:
    plain = bits(train([])[0])
    assert bits(train([AdaptiveEntropy(delta=0.0)])[0]) == plain
    assert bits(train([AdaptiveEntropy(target=1e-9, start=0.5)])[0]) == plain


def test_a_target_above_the_largest_entropy_is_refused_at_the_start() -> None:
    config = LearnerConfig(methods=(AdaptiveEntropy(target=math.log(32) + 0.01),))
    with pytest.raises(ConfigError, match=r"'adaptive_entropy': target = 3.47574 nats is above"):
        state_of(Policy(tiny_model(), config), RunConfig(), config)
