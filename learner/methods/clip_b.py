"""Clip_B: drop tokens whose discriminator is far below the batch's mean. arXiv 2602.03392."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from common.config import Positive
from learner.methods.base import Method, finite, kept, moments

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class ClipB(Method, frozen=True, kw_only=True, tag="clip_b"):
    """With S = q (H + ln q), its mean S̄ and population deviation σ over the update's main tokens:

        neg_low            drops A < 0 and S - S̄ < -mu σ           released code
        two_sided          drops all outside -mu σ ≤ S - S̄ ≤ mu_plus σ           the paper's masks
        entropy_lowering   drops sign(A) (S - S̄) > mu σ: likely tokens with A > 0 too

    S is the trained policy's at the start of the step, so all updates of a step drop the same. It
    is never below -0.2239, so `neg_low` is idle until mu σ < 0.2239 + S̄: it gates itself while the
    entropy is high. The preset "released" takes S's log-prob from the engine (and the entropy from
    the trainer), and divides by the tokens kept (with `token_mean`). Raises DataError where S is
    not finite.
    """

    needs_table: ClassVar[bool] = True

    mu: Positive = 2.5  # 2 … 3 in the paper; smaller: higher entropy; inf: off
    mu_plus: Positive | None = None  # two_sided; None: as mu
    sides: Literal["neg_low", "two_sided", "entropy_lowering"] = "neg_low"
    preset: Literal["released"] | None = None
    log_prob: Literal["proximal", "behaviour"] | None = None  # of S; None: proximal; released other
    denominator: Literal["original", "kept"] | None = None  # None: original; released kept

    @property
    def statistics(self) -> str:
        return "H"

    @property
    def neutral(self) -> bool:
        return self.mu == float("inf") and self.mu_plus in (None, self.mu)

    def drop(self, table: Table) -> Tensor:
        on = table.main
        s = finite(self, "S", self.discriminator(table), on, table)
        mean, sigma = moments(s, on)
        if sigma < 1e-12:  # all alike
            return on & ~on
        z = (s - mean) / sigma
        if self.sides == "neg_low":
            return on & (table.advantage < 0) & (z < -self.mu)
        if self.sides == "entropy_lowering":
            return on & (table.advantage.sign() * z > self.mu)
        return on & ((z < -self.mu) | (z > (self.mu_plus or self.mu)))

    def discriminator(self, table: Table) -> Tensor:
        """float [T]: S."""
        default = "proximal" if self.preset is None else "behaviour"
        start = table.start
        if (self.log_prob or default) == "behaviour":
            start = replace(start, logp=table.lb)
        return start.S

    def weigh(self, table: Table, alive: Tensor) -> Tensor | None:
        default = "original" if self.preset is None else "kept"
        is_kept = (self.denominator or default) == "kept"
        return kept(self.drop(table), table) if is_kept else None
