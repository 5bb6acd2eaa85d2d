"""The token table: what is known of every token of a batch, as 1-D columns in canonical order.

    main tokens before aux tokens, then (ticket, rollout, position)

The order does not depend on micro-batches, ranks or the order of admission, so a statistic over the
table, or a draw from it, does not either.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Static:
    """Columns that need no forward pass. All [T]."""

    lb: Tensor  # float32: behaviour log-prob, as sampled
    advantage: Tensor  # float32: of its rollout, after the methods' group factors
    mask: Tensor  # bool: trained on
    row: Tensor  # int64: its rollout, numbered through the batch
    group: Tensor  # int64: its group, numbered through the batch
    lag: Tensor  # int64: trained version - version that sampled it, at least 0
    temperature: Tensor  # float32: the logits' divisor in training
    aux: Tensor  # bool: of an aux ticket
    ticket: Tensor  # int64
    rollout: Tensor  # int64: its number within the group
    position: Tensor  # int64: within prompt + response
    token: Tensor  # int64: its id

    def take(self, index: Tensor | slice) -> Self:
        """The lines that `index` names."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {k: c[index] for k, c in columns.items() if isinstance(c, Tensor)}
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Self:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: c.to(device) for k, c in columns.items() if isinstance(c, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Table(Static):
    """… and those that the policy gives. All float32 [T]."""

    logp: Tensor  # current log-prob of the token
    lp: Tensor  # proximal: at the start of the step
    H: Tensor  # entropy of the distribution the token was scored under, nats
    N: Tensor  # Σ p² (H + ln p) of that distribution

    when: tuple[int, int, int] = (
        0,
        0,
        0,
    )  # seed of the run, step, update: what draws are made from

    updates: int = 1  # that this step has

    # H and N at the start of the step, where lp is from; None: this is the start.
    H0: Tensor | None = None
    N0: Tensor | None = None

    # What the surrogate makes of every token, float32 [T]; None in the tables of micro-batches.
    old: Tensor | None = None  # the log-prob that its ratio divides by: lp, or lb
    push: Tensor | None = None  # -dL/dl of its own loss without w: A r, 0 where a clip stops it
    w: Tensor | None = None  # importance weight of the surrogate, 1 where it takes none

    @classmethod
    def join(
        cls,
        static: Static,
        logp: Tensor,
        lp: Tensor,
        H: Tensor,
        N: Tensor,
        when: tuple[int, int, int] = (0, 0, 0),
        updates: int = 1,
    ) -> Table:
        known = {f.name: getattr(static, f.name) for f in fields(Static)}
        return cls(**known, logp=logp, lp=lp, H=H, N=N, when=when, updates=updates)

    @property
    def main(self) -> Tensor:
        """bool [T]: tokens that the surrogate is of, dropped ones and clipped ones too."""
        return self.mask & ~self.aux

    @property
    def stopped(self) -> Tensor:
        """bool [T]: a clip lets no gradient through."""
        assert self.push is not None, "only a whole table knows what the clips stop"
        return (self.push == 0) & (self.advantage != 0)

    @property
    def start(self) -> Table:
        """As it was at the start of the step: l is lp, H and N are those of then."""
        if self.H0 is None or self.N0 is None:
            return self
        return replace(self, logp=self.lp, H=self.H0, N=self.N0)

    @property
    def S(self) -> Tensor:
        """q (H + ln q) of the sampled token: minus the entropy's derivative by its logit."""
        return self.logp.exp() * (self.H + self.logp)

    def hashes(self, method: str) -> Tensor:
        """int64 [T]: one pseudo-random number a token, made of nothing but names of things."""
        digest = hashlib.blake2b(method.encode(), digest_size=8).digest()
        name = int.from_bytes(digest, "little", signed=True)
        h = torch.zeros_like(self.ticket)
        for part in (*self.when, name, self.ticket, self.rollout, self.position):
            h = mix(h ^ part)
        return h

    def draw(self, method: str, n: int, among: Tensor) -> Tensor:
        """bool [T]: `n` random tokens (or all) of those that the bool column `among` names.

        Those with the smallest hashes: whatever micro-batch or rank a token is in, and whatever the
        order of the lines, the draw is the same.
        """
        candidates = among.nonzero().squeeze(1)
        order = torch.argsort(self.hashes(method)[candidates], stable=True)
        chosen = torch.zeros_like(among)
        chosen[candidates[order[:n]]] = True
        return chosen


def mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea, Flood 2014) in wrapping int64; masks make `>>` logical."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
