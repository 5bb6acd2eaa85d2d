"""What a step says about itself: importance by lag, and the entropy law.

The law: with c_i = dLoss/dl_i and learning rate eta a step moves the entropy at token i, to
first order and as if its logits were its own (no shared weights, plain gradient descent), by

    dH_i = eta c_i (S_i - N_i)        S = q (H + ln q)    N = Σ p² (H + ln p)

so the sign and the relative size mean something, the absolute size does not: the step logs the
sum over its tokens (a mean per token: c holds the 1 / tokens) beside the mean change that
happened, with their running correlation and slope. The gradient of an entropy bonus does not
pass through l and is not part of the prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.loss import clipped, old, proximal, ratio, rows
from learner.table import Table

Metrics = dict[str, float | dict[str, float]]

# (sign of the advantage, sign of q - exp(-H)): where a token's push on the entropy comes from
QUADRANTS = ("A+ likely", "A+ unlikely", "A- likely", "A- unlikely")


class Law:
    """Running sums of (predicted, realised) pairs."""

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self.sums = sums or dict.fromkeys(("n", "x", "y", "xx", "yy", "xy"), 0.0)

    def add(self, predicted: float, realised: float) -> None:
        x, y = predicted, realised
        new = {"n": 1.0, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
        self.sums = {k: self.sums[k] + v for k, v in new.items()}

    def metrics(self) -> Metrics:
        """Correlation and slope (realised / predicted) of the pairs so far; from the third on."""
        s = self.sums
        xx, yy = s["n"] * s["xx"] - s["x"] ** 2, s["n"] * s["yy"] - s["y"] ** 2
        xy = s["n"] * s["xy"] - s["x"] * s["y"]
        if s["n"] < 3 or xx <= 0 or yy <= 0:
            return {}
        return {"entropy_correlation": xy / math.sqrt(xx * yy), "entropy_slope": xy / xx}


def predicted(table: Table, c: Tensor, lr: float) -> Tensor:
    """First-order entropy change at every token, float32 [T]."""
    return lr * c * (table.S - table.N)


def entropy_forecast(table: Table, c: Tensor, lr: float) -> Metrics:
    """The prediction Σ dH_i, in parts that add up to it.

    c_i holds the token's share of the loss (1 / tokens), so the sum is a mean per token.
    """
    on = table.mask & ~table.aux
    change = torch.where(on, predicted(table, c, lr), 0.0).double()
    likely = table.logp > -table.H
    good = table.advantage > 0
    bad = table.advantage < 0
    sets = (good & likely, good & ~likely, bad & likely, bad & ~likely)
    return {
        "entropy_predicted": float(change.sum()),
        "entropy_predicted_up": float(change.clamp(min=0).sum()),
        "entropy_predicted_down": float(change.clamp(max=0).sum()),
        "entropy_quadrants": {
            name: float(change[which].sum()) for name, which in zip(QUADRANTS, sets, strict=True)
        },
    }


def by_lag(table: Table, config: LearnerConfig) -> Metrics:
    """Ratio, clipping, effective sample size, KL and entropy of the tokens, by their lag."""
    on = table.mask & ~table.aux
    t = table.take(on.nonzero().squeeze(1))
    lp = proximal(t.logp, t.lp, t.lb, t.lag, config)
    r = rows(t.logp, lp, t.lb, t.mask, t.row, config).ratio
    if r is None:
        r = ratio(t.logp, old(lp, t.lb, config))
    w = ratio(t.logp, t.lb).double()
    log_w = (t.logp - t.lb).double()
    n = _sums(torch.ones_like(w), t.lag)
    keep = n > 0
    means = {
        "ratio": _sums(r, t.lag) / n,
        "clipped": _sums(clipped(r, t.advantage, config).double(), t.lag) / n,
        "ess": _sums(w, t.lag) ** 2 / (n * _sums(w * w, t.lag)),
        # the non-negative estimator from samples of the behaviour policy: E[w - 1 - ln w] = KL(b‖p)
        "kl": _sums(w - 1 - log_w, t.lag) / n,
        "entropy_by_lag": _sums(t.H, t.lag) / n,
        # σ of S = q (H + ln q), and the mean of S - N under w: 0 where w corrects for all staleness
        "discriminator_std": (_sums(t.S**2, t.lag) / n - (_sums(t.S, t.lag) / n) ** 2)
        .clamp(min=0)
        .sqrt(),
        "discriminator_drift": _sums(w * (t.S - t.N), t.lag) / n,
    }
    found: Metrics = {k: _named(v, keep) for k, v in means.items()}
    total = max(1, len(w))
    found["ess_share"] = float(w.sum() ** 2 / (total * (w * w).sum())) if len(w) else 1.0
    found["entropy"] = float(t.H.double().sum()) / total
    return found


def rollouts_by_lag(batch: Batch) -> Metrics:
    """Reward and length of the main rollouts, by rollout lag; reward of the aux rollouts."""
    main = batch.row_group < batch.main_groups
    lag = torch.from_numpy(batch.row_lag[main])
    n = _sums(torch.ones(len(lag)), lag)
    reward = torch.from_numpy(batch.reward[main])
    length = torch.from_numpy(batch.row_trained[main])
    found: Metrics = {
        "reward": float(reward.mean()) if len(reward) else 0.0,
        "reward_by_lag": _named(_sums(reward, lag) / n, n > 0),
        "length_by_lag": _named(_sums(length, lag) / n, n > 0),
    }
    if not main.all():
        asked = [i.ticket.sampling.temperature for i in batch.items[batch.main_groups :]]
        found["aux_rollouts"] = float((~main).sum())
        found["aux_reward"] = float(batch.reward[~main].mean())
        found["aux_temperature"] = math.fsum(asked) / len(asked)
    return found


def _sums(values: Tensor, lag: Tensor) -> Tensor:
    """float64 [largest lag + 1]"""
    return torch.bincount(lag.cpu(), values.double().cpu())


def _named(values: Tensor, keep: Tensor) -> dict[str, float]:
    return {str(i): float(values[i]) for i in keep.nonzero().squeeze(1).tolist()}
