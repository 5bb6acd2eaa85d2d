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
