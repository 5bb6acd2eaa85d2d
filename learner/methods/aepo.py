"""AEPO, SCOPE-RL: hold the entropy by rewarded samples of another temperature. arXiv 2510.08141."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from common import wire
from common.config import NaturalInt, NotNegative, Positive, Share, need
from learner.methods.base import Ask, Method, State, finite, known, refuse_above

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class Aepo(Method, frozen=True, kw_only=True, tag="aepo"):
    """Beside the main groups, aux groups drawn at temperature T; their right answers are made
    likelier under the policy at temperature 1:

        loss - alpha · mean over aux rollouts, failures too, of
               1[R >= r_pos] · mean_t min(r, clip(r, 1 - clip, 1 + clip)),   r = exp(l - lp) at T 1

    Samples of T > 1 hold more unlikely tokens than the policy would draw, so that rewarding them
    raises the entropy; T < 1 lowers it. (An importance weight for the temperature would undo
    exactly this: there is none.) Only right answers: warm wrong ones lower the entropy.

    T follows the entropy H of the main tokens of the last step; before there is one it is 1.

        scope       T = clip(1 + target - H, low, high)        version 7, the default
        bang_bang   high if H <= target, else low; above it half the groups     the released code

    The preset "v1_v4" is the first versions' text: bang_bang, and R · ln π of every aux token in
    the place of the clipped ratio of those with R >= r_pos (the same gradient where r is 1 and R
    is 0 or 1).
    """

    alpha: NotNegative = 1 / 64
    target: NotNegative = 0.5  # nats a token; better relative to where the model begins
    preset: Literal["v1_v4"] | None = None
    mode: Literal["scope", "bang_bang"] | None = None  # None: scope; v1_v4 bang_bang
    low: Positive = 0.8
    high: Positive = 1.2
    r_pos: float = 1.0  # reward from which on an answer is right
    clip: Positive = 0.2
    smoothing: Share = 0.0  # of H from step to step; 0: none
    warmup: NaturalInt = 0  # steps over which alpha rises from 0

    def check(self) -> None:
        need(
            self.low <= 1 <= self.high,
            f"methods: aepo.low = {self.low:g}, high = {self.high:g}: 1 must lie between them",
        )

    def fits(self, max_entropy: float) -> None:
        refuse_above(self, "target", self.target, max_entropy)

    @property
    def statistics(self) -> str:
        return "H"

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def group_numbers(self, groups: Sequence[wire.Group]) -> Mapping[str, float]:
        return {"target": self.target}

    def extra_loss(self, table: Table, plan: Tensor | None) -> Tensor:
        share = min(1.0, (table.when[1] + 1) / self.warmup) if self.warmup else 1.0
        on = table.mask & table.aux
        # the advantage of an aux token is the reward itself
        reward = finite(self, "R", table.advantage, on, table)
        if self.preset == "v1_v4":
            return -self.alpha * share * (reward * table.logp).masked_fill(~on, 0.0)
        right = on & (reward >= self.r_pos)
        r = (table.logp - table.lp).clamp(max=20.0).exp()
        gain = r.clamp(max=1 + self.clip)  # = min(r, clip(r))
        return -self.alpha * share * gain.masked_fill(~right, 0.0)

    @property
    def bangs(self) -> bool:
        """Whether T jumps between its bounds."""
        return (self.mode or self.preset) in ("bang_bang", "v1_v4")

    def ask(self, stats: Mapping[str, float], state: State) -> Ask:
        entropy, groups = state["entropy"], int(stats["n_aux"])
        if entropy is None:
            return Ask(groups=groups, temperature=1.0)
        if self.bangs and entropy > self.target:
            groups = max(1, groups // 2)
        return Ask(groups=groups, temperature=self.temperature(entropy))

    def temperature(self, entropy: float) -> float:
        if self.bangs:
            return self.high if entropy <= self.target else self.low
        return min(max(1 + (self.target - entropy), self.low), self.high)

    def initial(self) -> State:
        return {"entropy": None}

    def observe(self, state: State, facts: Mapping[str, float]) -> State:
        last, now = state["entropy"], known(self, facts, "entropy")
        if last is None:
            return {"entropy": now}
        return {"entropy": self.smoothing * last + (1 - self.smoothing) * now}
