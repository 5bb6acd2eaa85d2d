"""Where a token's choice led: the rollouts of a group share prefixes, and the group tells.

7 + 5 = 1 2 # …      a prefix is what a token was sampled after, prompt and all; rollouts of a
7 + 5 = 1 3 # …      group that begin alike were at the same prefixes up to where they part
# 1 9
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from learner.table import mix

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


def prefixes(table: Table) -> Tensor:
    """int64 [T]: a number for every prefix; the same one within a group for the same tokens.

    From 64-bit hashes of the (position, token) pairs before a token, added up.
    """
    begins = _begins(table.row)
    each = mix(mix(table.position) ^ table.token)
    before = each.cumsum(0) - each  # wraps
    own = before - before[begins][begins.cumsum(0) - 1]
    numbers: Tensor = torch.unique(mix(own) ^ mix(table.group), return_inverse=True)[1]
    return numbers


def lost(table: Table, at: Tensor) -> Tensor:
    """bool [T]: main tokens of wrong answers (A < 0) at whose prefix (`at`, from `prefixes`) no
    better answer of the group was.
    """
    good = (table.advantage > 0) & table.main
    return table.main & (table.advantage < 0) & (torch.bincount(at, good.double())[at] == 0)


def entropy_ahead(table: Table, at: Tensor) -> Tensor:
    """float64 [T]: what came after a choice, in nats, against what came after others there.

    With h the mean entropy of the main tokens, the sum of H - h over the main tokens that follow
    in the rollout, less its mean over the rollouts of the group at the same prefix. So it is 0
    where a rollout is alone, and the derivative of h by the log-probability of a choice is this,
    times how often it is made, over the number of tokens. `at`: their `prefixes`.
    """
    if not int(table.main.sum()):
        return torch.zeros_like(table.H, dtype=torch.float64)
    H = table.H.double()
    excess = (H - H[table.main].mean()).masked_fill(~table.main, 0.0)
    ahead = _after(excess, table.row)
    visits = torch.bincount(at).double()
    mean = torch.zeros_like(visits).scatter_add(0, at, ahead) / visits
    return (ahead - mean[at]).masked_fill(~table.main, 0.0)


def _begins(row: Tensor) -> Tensor:
    """bool [T]: the first token of its row."""
    return torch.cat([row.new_ones(1, dtype=torch.bool), row[1:] != row[:-1]])


def _after(values: Tensor, row: Tensor) -> Tensor:
    """[T]: the sum of `values` over the later tokens of the row."""
    back = values.flip(0)
    begins = _begins(row.flip(0))
    before = back.cumsum(0) - back
    return (before - before[begins][begins.cumsum(0) - 1]).flip(0)
