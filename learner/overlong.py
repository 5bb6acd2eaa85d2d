"""Answers near the limit: a soft penalty on their length, and cut ones kept out of the loss.

    R(L) = 0                     L <= Lm - Lc
           ((Lm - Lc) - L) / Lc  up to Lm          DAPO, arXiv 2503.14476, eq. 13
           -1                    above

Lm is `learner.max_tokens`, Lc the `buffer`. verl's form is not held at -1. PipelineRL weighs it by
difficulty: the penalty of a right answer × p^`difficulty`, p being the share of its group that is
right, that of a wrong one × `failure_scale`; an answer that ended at the limit has all of it.

The raw correctness stays as it is, and with it which groups are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from common import wire
from common.config import NotNegative, Positive, PositiveInt, Section, need

_RIGHT = 0.5  # raw correctness above it is right


class OverlongConfig(Section, frozen=True, kw_only=True):
    buffer: PositiveInt | None = None  # tokens before max_tokens; None: no penalty
    form: Literal["dapo", "verl"] = "dapo"
    factor: Positive = 1.0  # × the penalty
    difficulty: NotNegative = 0.0  # 0: the penalty of all right answers is whole
    failure_scale: NotNegative = 1.0
    mask: bool = False  # cut answers count in their group's mean and teach nothing themselves

    def check(self) -> None:
        need(
            self.buffer is not None or self.mask,
            "buffer: nothing is asked for; give it, or mask = true, or leave the table out",
        )


def length_penalty(length: int, limit: int, buffer: int, form: str = "dapo") -> float:
    """R(L) of one answer of `length` tokens, at most 0."""
    beyond = (limit - buffer - length) / buffer
    return min(0.0, beyond if form == "verl" else max(-1.0, beyond))


def penalties(group: wire.Group, config: OverlongConfig, limit: int) -> list[float]:
    """What is added to the reward of each rollout of the group; `limit` in tokens."""
    if config.buffer is None:
        return [0.0] * len(group.rollouts)
    right = [rollout.correct > _RIGHT and not rollout.error for rollout in group.rollouts]
    ease = (sum(right) / len(right)) ** config.difficulty
    found = []
    for rollout, is_right in zip(group.rollouts, right, strict=True):
        penalty = length_penalty(_length(rollout), limit, config.buffer, config.form)
        if rollout.finish == "length":
            found.append(config.factor * min(-1.0, penalty))
        else:
            found.append(config.factor * (ease if is_right else config.failure_scale) * penalty)
    return found


def _length(rollout: wire.Rollout) -> int:
    """Tokens of its last turn that the policy wrote: `max_tokens` is for each turn."""
    last = rollout.segments[-1].turn
    turn = [s for s in rollout.segments if s.turn == last and s.role == "policy"]
    return sum(s.tokens.size for s in turn)


def is_masked(rollout: wire.Rollout, config: OverlongConfig | None) -> bool:
    """Whether its tokens are kept out of the loss."""
    return config is not None and config.mask and rollout.finish == "length"


def facts(groups: Sequence[wire.Group], config: OverlongConfig, limit: int) -> dict[str, float]:
    """Mean penalty of the rollouts, and the share of them whose tokens are left out."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = max(1, len(rollouts))
    lost = sum(sum(penalties(group, config, limit)) for group in groups)
    masked = sum(is_masked(rollout, config) for rollout in rollouts)
    return {"penalty": lost / count, "masked": masked / count}
