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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.loss import clipped, correction, old, proximal, ratio, rows
from learner.methods.base import moments
from learner.table import Table

Metrics = dict[str, float | dict[str, float]]

# (sign of the advantage, sign of q - exp(-H)): where a token's push on the entropy comes from
QUADRANTS = ("A+ likely", "A+ unlikely", "A- likely", "A- unlikely")


_ALARM = 0.1  # of the deviation of w r (S - N)
_CHANCE = 4.0  # standard errors


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
    return _change("entropy_predicted", predicted(table, c, lr), table)


def entropy_change(table: Table, after: Tensor) -> Metrics:
    """The same parts of what happened: the mean change per main token, given their H afterwards."""
    change = (after - table.H) / max(1, int(table.main.sum()))
    return _change("entropy_realised", change, table)


def _change(name: str, change: Tensor, table: Table) -> Metrics:
    whole, lags = parts(change, table, table.main)
    return {
        name: whole.pop("total"),
        f"{name}_up": whole.pop("up"),
        f"{name}_down": whole.pop("down"),
        "entropy_quadrants" if name == "entropy_predicted" else f"{name}_quadrants": whole,
        f"{name}_by_lag": lags,
    }


def parts(change: Tensor, table: Table, on: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Sums of `change` float [T] where `on`: total, up, down and the quadrants; in all, and by lag
    ("LAG/PART"), where they add up to the former.
    """
    change = change.masked_fill(~on, 0.0).double()
    likely = table.logp > -table.H
    good, bad = table.advantage > 0, table.advantage < 0
    sets = (good & likely, good & ~likely, bad & likely, bad & ~likely)
    columns = {"total": change, "up": change.clamp(min=0), "down": change.clamp(max=0)}
    columns |= {name: change * which for name, which in zip(QUADRANTS, sets, strict=True)}
    keep = _sums(on, table.lag) > 0
    whole: dict[str, float] = {}
    lags: dict[str, float] = {}
    for name, column in columns.items():
        whole[name] = float(column.sum())
        of_lag = _named(_sums(column, table.lag), keep)
        lags |= {f"{lag}/{name}": value for lag, value in of_lag.items()}
    return whole, lags


def add(a: Metrics, b: Metrics) -> Metrics:
    """Metrics of two updates, added."""
    total: Metrics = dict(a)
    for key, y in b.items():
        x = total.get(key, {} if isinstance(y, dict) else 0.0)
        if isinstance(x, dict) and isinstance(y, dict):
            total[key] = {k: x.get(k, 0.0) + y.get(k, 0.0) for k in x | y}
        elif isinstance(x, float) and isinstance(y, float):
            total[key] = x + y
    return total


def by_lag(table: Table, config: LearnerConfig) -> Metrics:
    """Ratio, clipping, effective sample size, KL and entropy of the tokens, by their lag."""
    on = table.mask & ~table.aux
    t = table.take(on.nonzero().squeeze(1))
    lp = proximal(t.logp, t.lp, t.lb, t.lag, config)
    of_row = rows(t.logp, lp, t.lb, t.mask, t.row, config)
    r = ratio(t.logp, old(lp, t.lb, config)) if of_row.ratio is None else of_row.ratio
    applied = (correction(lp, t.lb, config) if of_row.w is None else of_row.w).double()
    if config.loss != "reinforce":  # which has no ratio
        applied = applied * r
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
        # σ of S = q (H + ln q), and the mean of S - N under the weights that the loss applies: 0
        # where these correct for all staleness
        "discriminator_std": (_sums(t.S**2, t.lag) / n - (_sums(t.S, t.lag) / n) ** 2)
        .clamp(min=0)
        .sqrt(),
        "discriminator_drift": _sums(applied * (t.S - t.N), t.lag) / n,
    }
    found: Metrics = {k: _named(v, keep) for k, v in means.items()}
    total = max(1, len(w))
    found["ess_share"] = float(w.sum() ** 2 / (total * (w * w).sum())) if len(w) else 1.0
    found["entropy"] = float(t.H.double().sum()) / total
    return found | _discriminators(t, applied)


def _discriminators(t: Table, applied: Tensor) -> Metrics:
    """σ of S over the tokens, and the off-policyness alarm."""
    if not len(applied):
        return {}
    _, sigma = moments(t.S, t.mask)
    mean, spread = moments(applied * (t.S - t.N), t.mask)
    return {
        "discriminator_std_all": sigma,
        "off_policy": mean / spread if spread > 0 else 0.0,
    }


def off_policy_alarm(metrics: Mapping[str, Any]) -> list[str]:
    """A line for people where the weighted mean of S - N is farther from 0 than chance explains.

    On policy it is 0 (arXiv 2602.03392, corollary 3.4). An older, flatter behaviour policy acts
    like samples of a higher temperature: it is below 0, and right answers push the entropy up.
    """
    drift, tokens = metrics.get("off_policy"), metrics.get("tokens")
    if not drift or not tokens:
        return []
    limit = max(_ALARM, _CHANCE / math.sqrt(tokens))
    if abs(drift) <= limit:
        return []
    way = "up" if drift < 0 else "down"
    return [
        f"off-policy: the mean of S - N is {drift:+.2f} of its deviations from 0 (limit "
        f"{limit:.2f}): by staleness alone right answers push the entropy {way}; lower max_lag, "
        "or take an importance correction"
    ]


def idle_alarm(metrics: Mapping[str, Any]) -> list[str]:
    """A line for people of methods that do nothing: they drop no token, or pull none.

    Clip_B and Clip_V gate themselves while the entropy is high, Clip-Cov's window may be empty,
    and KL-Cov is inert where its anchor is the policy itself.
    """
    lines = []
    for key, value in metrics.items():
        name, _, number = key.removeprefix("methods/").partition("/")
        if (number, value) == ("dropped", 0.0):
            lines.append(f"{name} drops no token: its step is the same as without it")
        if (number, value) == ("inert", 1.0):
            lines.append(f"{name} pulls none of the tokens it has chosen: none left its anchor yet")
    return lines


def rollouts_by_lag(batch: Batch) -> Metrics:
    """Reward and length of the main rollouts, by rollout lag; reward of proposals, and of the aux
    rollouts.
    """
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
    aux = batch.row_group >= batch.compared_groups
    proposed = ~main & ~aux
    if proposed.any():
        found["proposer_reward"] = float(batch.reward[proposed].mean())
    if aux.any():
        asked = [i.ticket.sampling.temperature for i in batch.items[batch.compared_groups :]]
        found["aux_rollouts"] = float(aux.sum())
        found["aux_reward"] = float(batch.reward[aux].mean())
        found["aux_correct"] = float(batch.correct[aux].mean())
        found["aux_temperature"] = math.fsum(asked) / len(asked)
    return found


def _sums(values: Tensor, lag: Tensor) -> Tensor:
    """float64 [largest lag + 1]"""
    return torch.bincount(lag.cpu(), values.double().cpu())


def _named(values: Tensor, keep: Tensor) -> dict[str, float]:
    return {str(i): float(values[i]) for i in keep.nonzero().squeeze(1).tolist()}
