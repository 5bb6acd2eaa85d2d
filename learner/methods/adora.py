"""ADORA: weigh a prompt's advantages by what its rollouts say just now. arXiv 2602.10019."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from common.config import NotNegative, PositiveInt, need
from common.errors import DataError
from learner.methods.base import Method

if TYPE_CHECKING:
    import numpy as np

    from common import wire

Criteria = Literal["length", "difficulty", "and", "or"]
_RIGHT = 0.5  # raw correctness above it is right


class _Preset(NamedTuple):
    criteria: Criteria
    w_tas: float
    w_tds: float


PRESETS = {
    "llm_amplify": _Preset("and", 2.0, 1.0),  # the paper, language
    "vlm_attenuate": _Preset("length", 1.0, 0.1),  # the paper, vision
    "llm_repo": _Preset("length", 1.0, 0.1),  # the released code, language
}


class Adora(Method, frozen=True, kw_only=True, tag="adora"):
    """One factor a group, for the advantages of all its rollouts, after the estimator:

        length       LA: its longest right answer is longer than its wrong ones on average
        difficulty   DA: at most tau of its answers are right
        factor       w_tas where `criteria` hold, else w_tds

    Wrong answers that were cut off (or have `length_cut` tokens and more) are no evidence of
    length. Where LA has none on one of its sides, the factor is 1 (with binary rewards such a
    group has no advantage but for cut ones), or what one of the two published codes makes of it.
    A tie is no advantage.
    """

    preset: Literal["llm_amplify", "vlm_attenuate", "llm_repo"] = "llm_amplify"
    criteria: Criteria | None = None  # None: the preset's
    w_tas: NotNegative | None = None
    w_tds: NotNegative | None = None
    tau: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    length_cut: PositiveInt | None = None  # None: those that ended at max_tokens
    empty_failures: Literal["neutral", "as_llm_repo", "as_vlm_repo"] = "neutral"
    normalize_mean_weight: bool = False  # divide by the batch's mean factor: no hidden step size

    def check(self) -> None:
        tas, tds = self.weights
        need(
            not self.normalize_mean_weight or tas + tds > 0,
            "methods: adora.w_tas and w_tds are both 0; their mean cannot be normalised",
        )

    @property
    def weights(self) -> tuple[float, float]:
        """Factor of what is an advantage at the moment, and of what is none."""
        preset = PRESETS[self.preset]
        return (
            preset.w_tas if self.w_tas is None else self.w_tas,
            preset.w_tds if self.w_tds is None else self.w_tds,
        )

    @property
    def neutral(self) -> bool:
        return self.weights == (1, 1)

    def scale_groups(self, groups: Sequence[wire.Group]) -> np.ndarray:
        import numpy as np

        factor = np.array([self.factor(group) for group in groups], np.float64)
        if self.normalize_mean_weight and factor.size and factor.mean() > 0:
            factor = factor / factor.mean()
        return factor

    def group_numbers(self, groups: Sequence[wire.Group]) -> Mapping[str, float]:
        """tas: the share of groups with the advantage; tas_length, tds_length: mean tokens of an
        answer in groups with it and without it (absent where there is none).
        """
        verdicts = [self.verdict(group) for group in groups]
        found = {"tas": sum(v is True for v in verdicts) / max(1, len(verdicts))}
        for key, wanted in (("tas_length", True), ("tds_length", False)):
            of = [
                g.rollouts for g, verdict in zip(groups, verdicts, strict=True) if verdict is wanted
            ]
            lengths = [r.length for rollouts in of for r in rollouts]
            if lengths:
                found[key] = sum(lengths) / len(lengths)
        return found

    def factor(self, group: wire.Group) -> float:
        tas, tds = self.weights
        verdict = self.verdict(group)
        return 1.0 if verdict is None else tas if verdict else tds

    def verdict(self, group: wire.Group) -> bool | None:
        """Whether `criteria` hold: TAS, or TDS; None: no evidence. Raises DataError for NaN."""
        criteria = self.criteria or PRESETS[self.preset].criteria
        self._check_numbers(group)
        right = [r.length for r in group.rollouts if r.correct > _RIGHT]
        wrong = [r.length for r in group.rollouts if r.correct <= _RIGHT and not self._is_cut(r)]
        easy = len(right) > self.tau * len(group.rollouts)
        if criteria == "difficulty":
            return not easy
        longer = self._longer(right, wrong)
        if longer is None or criteria == "length":
            return longer
        return longer and not easy if criteria == "and" else longer or not easy

    def _check_numbers(self, group: wire.Group) -> None:
        """Else what is not a number would be a wrong answer."""
        for i, rollout in enumerate(group.rollouts):
            if not math.isfinite(rollout.correct):
                raise DataError(
                    f"method {self.name!r}, correct: {rollout.correct} of rollout {i} of ticket "
                    f"{group.ticket}"
                )

    def _longer(self, right: list[int], wrong: list[int]) -> bool | None:
        """LA; None: no evidence, factor 1."""
        if right and wrong:
            return max(right) > sum(wrong) / len(wrong)
        if self.empty_failures == "as_llm_repo":  # an empty side counts as minus infinity
            return bool(right)
        if self.empty_failures == "as_vlm_repo" and right:  # no wrong one counts as plus infinity
            return False
        return None

    def _is_cut(self, rollout: wire.Rollout) -> bool:
        if self.length_cut is None:
            return rollout.finish == "length"
        return rollout.length >= self.length_cut
