"""What a method did in an update, as numbers: methods/NAME/NUMBER of metrics.jsonl."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.methods.base import quantile
from learner.table import Table

Value = float | dict[str, float]

QUANTILES = {"min": 0.0, "q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}


def dropped(name: str, mask: Tensor, table: Table) -> dict[str, Value]:
    """Of the main tokens, those that `mask` bool [T] takes out.

    dropped    their share, in all and by lag
    negative   the share of A < 0 among them (absent where nothing is dropped)
    """
    on = table.main
    out = mask & on
    return _named(name, {"dropped": _share(out, on), "dropped_by_lag": _by_lag(out, on, table)}) | (
        _negative(name, out, table)
    )


def weighed(name: str, weight: Tensor, table: Table, alive: Tensor) -> dict[str, Value]:
    """Of the tokens alive, what `weight` float [T] does to them.

    weight     quantiles; the means by lag are `weight_by_lag`
    affected   the share with a weight other than 1
    negative   the share of A < 0 among these (absent where there is none)
    """
    if not bool(alive.any()):
        return {}
    chosen = weight[alive]
    touched = alive & (weight != 1)
    found: dict[str, Value] = {
        "weight": {key: float(quantile(chosen, q)) for key, q in QUANTILES.items()},
        "weight_by_lag": _by_lag(weight, alive, table),
        "affected": _share(touched, alive),
    }
    return _named(name, found) | _negative(name, touched, table)


def _negative(name: str, affected: Tensor, table: Table) -> dict[str, Value]:
    if not bool(affected.any()):
        return {}
    return _named(name, {"negative": _share(affected & (table.advantage < 0), affected)})


def _named(name: str, values: dict[str, Value]) -> dict[str, Value]:
    return {f"methods/{name}/{key}": value for key, value in values.items()}


def _share(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(1, int(whole.sum()))


def _by_lag(values: Tensor, on: Tensor, table: Table) -> dict[str, float]:
    """Mean of `values` [T] where `on`, of every lag that occurs."""
    lag = table.lag[on].cpu()
    counts = torch.bincount(lag)
    sums = torch.bincount(lag, values[on].double().cpu())
    return {str(k): float(sums[k] / counts[k]) for k in counts.nonzero().squeeze(1).tolist()}
