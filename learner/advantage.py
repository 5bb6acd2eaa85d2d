"""Advantages: how much better than its group a rollout did. Pure functions of the rewards.

    grpo      (r - mean) / (std + 1e-6), std with ddof 1        arXiv 2402.03300
    dr_grpo   r - mean                                          arXiv 2503.20783, with `constant`
    rloo      r - mean of the others = n / (n - 1) (r - mean)   arXiv 2402.14740
    psr_nsr   psr_weight where right, -1 where wrong            arXiv 2506.01347 (W-REINFORCE)

The last compares with nobody: it sees whether an answer is right, and learns from groups that are
all right or all wrong as well (with psr_weight 0 from wrong answers only). With the others a
rollout alone in its group has nothing to be compared with: advantage 0.
"""

from __future__ import annotations

import numpy as np

from common import wire

_EPSILON = 1e-6
_RIGHT = 0.5  # raw correctness above it is right
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "psr_nsr")


def advantages(
    reward: np.ndarray, group: np.ndarray, estimator: str, psr_weight: float = 0.1
) -> np.ndarray:
    """float64 [R] from rewards [R] and group numbers [R] (0, 1, …); psr_nsr wants raw correctness
    for a reward.
    """
    if reward.size == 0:
        return np.zeros(0)
    if estimator == "psr_nsr":
        return np.where(reward > _RIGHT, psr_weight, -1.0)
    n = np.bincount(group)
    mean = np.bincount(group, reward) / np.maximum(n, 1)
    centred: np.ndarray = reward - mean[group]
    others = np.maximum(n - 1, 1)[group]
    if estimator == "dr_grpo":
        return centred
    if estimator == "rloo":
        alone: np.ndarray = n[group] == 1
        return np.where(alone, 0.0, centred * n[group] / others)
    assert estimator == "grpo", f"no advantage estimator {estimator!r}"
    std = np.sqrt(np.bincount(group, centred**2)[group] / others)
    scaled: np.ndarray = centred / (std + _EPSILON)
    return scaled


def informative(group: wire.Group, estimator: str, gamma: float = 1.0) -> bool:
    """Whether the estimator can learn from this group: its answers are not all equally right, or
    that does not matter to it. One that came at a later turn is gamma per turn less right.

    It looks at the raw correctness, for equality: a shaped reward may differ where nothing was
    solved, and the standard deviation of equal floats need not be 0.
    """
    assert estimator in ESTIMATORS, f"no advantage estimator {estimator!r}"
    return estimator == "psr_nsr" or len({r.correct * gamma**r.turn for r in group.rollouts}) > 1
