"""Clip-Cov: drop a few random tokens of high covariance. arXiv 2505.22617, section on Clip-Cov."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from common.config import PositiveInt, need
from learner.methods.base import Method, blocks, finite, moments

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class ClipCov(Method, frozen=True, kw_only=True, tag="clip_cov"):
    """Of the tokens with `low` < C < `high` that no clip stops, drops max(1, ⌊ratio · tokens⌋).

        C_i = (l_i - mean l) (A_i - mean A)      over the update's main tokens

    C's sum over the tokens is the batch's covariance. The window holds mostly unlikely tokens with
    A < 0. Dropped tokens stay in the denominator. Which of the candidates go is a draw. Defaults
    as released; the preset "released" has means and draw of one micro-batch at a time too, and its
    scripts open the clip range to [0, 2] (clip_low = "none", clip_high = 1). Raises DataError where
    l or A is not finite.
    """

    needs_table: ClassVar[bool] = True

    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 2e-4  # of the tokens; 0: off
    low: float = 1.0
    high: float = 5.0
    preset: Literal["released"] | None = None
    scope: Literal["minibatch", "micro"] | None = None  # None: minibatch; released micro
    micro_rollouts: PositiveInt = 8  # rollouts of a micro-batch then

    def check(self) -> None:
        need(
            self.low < self.high,
            f"methods: clip_cov.low = {self.low:g} is not below high = {self.high:g}; nothing is "
            "between them",
        )

    @property
    def statistics(self) -> str:
        return ""

    @property
    def neutral(self) -> bool:
        return self.ratio == 0

    def drop(self, table: Table) -> Tensor:
        dropped = table.main.new_zeros(table.main.shape)
        by_micro = (self.scope or self.preset) in ("micro", "released")
        micro = self.micro_rollouts if by_micro else None
        for block in blocks(table, table.main, micro):
            n = max(int(self.ratio * int(block.sum())), 1)
            dropped |= table.draw(self.name, n, self.candidates(table, block))
        return dropped

    def candidates(self, table: Table, on: Tensor) -> Tensor:
        """bool [T]: tokens of `on` that may be dropped; C's means are over `on`."""
        c = self.covariance(table, on)
        return on & ~table.stopped & (c > self.low) & (c < self.high)

    def covariance(self, table: Table, on: Tensor) -> Tensor:
        """float [T]: C, with the means over `on`; of no meaning outside it."""
        logp = finite(self, "l", table.logp, on, table)
        advantage = finite(self, "A", table.advantage, on, table)
        return (logp - moments(logp, on)[0]) * (advantage - moments(advantage, on)[0])
