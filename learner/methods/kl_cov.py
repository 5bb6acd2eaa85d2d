"""KL-Cov: hold back the few tokens of highest covariance. arXiv 2505.22617, section on KL-Cov."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from common.config import NaturalInt, NotNegative, PositiveInt
from learner.methods.base import Method, blocks, finite, moments

if TYPE_CHECKING:
    from torch import Tensor

    from learner.methods.effect import Value
    from learner.table import Table

_INERT = 1e-6  # nearer to its anchor than this, a token is not pulled


class KlCov(Method, frozen=True, kw_only=True, tag="kl_cov"):
    """The max(1, ⌊ratio · tokens⌋) tokens with the largest C pay beta · |l - anchor|.

        C_i = (l_i - mean l) (A_i - mean A)      over the update's tokens that are alive

    The absolute log-ratio is what the released code takes for the KL divergence of the paper. They
    take the surrogate without a clip beside it: `clip_low` and `clip_high` "none" in the recipe.

    As released, the pull has the importance weight of the token's loss. The preset "released" has
    its means and its choice of one micro-batch at a time too, and the proximal anchor.

    |.| has no gradient at 0, so with `anchor` proximal the method is inert on the first update of a
    step, where l is the proximal log-prob. "auto" is proximal when a step has several updates, else
    behaviour. The log has the share of the chosen tokens that are inert (`inert`). Raises DataError
    where C is not finite.
    """

    needs_table: ClassVar[bool] = True

    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 2e-3  # of the tokens; 0: off
    beta: NotNegative = 1.0
    preset: Literal["released"] | None = None
    anchor: Literal["auto", "proximal", "behaviour"] | None = None  # None: auto; released proximal
    scope: Literal["minibatch", "micro"] | None = None  # None: minibatch; released micro
    micro_rollouts: PositiveInt = 8  # rollouts of a micro-batch then
    anneal: NaturalInt = 0  # steps over which beta falls to 0 in a straight line; 0: it stays

    @property
    def statistics(self) -> str:
        return ""

    @property
    def neutral(self) -> bool:
        return self.beta == 0 or self.ratio == 0

    def plan(self, table: Table, alive: Tensor) -> Tensor:
        """float [T]: the importance weight of the tokens chosen, 0 elsewhere."""
        assert table.w is not None, "a choice needs the whole table"
        by_micro = (self.scope or self.preset) in ("micro", "released")
        plan = table.w.new_zeros(table.w.shape)
        for block in blocks(table, alive, self.micro_rollouts if by_micro else None):
            chosen = self._largest(table, block)
            plan[chosen] = table.w[chosen]
        return plan

    def _largest(self, table: Table, on: Tensor) -> Tensor:
        """int64 [n]: lines of the largest C of `on`; equal ones by hash, whatever their order."""
        tokens = on.nonzero().squeeze(1)
        tokens = tokens[table.hashes(self.name)[tokens].argsort(stable=True)]
        covariance = finite(self, "C", self.covariance(table, on), on, table)
        order = covariance[tokens].argsort(descending=True, stable=True)
        return tokens[order[: max(int(self.ratio * len(tokens)), 1)]]

    def covariance(self, table: Table, on: Tensor) -> Tensor:
        """float [T]: C, with the means over `on`."""
        logp, advantage = moments(table.logp, on)[0], moments(table.advantage, on)[0]
        return (table.logp - logp) * (table.advantage - advantage)

    def extra_loss(self, table: Table, plan: Tensor | None) -> Tensor | None:
        if plan is None:
            return None
        # d|x|/dx is 0 at 0 in torch: a token that has not moved stays where it is
        apart = (table.logp - self._anchor(table)).abs()
        return self.beta_at(table) * plan * apart.masked_fill(plan == 0, 0.0)

    def beta_at(self, table: Table) -> float:
        left = 1.0 if not self.anneal else max(0.0, 1.0 - table.when[1] / self.anneal)
        return self.beta * left

    def numbers(self, table: Table, plan: Tensor) -> Mapping[str, Value]:
        from learner.methods.effect import picked

        chosen = plan > 0
        near = (table.logp - self._anchor(table)).abs() < _INERT
        sets = {"inert": near, "negative": table.advantage < 0}
        return {"chosen": float(chosen.sum())} | picked(chosen, table, sets)

    def _anchor(self, table: Table) -> Tensor:
        anchor = self.anchor or ("auto" if self.preset is None else "proximal")
        to_proximal = anchor == "proximal" or (anchor == "auto" and table.updates > 1)
        return table.lp.detach() if to_proximal else table.lb
