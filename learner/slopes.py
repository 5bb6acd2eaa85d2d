"""Derivatives of the loss by the columns of the token table: autograd over 1-D columns, no model.

What a method adds to the predicted change of entropy needs no further pass either. The surrogate's
loss is linear in a token's factors, so with c_i of the bare loss (no method at all), a method's own
factor f_i and the product g_i of all others', it adds

    η c_i g_i (f_i - 1) (S_i - N_i)

An extra loss adds η dExtra/dl_i (S_i - N_i); and a bonus with dLoss/dH_i = -b_i adds
η b_i Σ_v S_v², of which q (H + ln q)² is an unbiased estimate from the token sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.loss import Rows, correction, old, proximal, surrogate
from learner.measure import Metrics, parts
from learner.methods.compose import Factors, Methods
from learner.table import Table


@dataclass(frozen=True)
class Shares:
    """Of every token in the total loss, float32 [T]."""

    main: Tensor  # 0 for aux tokens
    extra: Tensor  # of extra losses: the same, and for aux tokens 1 / (aux rollouts · length)


def weighted(
    table: Table, share: Tensor, config: LearnerConfig, weight: Tensor | None, of_row: Rows
) -> Tensor:
    """[T]: every token's part of the total loss, under the methods' weights."""
    lp = proximal(table.logp, table.lp, table.lb, table.lag, config)
    loss = surrogate(table.logp, lp, table.lb, table.advantage, config, of_row)
    return share * loss if weight is None else share * weight * loss


def with_surrogate(table: Table, config: LearnerConfig, of_row: Rows) -> Table:
    """The table, and what the surrogate makes of its tokens before any method."""
    bare = msgspec.structs.replace(config, correction="none")
    lp = proximal(table.logp, table.lp, table.lb, table.lag, config)
    with torch.enable_grad():
        leaf = table.logp.detach().requires_grad_()
        loss = surrogate(leaf, lp, table.lb, table.advantage, bare, Rows(of_row.ratio))
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    w = correction(lp, table.lb, config) if of_row.w is None else of_row.w
    return replace(table, old=old(lp, table.lb, config), push=-slope, w=w)


def coefficients(
    table: Table, share: Tensor, config: LearnerConfig, weight: Tensor | None, of_row: Rows
) -> Tensor:
    """c_i = dLoss/dl_i [T] of the whole table under `weight`, without extra losses."""
    with torch.enable_grad():
        leaf = replace(table, logp=table.logp.detach().requires_grad_())
        (c,) = torch.autograd.grad(weighted(leaf, share, config, weight, of_row).sum(), leaf.logp)
    return c


def credit(
    methods: Methods,
    factors: Factors,
    of_groups: Mapping[str, Tensor],
    table: Table,
    bare: Callable[[], Tensor],
    shares: Shares,
    lr: float,
) -> Metrics:
    """methods/NAME/predicted: what each adds to the change that the step predicts.

    `of_groups`: [T] factors of the advantages. `bare` gives [T]: c without any method, of
    advantages without these factors.
    """
    own = dict(of_groups)
    for name, factor in factors.own.items():
        own[name] = own[name] * factor if name in own else factor
    slope = lr * (table.S - table.N)
    c = bare() if own else slope
    change = {name: c * _added(name, own) * slope for name in own}
    for name, by_logp, by_H in _extra_slopes(methods, factors, table, shares.extra):
        added = by_logp * slope - lr * by_H * _square(table)
        change[name] = change[name] + added if name in change else added
    if factors.bonus:
        where = 1.0 if factors.where is None else factors.where
        added = lr * factors.bonus * shares.main * where * _square(table)
        change[factors.governor] = change.get(factors.governor, 0.0) + added
    found: Metrics = {}
    for name, values in change.items():
        whole, lags = parts(values, table, table.mask)
        found |= {
            f"methods/{name}/predicted": whole,
            f"methods/{name}/predicted_by_lag": lags,
        }
    return found


def _added(name: str, own: Mapping[str, Tensor]) -> Tensor:
    """float [T]: the product of all factors minus that of all but one."""
    added = own[name] - 1
    for other, factor in own.items():
        if other != name:
            added = added * factor
    return added


def _extra_slopes(
    methods: Methods, factors: Factors, table: Table, share: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    """Of every extra loss: its name, dLoss/dl and dLoss/dH, float [T]."""
    if not methods.has_extra:
        return []
    found = []
    with torch.enable_grad():
        leaves = (table.logp.detach().requires_grad_(), table.H.detach().requires_grad_())
        live = replace(table, logp=leaves[0], H=leaves[1])
        for name, loss in methods.extra_losses(live, factors.plans):
            if loss.requires_grad:
                total = (share * loss).sum()
                by_logp, by_H = torch.autograd.grad(
                    total, leaves, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                found.append((name, by_logp, by_H))
    return found


def _square(table: Table) -> Tensor:
    """float [T]: Σ_v S_v² of each token, estimated from the one sampled."""
    return table.logp.exp() * (table.H + table.logp).square()
