"""Train on the tokens of high entropy only: "80/20". arXiv 2506.01939."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from learner.methods.base import Method, finite, kept, quantile

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class TopEntropy(Method, frozen=True, kw_only=True, tag="top_entropy"):
    """Keeps the tokens with H ≥ τ, the (1 - keep)-quantile of H over the update's main tokens,
    interpolated linearly between two of them.

    The paper divides by the tokens kept (`kept`, with `token_mean`); TRL, and the default here, by
    all of them. Raises DataError where H is not finite.
    """

    needs_table: ClassVar[bool] = True

    keep: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2  # share of the tokens; 1: off
    denominator: Literal["original", "kept"] = "original"

    @property
    def statistics(self) -> str:
        return "H"

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    def drop(self, table: Table) -> Tensor:
        on = table.main
        entropy = finite(self, "H", table.H, on, table)
        if not bool(on.any()):
            return on
        return on & (entropy < quantile(entropy[on], 1 - self.keep))

    def weigh(self, table: Table, alive: Tensor) -> Tensor | None:
        return kept(self.drop(table), table) if self.denominator == "kept" else None
