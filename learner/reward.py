"""From the parts of a verdict to the number that is learned from. A pure function of the group."""

from __future__ import annotations

import math

from common import wire

_PLAIN = wire.Grading()


def reward(rollout: wire.Rollout, grading: wire.Grading = _PLAIN) -> float:
    """Weighted sum of the parts of the last turn (the weights are the ticket's); the raw
    correctness where nothing was graded in parts.
    """
    if not rollout.parts:
        return rollout.correct
    weights = {part.name: part.weight for part in grading.parts}
    return math.fsum(weights.get(k, 1.0) * v for k, v in rollout.parts[-1].items())
