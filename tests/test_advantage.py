import math

import numpy as np
import pytest

from learner.advantage import advantages, informative
from tests.builders import make_group, make_rollout

REWARDS = np.array([1.0, 0, 0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("estimator", "success", "failure"),
    [("grpo", 1.620182, -0.540061), ("dr_grpo", 0.75, -0.25), ("rloo", 0.857143, -0.285714)],
)
def test_two_of_eight_give_the_published_advantages(
    estimator: str, success: float, failure: float
) -> None:
    found = advantages(REWARDS, np.zeros(8, int), estimator)
    np.testing.assert_allclose(found, np.where(REWARDS == 1, success, failure), atol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_groups_do_not_see_each_other_and_a_lone_rollout_has_advantage_zero(
    estimator: str,
) -> None:
    group = np.array([0] * 8 + [1] + [2, 2])
    found = advantages(np.concatenate([REWARDS, [7.0], [0.5, 0.5]]), group, estimator)
    np.testing.assert_array_equal(found[:8], advantages(REWARDS, np.zeros(8, int), estimator))
    np.testing.assert_array_equal(found[8:], 0)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_the_filter_looks_at_correctness_by_equality_not_at_shaped_rewards(
    estimator: str,
) -> None:
    shaped = tuple(make_rollout(0.0, parts=({"correct": 0.0, "brevity": b},)) for b in (0.1, 0.2))
    assert not informative(make_group([0, 0], rollouts=shaped), estimator)
    assert not informative(make_group([0.1 + 0.2, 0.1 + 0.2]), estimator)
    assert informative(make_group([1, 0, 0]), estimator)


@pytest.mark.parametrize(
    ("size", "useful"),
    [
        (4, (0.039404, 0.185488, 0.343800, 0.751800, 0.875000, 0.343800, 0.039404)),
        (8, (0.077255, 0.336580, 0.569533, 0.942286, 0.992188, 0.569533, 0.077255)),
        (16, (0.148542, 0.559873, 0.814698, 0.996677, 0.999969, 0.814698, 0.148542)),
    ],
)
def test_a_group_is_useful_as_often_as_published(size: int, useful: tuple[float, ...]) -> None:
    """1 - p^G - (1 - p)^G (DAPO, arXiv 2503.14476): over the numbers of right answers that a group
    may have, and what the filter says of each."""
    kept = [informative(make_group([1] * k + [0] * (size - k)), "grpo") for k in range(size + 1)]

    def chance(p: float) -> float:
        ways = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
        return math.fsum(way for way, keep in zip(ways, kept, strict=True) if keep)

    found = [chance(p) for p in (0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99)]
    assert found == pytest.approx(useful, abs=1e-6)


def test_the_published_groups_are_filtered_as_published() -> None:
    groups = ([1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0])
    kept = [informative(make_group(rewards), "grpo") for rewards in groups]
    assert kept == [False, True, False, True]
