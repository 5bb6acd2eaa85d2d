"""Clip_V: drop tokens whose discriminator is far below its expectation. arXiv 2602.03392."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from common.config import Positive
from learner.methods.base import Method, finite, kept, moments

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class ClipV(Method, frozen=True, kw_only=True, tag="clip_v"):
    """With D = N - S, S centred by its own vocabulary's expectation, and σ the population deviation
    of D over the update's main tokens:

        neg_low            drops A ≤ 0 and D > mu σ           released code: D itself, not D - mean
        two_sided          drops all outside -mu σ ≤ S - N ≤ mu_plus σ
        entropy_lowering   drops sign(A) (S - N) > mu σ: likely tokens with A > 0 too

    Every token with A < 0 that `neg_low` drops would lower the entropy, to first order. Where more
    than `max_frac` of the tokens would go, only the max(1, ⌊max_frac · tokens⌋) farthest out do;
    tokens with A = 0, which have no gradient, are not spared by that, as released. D is the trained
    policy's at the start of the step, so all updates of a step drop the same. The preset "released"
    divides by the tokens kept (with `token_mean`). Raises DataError where D is not finite.
    """

    needs_table: ClassVar[bool] = True

    mu: Positive = 8.5  # 7.5 … 8.5 in the paper; smaller: higher entropy; inf: off
    mu_plus: Positive | None = None  # two_sided; None: as mu
    max_frac: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-4  # 1: no cap
    sides: Literal["neg_low", "two_sided", "entropy_lowering"] = "neg_low"
    preset: Literal["released"] | None = None
    denominator: Literal["original", "kept"] | None = None  # None: original; released kept

    @property
    def neutral(self) -> bool:
        return self.mu == float("inf") and self.mu_plus in (None, self.mu)

    def drop(self, table: Table) -> Tensor:
        on = table.main
        start = table.start
        d = finite(self, "D", start.N - start.S, on, table)
        sigma = moments(d, on)[1]
        if sigma < 1e-12:  # all alike
            return on & ~on
        return self._capped(*self._outside(d / sigma, table.advantage, on), table)

    def _outside(self, z: Tensor, advantage: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """bool [T]: tokens outside the bounds, and float [T]: how far out a token is."""
        if self.sides == "neg_low":
            return on & (advantage <= 0) & (z > self.mu), z
        if self.sides == "entropy_lowering":
            far = -advantage.sign() * z
            return on & (far > self.mu), far
        return on & ((z > self.mu) | (-z > (self.mu_plus or self.mu))), z.abs()

    def _capped(self, out: Tensor, far: Tensor, table: Table) -> Tensor:
        tokens = int(table.main.sum())
        if int(out.sum()) <= self.max_frac * tokens:
            return out
        gradient = table.advantage != 0
        candidates = (out & gradient).nonzero().squeeze(1)
        # equal distances: by hash, so that the order of the lines does not matter
        candidates = candidates[table.hashes(self.name)[candidates].argsort(stable=True)]
        farthest = far[candidates].argsort(descending=True, stable=True)
        capped = out & ~gradient
        capped[candidates[farthest[: max(int(self.max_frac * tokens), 1)]]] = True
        return capped

    def weigh(self, table: Table, alive: Tensor) -> Tensor | None:
        default = "original" if self.preset is None else "kept"
        is_kept = (self.denominator or default) == "kept"
        return kept(self.drop(table), table) if is_kept else None
