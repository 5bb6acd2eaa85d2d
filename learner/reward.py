"""From the parts of a verdict to the number that is learned from. Pure functions of the group."""

from __future__ import annotations

import math
from collections.abc import Callable

from common import wire
from common.episodes import PLAIN
from learner.config import LearnerConfig
from learner.item import Item
from learner.overlong import penalties

Score = Callable[[Item], list[float]]  # the reward of each rollout of a group

_PLAIN = wire.Grading()
_RIGHT = 0.5  # raw correctness above it is right


def scores(item: Item) -> list[float]:
    """Of the verdicts alone."""
    gamma = (item.ticket.episode or PLAIN).gamma
    return [reward(rollout, item.ticket.grading, gamma) for rollout in item.group.rollouts]


def scorer(config: LearnerConfig) -> Score:
    """Of the verdicts and of what `config` adds to them. Only main groups are shaped."""
    overlong, limit = config.overlong, config.max_tokens
    if overlong is None:
        return scores

    def shaped(item: Item) -> list[float]:
        if item.ticket.kind != "main":
            return scores(item)
        added = penalties(item.group, overlong, limit)
        return [r + penalty for r, penalty in zip(scores(item), added, strict=True)]

    return shaped


def reward(rollout: wire.Rollout, grading: wire.Grading = _PLAIN, gamma: float = 1.0) -> float:
    """Weighted sum of the parts of the last turn (weights and gates are the ticket's); the raw
    correctness where nothing was graded in parts. The correctness, which is the first part, counts
    gamma^turn.
    """
    worth = gamma**rollout.turn
    if not rollout.parts:
        return rollout.correct * worth
    first = next(iter(rollout.parts[-1]))
    right = rollout.correct > _RIGHT
    weights = {p.name: p.weight if right or not p.gated else 0.0 for p in grading.parts}
    return math.fsum(
        weights.get(k, 1.0) * v * (worth if k == first else 1.0)
        for k, v in rollout.parts[-1].items()
    )
