"""Losses of single tokens and how they are summed. Pure functions of 1-D columns; knows no method.

With l the current, lp the proximal and lb the behaviour log-prob of a token:

    ppo            r = exp(l - lb)   max(-A r, -A clip(r))     the behaviour policy is "old"
    decoupled_ppo  r = exp(l - lp)   w max(-A r, -A clip(r))   arXiv 2505.24298
    reinforce                        -w A l

w is the importance weight exp(lp - lb), detached: not applied (`none`), capped from above
(`truncate`: min(w, high)), or set to zero outside [low, high] (`mask`). `ppo` already holds it
in its ratio, so it takes no correction. The proximal policy is the one at the start of the step:
before the first update lp = l, the ratio of `decoupled_ppo` is 1 and its clip acts from the
second update on.

The total is Σ scale · weight · loss over the tokens, with global counts in `scale` (all micro-
batches, all ranks). Weights and dropped tokens do not change the counts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.config import LearnerConfig

# Far outside every clip, near enough to stay finite in float32.
_MAX_LOG_RATIO = 20.0


def ratio(logp: Tensor, old: Tensor) -> Tensor:
    return (logp - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def correction(lp: Tensor, lb: Tensor, config: LearnerConfig) -> Tensor:
    """The importance weight w [T] as the configuration wants it; no gradient."""
    if config.correction == "none":
        return torch.ones_like(lb)
    w = ratio(lp.detach(), lb)
    if config.correction == "truncate":
        return w.clamp(max=config.correction_high)
    inside = (w >= config.correction_low) & (w <= config.correction_high)
    return torch.where(inside, w, 0.0)


def surrogate(
    logp: Tensor, lp: Tensor, lb: Tensor, advantage: Tensor, config: LearnerConfig
) -> Tensor:
    """Loss of every token [T], to be minimised; differentiable in `logp`."""
    if config.loss == "reinforce":
        return -correction(lp, lb, config) * advantage * logp
    if config.loss == "ppo":
        return _clipped(ratio(logp, lb), advantage, config)
    return correction(lp, lb, config) * _clipped(ratio(logp, lp.detach()), advantage, config)


def _clipped(r: Tensor, advantage: Tensor, config: LearnerConfig) -> Tensor:
    loss = -advantage * r
    if config.clip_low is not None or config.clip_high is not None:
        low = None if config.clip_low is None else 1 - config.clip_low
        high = None if config.clip_high is None else 1 + config.clip_high
        loss = torch.maximum(loss, -advantage * r.clamp(low, high))
    if config.dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * config.dual_clip), loss)
    return loss


def clipped(r: Tensor, advantage: Tensor, config: LearnerConfig) -> Tensor:
    """bool [T]: tokens that the clip takes out of the gradient."""
    if config.loss == "reinforce":
        return torch.zeros_like(r, dtype=torch.bool)
    out = torch.zeros_like(r, dtype=torch.bool)
    if config.clip_high is not None:
        out |= (advantage > 0) & (r > 1 + config.clip_high)
    if config.clip_low is not None:
        out |= (advantage < 0) & (r < 1 - config.clip_low)
    if config.dual_clip is not None:
        out |= (advantage < 0) & (r > config.dual_clip)
    return out


def scale(
    mask: Tensor,
    row: Tensor,
    aggregation: Literal["token_mean", "seq_mean", "constant"],
    constant: int,
) -> Tensor:
    """Share of every token [T] in the total, 0 where masked.

    token_mean   1 / tokens                       every token counts the same
    seq_mean     1 / (rollouts · its length)      every rollout counts the same
    constant     1 / (rollouts · constant)        no length in the denominator (Dr. GRPO)

    `mask` and `row` are the columns of the whole batch; rollouts without a token to train on
    count for nothing. An empty batch has a total of 0.
    """
    m = mask.float()
    if aggregation == "token_mean":
        return m / m.sum().clamp(min=1)
    rows = int(row.max()) + 1 if row.numel() else 0
    length = torch.zeros(rows, device=m.device).index_add_(0, row, m)
    rollouts = (length > 0).sum().clamp(min=1)
    if aggregation == "constant":
        return m / (rollouts * constant)
    return m / (rollouts * length.clamp(min=1)[row])
