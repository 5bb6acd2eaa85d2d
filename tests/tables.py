"""Token tables made by hand, and random ones from real distributions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.loss import correction, surrogate
from learner.table import Static, Table

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "entropy.json").read_text(encoding="utf-8")
)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # of golden numbers

PPO = LearnerConfig(loss="decoupled_ppo", clip_low=0.2, clip_high=0.28)


def golden(found: Tensor | float, name: str, dtype: torch.dtype = torch.float64) -> None:
    """`found` is the golden number `name`."""
    tolerance = TOLERANCE[dtype]
    wanted = torch.tensor(GOLDEN[name], dtype=torch.float64)
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), wanted, rtol=tolerance, atol=tolerance / 10
    )


def make_table(
    logp: Any,
    advantage: Any,
    lp: Any = None,
    lb: Any = None,
    H: Any = 0.0,
    N: Any = 0.0,
    mask: Any = True,
    config: LearnerConfig = PPO,
    dtype: torch.dtype = torch.float64,
    **columns: Any,
) -> Table:
    """One line a token; without `lp` the policy has not moved, without `lb` nor before the step.

    Lists or numbers. `columns` replace those of `Static`; by default every token is a rollout of
    its own. What the surrogate makes of the tokens is that of `config`.
    """
    logp = torch.as_tensor(logp, dtype=dtype)
    size = logp.numel()

    def column(values: Any, kind: torch.dtype = dtype) -> Tensor:
        return torch.as_tensor(values, dtype=kind).expand(size).contiguous()

    lp = logp if lp is None else column(lp)
    lines = torch.arange(size)
    whole = {"row": lines, "group": lines // 4, "ticket": lines // 4, "rollout": lines % 4}
    whole |= {"position": lines, "lag": torch.zeros_like(lines), "token": lines}
    static = Static(
        lb=lp if lb is None else column(lb),
        advantage=column(advantage),
        mask=column(mask, torch.bool),
        aux=column(columns.pop("aux", False), torch.bool),
        temperature=column(1.0),
        **{k: column(columns.pop(k, v), torch.int64) for k, v in whole.items()},
    )
    assert not columns, f"no such column: {', '.join(columns)}"
    table = Table.join(static, logp, lp, column(H), column(N))
    return with_surrogate(table, config)


def with_surrogate(table: Table, config: LearnerConfig = PPO) -> Table:
    """The table with `old`, `push` and `w` of the loss of `config`."""
    from dataclasses import replace

    import msgspec

    leaf = table.logp.detach().clone().requires_grad_()
    bare = msgspec.structs.replace(config, correction="none")
    loss = surrogate(leaf, table.lp, table.lb, table.advantage, bare)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    old = table.lb if config.loss == "ppo" else table.lp
    return replace(table, old=old, push=-slope, w=correction(table.lp, table.lb, config))


def random_table(
    seed: int = 0,
    size: int = 400,
    vocabulary: int = 12,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float64,
    **columns: Any,
) -> Table:
    """Tokens sampled from random softmax policies that moved a little since; rollouts of 5 tokens,
    advantages of either sign by rollout, a tenth of the tokens masked, lags 0 to 2."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, vocabulary, generator=rng, dtype=torch.float64) * scale
    before = (logits + 0.1 * torch.randn(logits.shape, generator=rng)).log_softmax(-1)
    now = logits.log_softmax(-1)
    token = torch.multinomial(before.exp(), 1, generator=rng)
    p, row = now.exp(), torch.arange(size) // 5
    H = -(p * now).sum(-1)
    N = (p**2 * (H[:, None] + now)).sum(-1)
    advantage = torch.randn(size, generator=rng, dtype=torch.float64)[row]
    own = {
        "mask": torch.rand(size, generator=rng) > 0.1,
        "row": row,
        "group": row // 4,
        "ticket": row // 4,
        "rollout": row % 4,
        "position": torch.arange(size) % 5,
        "lag": row % 3,
    }
    logp, lp = now.gather(1, token).squeeze(1), before.gather(1, token).squeeze(1)
    return make_table(logp, advantage, lp=lp, H=H, N=N, dtype=dtype, **{**own, **columns})


def four_answers() -> Table:
    """One group; two answers part at the third token, one at the second, one at the first."""
    rows = [[1, 2, 3], [1, 2, 4], [1, 9, 3, 3], [5]]
    flat = [(r, i, t) for r, row in enumerate(rows) for i, t in enumerate(row)]
    row, position, token = (torch.tensor(column) for column in zip(*flat, strict=True))
    H = torch.tensor([1.0, 0, 0, 1, 0, 2, 1, 0, 4, 0, 1])
    columns: dict[str, Any] = {"row": row, "rollout": row, "position": position, "token": token}
    return make_table(-H, [1, 1, 1, -1, -1, -1, 1, 1, 1, 1, -1], H=H, group=0, ticket=0, **columns)


def two_answers() -> Table:
    """One group: the second answer leaves the first, which is right, at its second token."""
    flat = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 1), (1, 1, 9), (1, 2, 4), (1, 3, 4)]
    row, position, token = (torch.tensor(column) for column in zip(*flat, strict=True))
    columns: dict[str, Any] = {"row": row, "rollout": row, "position": position, "token": token}
    H = torch.tensor([0.3, 0.2, 0.1, 0.3, 0.2, 1, 1])
    return make_table(-H, [1, 1, 1, -1, -1, -1, -1], H=H, group=0, ticket=0, **columns)
