"""Which tensors move, and by what rule: two options that are off by default, and untested for
reinforcement learning by their authors (kappa.py, classp.py).
"""

from __future__ import annotations

from typing import Literal

from common.config import NaturalInt, NotNegative, Positive, PositiveInt, Section, need


class KappaConfig(Section, frozen=True, kw_only=True):
    """Train only the tensors with the lowest condition numbers: so many, such a share of them, or
    those below a bound.
    """

    tensors: PositiveInt | None = None
    share: Positive | None = None
    below: Positive | None = None
    embeddings: bool = False  # input embedding and head may be chosen too
    max_dim: NaturalInt = 0  # larger tensors stay as they are; 0: none is too large

    def check(self) -> None:
        given = [x for x in (self.tensors, self.share, self.below) if x is not None]
        need(len(given) == 1, "tensors, share, below: give exactly one of them")
        need(self.share is None or self.share <= 1, f"share = {self.share}: at most 1")


class ClasspConfig(Section, frozen=True, kw_only=True):
    """In place of AdamW. `threshold` is on g²: × its mean over the tensor, or the share of
    coordinates that stay, or absolute.
    """

    threshold: NotNegative = 1.0
    relative: Literal["mean", "quantile", "absolute"] = "mean"
    p: Positive = 2.0
    eps: Positive = 1e-5
    scaling: bool = True  # False: steps are not divided; S is accumulated for a later phase

    def check(self) -> None:
        need(
            self.relative != "quantile" or self.threshold <= 1,
            f"threshold = {self.threshold:g}: a quantile is at most 1",
        )
