"""Entropy bonus: loss - coefficient · mean H. The classical baseline; it moves the optimum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class EntropyBonus(Method, frozen=True, kw_only=True, tag="entropy_bonus"):
    """dH/dz_v = -S_v, so to first order the bonus raises a token's entropy by eta · c · Σ S_v²."""

    coefficient: float = 1e-3  # 1e-4 … 1e-2 in the literature; a knife's edge

    @property
    def statistics(self) -> str:
        return "H"

    @property
    def neutral(self) -> bool:
        return self.coefficient == 0

    def extra_loss(self, table: Table, plan: Tensor | None) -> Tensor:
        return -self.coefficient * table.H.masked_fill(~table.main, 0.0)
