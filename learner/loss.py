"""Losses of single tokens and how they are summed. Pure functions of 1-D columns; knows no method.

With l the current, lp the proximal and lb the behaviour log-prob of a token:

    ppo            r = exp(l - lb)            max(-A r, -A clip(r))      lb is "old"
    decoupled_ppo  r = exp(l - lp)          w max(-A r, -A clip(r))      arXiv 2505.24298
    gspo           r = exp(mean_t (l - lp)) w max(-A r, -A clip(r))      arXiv 2507.18071
    cispo          r = sg[exp(l - lp)]     -w A clip(r) l                arXiv 2506.13585
    sapo           r = exp(l - lp)         -w A (4 / τ) σ(τ (r - 1))     arXiv 2511.20347
    reinforce                              -w A l

w is the importance weight exp(lp - lb), detached: not applied (`none`), capped from above
(`truncate`: min(w, high)), or set to zero outside [low, high] (`mask`); of the token, or the
product over its rollout (`correction_level`). `ppo` already holds it in its ratio, so it takes no
correction. The proximal policy is the one at the start of the step: before the first update lp = l,
ratios to it are 1 and their clips act from the second update on. Or it is guessed as the version
before (`proximal = "log_linear"`): between lb and l, by the token's lag.

What belongs to a whole rollout (`Rows`) is made from the whole table before the first gradient of
an update, and is detached: gspo's ratio is then sg[r] exp(l - sg[l]), so that every token's own l
carries its gradient.

The total is Σ scale · weight · loss over the tokens, with global counts in `scale` (all micro-
batches, all ranks). Weights and dropped tokens do not change the counts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from learner.config import LearnerConfig

# Far outside every clip, near enough to stay finite in float32.
_MAX_LOG_RATIO = 20.0


class Rows(NamedTuple):
    """What a token has from its whole rollout: [T], no gradient; None: not wanted, or 1."""

    ratio: Tensor | None = None  # gspo: exp(mean over its tokens of l - lp)
    w: Tensor | None = None  # correction_level "sequence": the importance weight

    def take(self, index: Tensor | slice) -> Rows:
        ratio, w = (None if column is None else column[index] for column in self)
        return Rows(ratio, w)


_NO_ROWS = Rows()


def rows_wanted(config: LearnerConfig, first: bool) -> bool:
    """Whether this update needs l, or lp, of whole rollouts before its first gradient."""
    by_row = config.correction != "none" and config.correction_level == "sequence"
    return by_row if first else config.loss == "gspo"


def rows(
    logp: Tensor | None, lp: Tensor, lb: Tensor, mask: Tensor, row: Tensor, config: LearnerConfig
) -> Rows:
    """`logp` None: no ratio has moved yet. `mask`, `row`: columns of the whole batch."""
    r = w = None
    if config.loss == "gspo" and logp is not None:
        r = _bounded(_sum_of_row(logp.detach() - lp, mask, row, mean=True))
    if config.correction != "none" and config.correction_level == "sequence":
        w = _corrected(_bounded(_sum_of_row(lp.detach() - lb, mask, row, mean=False)), config)
    return Rows(r, w)


def _sum_of_row(values: Tensor, mask: Tensor, row: Tensor, mean: bool) -> Tensor:
    """[T]: every token's sum (or mean) of `values` over the trained tokens of its rollout."""
    count = int(row.max()) + 1 if row.numel() else 0
    zero = values.new_zeros(count)
    total = zero.index_add(0, row, values.masked_fill(~mask, 0.0))
    if mean:
        total = total / zero.index_add(0, row, mask.to(values.dtype)).clamp(min=1)
    return total[row]


def ratio(logp: Tensor, old: Tensor) -> Tensor:
    return _bounded(logp - old)


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def old(lp: Tensor, lb: Tensor, config: LearnerConfig) -> Tensor:
    """The log-prob that the loss' ratio divides by."""
    return lb if config.loss in ("ppo", "reinforce") else lp


def proximal(logp: Tensor, lp: Tensor, lb: Tensor, lag: Tensor, config: LearnerConfig) -> Tensor:
    """The proximal log-prob as the configuration wants it; no gradient.

    log_linear: lb + (lag - 1) / lag (l - lb), the version before the trained one on a straight line
    from the version that sampled the token (lag versions back) to now; lb itself at lag 0.
    """
    if config.proximal == "recomputed":
        return lp.detach()
    share = (lag - 1).clamp(min=0) / lag.clamp(min=1)
    return torch.lerp(lb, logp.detach(), share.to(logp.dtype))


def correction(lp: Tensor, lb: Tensor, config: LearnerConfig) -> Tensor:
    """The importance weight w [T] of single tokens as the configuration wants it; no gradient."""
    if config.correction == "none":
        return torch.ones_like(lb)
    return _corrected(ratio(lp.detach(), lb), config)


def _corrected(w: Tensor, config: LearnerConfig) -> Tensor:
    if config.correction == "truncate":
        return w.clamp(max=config.correction_high)
    inside = (w >= config.correction_low) & (w <= config.correction_high)
    return torch.where(inside, w, 0.0)


def surrogate(
    logp: Tensor,
    lp: Tensor,
    lb: Tensor,
    advantage: Tensor,
    config: LearnerConfig,
    of_row: Rows = _NO_ROWS,
) -> Tensor:
    """Loss of every token [T], to be minimised; differentiable in `logp`."""
    w = correction(lp, lb, config) if of_row.w is None else of_row.w
    if config.loss == "reinforce":
        return -w * advantage * logp
    if config.loss == "ppo":
        return _clipped(ratio(logp, lb), advantage, config)
    r = ratio(logp, lp.detach())
    if config.loss == "gspo":
        own = (logp - logp.detach()).exp()
        return w * _clipped(own if of_row.ratio is None else of_row.ratio * own, advantage, config)
    if config.loss == "cispo":
        return -w * advantage * _clip(r.detach(), config) * logp
    if config.loss == "sapo":
        up, down = config.sapo_tau
        tau = torch.where(advantage > 0, up, down).to(r.dtype)
        return -w * advantage * (4 / tau) * torch.sigmoid(tau * (r - 1))
    return w * _clipped(r, advantage, config)


def _clip(r: Tensor, config: LearnerConfig) -> Tensor:
    low = None if config.clip_low is None else 1 - config.clip_low
    high = None if config.clip_high is None else 1 + config.clip_high
    return r if low is None and high is None else r.clamp(low, high)


def _clipped(r: Tensor, advantage: Tensor, config: LearnerConfig) -> Tensor:
    loss = -advantage * r
    if config.clip_low is not None or config.clip_high is not None:
        loss = torch.maximum(loss, -advantage * _clip(r, config))
    if config.dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * config.dual_clip), loss)
    return loss


def clipped(r: Tensor, advantage: Tensor, config: LearnerConfig) -> Tensor:
    """bool [T]: tokens that the clip takes out of the gradient."""
    out = torch.zeros_like(r, dtype=torch.bool)
    if config.loss in ("reinforce", "cispo", "sapo"):
        return out
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
