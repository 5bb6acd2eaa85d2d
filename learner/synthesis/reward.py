"""What a proposal is worth, from the share p of right answers to it. Pure numbers.

diversity   a stand-in for Syn-GRPO's reward (arXiv 2511.19343), whose formula is not public:
            d = 4 p (1 − p), the variance of its answers as a share of the largest one, compared
            with a baseline that follows what proposals have been like
svs         SvS (arXiv 2508.14029): 1 for a problem of the accepted difficulty
r_zero      R-Zero (arXiv 2508.05004): min(s, 1 − s) for the share s of the majority's answer, less
            the share of proposals that are like this one
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from learner.synthesis.config import SynthesisConfig


def diversity(p: float) -> float:
    """d(x) = 4 p (1 − p), 0…1."""
    return 4.0 * p * (1.0 - p)


def smoothed(baseline: float | None, values: Sequence[float], smoothing: float) -> float | None:
    """b ← β b + (1 − β) mean d; the first values are the first baseline."""
    if not values:
        return baseline
    mean = math.fsum(values) / len(values)
    return mean if baseline is None else smoothing * baseline + (1.0 - smoothing) * mean


def deviation(p: float, baseline: float, clip: float) -> float:
    """clip(d(x) − b, −c, c)"""
    return max(-clip, min(clip, diversity(p) - baseline))


def in_band(p: float, band: tuple[float, float]) -> bool:
    return band[0] <= p <= band[1]


def r_zero(share: float, cluster: float) -> float:
    """min(s, 1 − s) − share of the cluster. An unusable proposal is worth −1 − share."""
    return min(share, 1.0 - share) - cluster


def worth(
    p: float, *, cluster: float, baseline: float, config: SynthesisConfig, duplicate: bool = False
) -> float:
    """The reward of a proposal that was scored p. Nothing else of it matters, nor its length."""
    if config.reward == "svs":
        return float(in_band(p, config.accept))
    if config.reward == "r_zero":
        return r_zero(p, cluster)
    taken_off = config.duplicate * duplicate + config.unsolved * (p == 0.0)
    return deviation(p, baseline, config.clip) - taken_off


def unusable(cluster: float, config: SynthesisConfig) -> float:
    return -1.0 - cluster if config.reward == "r_zero" else config.unusable


def label_confidence(
    right: int, *, rollouts: int = 8, error: float = 0.3, solve: float = 0.4, hit: float = 0.05
) -> float:
    """P(an inherited label is right | `right` of `rollouts` answers agree with it), by Bayes.

    `error` is the share of wrong labels before; a right label is reached with probability `solve`,
    a wrong one by accident with `hit`.
    """
    ok = (1 - error) * solve**right * (1 - solve) ** (rollouts - right)
    wrong = error * hit**right * (1 - hit) ** (rollouts - right)
    return ok / (ok + wrong)


def majority_right(q: float, rollouts: int) -> float:
    """P(a strict majority of `rollouts` answers is right), each right with probability q and all
    wrong ones alike.
    """
    least = rollouts // 2 + 1
    terms = (
        math.comb(rollouts, k) * q**k * (1 - q) ** (rollouts - k)
        for k in range(least, rollouts + 1)
    )
    return math.fsum(terms)
