"""Entropy advantage: credit for tokens of high entropy. arXiv 2506.14758."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec

from common.config import NotNegative
from learner.methods.base import Method, finite

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class EntropyAdvantage(Method, frozen=True, kw_only=True, tag="entropy_advantage"):
    """A' = A + min(alpha H, |A| / kappa), as a weight A' / A of the token's loss; H is detached.

    kappa > 1 keeps the sign of A: the weight of A > 0 is in [1, 1 + 1/kappa], of A < 0 in
    [1 - 1/kappa, 1], a smaller push away. A = 0 has weight 1 and no loss. Raises DataError where
    H is not finite.
    """

    needs_table: ClassVar[bool] = True

    alpha: NotNegative = 0.4  # 0: off
    kappa: Annotated[float, msgspec.Meta(gt=1)] = 2.0

    @property
    def statistics(self) -> str:
        return "H"

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def weigh(self, table: Table, alive: Tensor) -> Tensor:
        bonus = self.alpha * finite(self, "H", table.H, alive, table)
        a = finite(self, "A", table.advantage, alive, table)
        share = bonus.minimum(a.abs() / self.kappa) / a.where(a != 0, a.new_ones(()))
        return (1 + share).clamp(1 - 1 / self.kappa, 1 + 1 / self.kappa)
