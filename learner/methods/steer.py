"""STEER: damp the tokens that change the entropy most. arXiv 2510.10150, and its released code."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from common.config import NotNegative, PositiveInt, need
from learner.methods.base import Method, blocks, finite, quantile

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table

Weight = Annotated[float, msgspec.Meta(gt=0)]


class Steer(Method, frozen=True, kw_only=True, tag="steer"):
    """Predicts what every token does to the entropy, Ω, and weighs its loss by |Ω|.

    `form`: what is predicted, up to (learning rate / tokens)

        theorem    I r A · -q (1-q) (l + H)               the paper, version 4
        released   A / π_old · -q (1-q) (l + H)           the code: one q less, clipped tokens count
        centred    I r A · -(S - N)                       exact to first order; of no paper

    `map`: with k = -ln(lambda_min) / max |Ω|

        exp         exp(-k |Ω|), so that the largest has exactly lambda_min
        linear      from lambda_max at the smallest |Ω| down to lambda_min at the largest
        asymmetric  from lambda_min at the smallest Ω up to lambda_max at the largest, with sign:
                    what raises the entropy keeps more weight (a later fork of the code)

    The extremes are those of the whole update's tokens that are alive, clipped ones left out
    (`released`: not left out); nothing else sees the scale of Ω, so a factor common to all
    advantages changes no weight (with a `floor` it does). The denominator stays. Tokens that are
    not alive have weight 1. Raises DataError where Ω is not finite.
    """

    needs_table: ClassVar[bool] = True

    form: Literal["theorem", "released", "centred"] = "theorem"
    map: Literal["exp", "linear", "asymmetric"] = "exp"
    lambda_min: Weight | None = None  # None: 0.7; released 0.8; asymmetric 0.9
    lambda_max: Weight | None = None  # None: 1; released and linear 1.2
    floor: NotNegative | None = None  # of max |Ω| (exp); None: 0; released 0.02
    max_quantile: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = (
        None  # of |Ω|, in the place of its maximum; what is above it gets the extreme weight
    )
    entropy_from: Literal["current", "proximal"] | None = None  # None: current; released proximal
    omega_includes_is: bool = False  # Ω holds the importance weight w too
    scope: Literal["minibatch", "micro"] = "minibatch"  # micro: only to reproduce released code
    micro_rollouts: PositiveInt = 8  # rollouts of a micro-batch then

    def check(self) -> None:
        low, high = self.bounds
        need(
            low <= high,
            f"methods: steer.lambda_min = {low:g} is above lambda_max = {high:g}; lower it",
        )
        need(
            self.map != "exp" or high == 1,
            f'methods: steer.lambda_max = {high:g}: the map "exp" ends at 1; leave it out, or '
            'take map = "linear"',
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest weight."""
        low = 0.9 if self.map == "asymmetric" else 0.8 if self.form == "released" else 0.7
        high = 1.2 if (self.form, self.map) == ("released", "linear") else 1.0
        return (
            low if self.lambda_min is None else self.lambda_min,
            high if self.lambda_max is None else self.lambda_max,
        )

    @property
    def statistics(self) -> str:
        return "HN" if self.form == "centred" else "H"

    @property
    def neutral(self) -> bool:
        return self.bounds == (1, 1)

    def weigh(self, table: Table, alive: Tensor) -> Tensor:
        """float [T]: the weights, between the bounds."""
        omega = finite(self, "Ω", self.omega(table), alive, table)
        counted = alive if self.form == "released" else alive & ~table.stopped
        weight = omega.new_ones(omega.shape)
        micro = self.micro_rollouts if self.scope == "micro" else None
        for block in blocks(table, counted, micro):
            if bool(block.any()):
                weight[block] = self._mapped(omega[block])
        return weight

    def omega(self, table: Table) -> Tensor:
        """float [T]: predicted change of the entropy, up to (learning rate / tokens)."""
        default = "proximal" if self.form == "released" else "current"
        if (self.entropy_from or default) == "proximal":
            start = table.start
            table = replace(table, H=start.H, N=start.N)
        assert table.push is not None, "a weight needs the whole table"
        assert table.old is not None
        assert table.w is not None
        if self.form == "released":
            q = table.logp.exp().clamp(1e-8, 1 - 1e-8)
            ratio = q / table.old.exp().clamp(1e-8, 1)
            omega = -table.advantage * ratio * (1 - q) * (q.log() + table.H)
        elif self.form == "centred":
            omega = -table.push * (table.S - table.N)
        else:
            omega = table.push * table.logp.expm1() * table.S  # expm1(l) = -(1 - q)
        return omega * table.w if self.omega_includes_is else omega

    def _mapped(self, omega: Tensor) -> Tensor:
        """Weights of the tokens that count, given their Ω [n], n > 0."""
        low, high = self.bounds
        size = omega.abs()
        top = size.max() if self.max_quantile is None else quantile(size, self.max_quantile)
        if self.map == "exp":
            floor = self.floor if self.floor is not None else self._default_floor
            top = top.clamp(min=floor)
            share = size / top.where(top > 0, top.new_ones(()))
            # not left to rounding: the largest has exactly the smallest weight
            return (low**share).clamp(low, 1).masked_fill(share >= 1, low)
        steepness = -omega if self.map == "asymmetric" else size
        steepness = steepness.clamp(-top, top)
        least, most = steepness.min(), steepness.max()
        if least == most:
            return omega.new_full(omega.shape, (low + high) / 2)
        share = (steepness - least) / (most - least)
        return (high - share * (high - low)).clamp(low, high).masked_fill(share >= 1, low)

    @property
    def _default_floor(self) -> float:
        return 0.02 if self.form == "released" else 0.0
