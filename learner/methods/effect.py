"""What a method did in an update, as numbers: methods/NAME/NUMBER of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from learner.methods.base import quantiles
from learner.table import Table

Value = float | dict[str, float]

QUANTILES = {"min": 0.0, "q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}


def dropped(name: str, mask: Tensor, table: Table) -> dict[str, Value]:
    """Of the main tokens, those that `mask` bool [T] takes out.

    dropped    their share, in all and by lag
    negative   the share of A < 0 among them, in all and by lag (absent where nothing is dropped)
    """
    on = table.main
    out = mask & on
    return _named(name, {"dropped": _share(out, on), "dropped_by_lag": by_lag(out, on, table)}) | (
        _negative(name, out, table)
    )


def weighed(name: str, weight: Tensor, table: Table, alive: Tensor) -> dict[str, Value]:
    """Of the tokens alive, what `weight` float [T] does to them; all of it in all and by lag.

    weight     quantiles; by lag "LAG/QUANTILE", and the means "LAG/mean"
    affected   the share with a weight other than 1
    negative   the share of A < 0 among these (absent where there is none)
    """
    if not bool(alive.any()):
        return {}
    touched = alive & (weight != 1)
    means = by_lag(weight, alive, table)
    lags = {f"{lag}/mean": mean for lag, mean in means.items()}
    for lag, here in _lags(alive, table):
        lags |= {f"{lag}/{key}": value for key, value in _quantiles(weight[here]).items()}
    found: dict[str, Value] = {
        "weight": _quantiles(weight[alive]),
        "weight_by_lag": lags,
        "affected": _share(touched, alive),
        "affected_by_lag": by_lag(touched, alive, table),
    }
    return _named(name, found) | _negative(name, touched, table)


def scaled(
    name: str, factor: np.ndarray, column: Tensor, advantage: Tensor, table: Table
) -> dict[str, Value]:
    """Of the main groups, what `factor` float64 [G] does to their advantages.

    factor     quantiles and mean over the groups; by lag the mean over the main tokens
    affected   the share of groups with a factor other than 1; by lag that of the main tokens
    negative   the share of A < 0 among these tokens (absent where there is none)

    `column` float [T]: the factor of each token's group; `advantage` float [T]: without it.
    """
    if not factor.size:
        return {}
    on, touched = table.main, table.main & (column != 1)
    found: dict[str, Value] = {
        "factor": _quantiles(torch.from_numpy(factor)) | {"mean": float(factor.mean())},
        "factor_by_lag": by_lag(column, on, table),
        "affected": float((factor != 1).mean()),
        "affected_by_lag": by_lag(touched, on, table),
    }
    return _named(name, found) | _negative(name, touched, replace(table, advantage=advantage))


def picked(chosen: Tensor, table: Table, sets: Mapping[str, Tensor]) -> dict[str, Value]:
    """Of the tokens that a method has picked, bool [T], the share of each of `sets`, bool [T]; and
    by lag these shares, and that of the picked ones among the main tokens (absent where none is).
    """
    found: dict[str, Value] = {key: _share(which & chosen, chosen) for key, which in sets.items()}
    if bool(chosen.any()):
        found["chosen_by_lag"] = by_lag(chosen, table.main, table)
        found |= {f"{key}_by_lag": by_lag(which, chosen, table) for key, which in sets.items()}
    return found


def by_lag(values: Tensor, on: Tensor, table: Table) -> dict[str, float]:
    """Mean of `values` [T] where `on`, of every lag that occurs."""
    lag = table.lag[on].cpu()
    counts = torch.bincount(lag)
    sums = torch.bincount(lag, values[on].double().cpu())
    return {str(k): float(sums[k] / counts[k]) for k in counts.nonzero().squeeze(1).tolist()}


def _lags(on: Tensor, table: Table) -> Iterator[tuple[int, Tensor]]:
    """Every lag that occurs where `on`, and its tokens there, bool [T]."""
    for lag in sorted(set(table.lag[on].tolist())):
        yield int(lag), on & (table.lag == lag)


def _quantiles(values: Tensor) -> dict[str, float]:
    found = quantiles(values, tuple(QUANTILES.values()))
    return {key: float(value) for key, value in zip(QUANTILES, found, strict=True)}


def _negative(name: str, affected: Tensor, table: Table) -> dict[str, Value]:
    if not bool(affected.any()):
        return {}
    bad = table.advantage < 0
    lags = by_lag(bad, affected, table)
    return _named(name, {"negative": _share(affected & bad, affected), "negative_by_lag": lags})


def _named(name: str, values: dict[str, Value]) -> dict[str, Value]:
    return {f"methods/{name}/{key}": value for key, value in values.items()}


def _share(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(1, int(whole.sum()))
