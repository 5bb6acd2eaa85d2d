"""Drop random tokens: the control for methods that drop chosen ones, at equal strength."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from learner.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class RandomDrop(Method, frozen=True, kw_only=True, tag="random_drop"):
    """Drops max(1, ⌊ratio · tokens⌋) of the tokens whose advantage has the given sign and that no
    clip stops: what Clip-Cov does, without its choice ("Rand-Pos-Clip").

    Dropped tokens stay in the denominator. The draw is a function of seed, step and update.
    """

    needs_table: ClassVar[bool] = True

    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 2e-4  # of the main tokens; 0: off
    advantage: Literal["positive", "negative", "any"] = "positive"

    @property
    def statistics(self) -> str:
        return ""

    @property
    def neutral(self) -> bool:
        return self.ratio == 0

    def drop(self, table: Table) -> Tensor:
        sign = {"positive": table.advantage > 0, "negative": table.advantage < 0}
        of_sign = sign.get(self.advantage, table.advantage != 0)
        n = max(int(self.ratio * int(table.main.sum())), 1)
        return table.draw(self.name, n, table.main & ~table.stopped & of_sign)
