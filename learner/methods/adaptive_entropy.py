"""Adaptive entropy bonus: a coefficient that steps towards a target. Skywork-OR1, 2505.22312."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from common.config import NotNegative, Positive, need
from learner.methods.base import Governed, Method, State, finite, known, moments, refuse_above

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table


class AdaptiveEntropy(Method, frozen=True, kw_only=True, tag="adaptive_entropy"):
    """loss - a_k · mean H, with H_k the mean entropy of the main tokens of step k:

        a_k     = c_k where H_k <= target, else 0
        c_{k+1} = c_k + delta where H_k < target, - delta where H_k > target; within [0, most]

    `signal`: which entropy decides about a_k. "current" is the paper's and takes a pass without
    gradient before the update; "previous" is the last step's and costs nothing. delta = 0 (and
    start = 0) is off.
    """

    target: Positive = 0.2  # nats a token
    delta: NotNegative = 0.005
    start: NotNegative = 0.0
    most: Positive = 1.0
    signal: Literal["current", "previous"] = "current"

    def check(self) -> None:
        need(
            self.start <= self.most,
            f"methods: adaptive_entropy.start = {self.start:g} is above most = {self.most:g}",
        )

    def fits(self, max_entropy: float) -> None:
        refuse_above(self, "target", self.target, max_entropy)

    @property
    def needs_table(self) -> bool:  # type: ignore[override]
        return self.signal == "current"

    @property
    def statistics(self) -> str:
        return "H"

    @property
    def neutral(self) -> bool:
        return self.delta == 0 and self.start == 0

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
        entropy = state["entropy"]
        if table is not None:
            on = table.main
            H = finite(self, "H", table.H, on, table)
            entropy = moments(H, on)[0] if bool(on.any()) else None
        low = entropy is not None and entropy <= self.target
        numbers = {"coefficient": float(state["c"]), "target": self.target}
        return Governed(bonus=state["c"] if low else 0.0, numbers=numbers)

    def initial(self) -> State:
        return {"c": self.start, "entropy": None}

    def observe(self, state: State, facts: Mapping[str, float]) -> State:
        entropy, c = known(self, facts, "entropy"), state["c"]
        if entropy < self.target:
            c += self.delta
        elif entropy > self.target:
            c -= self.delta
        return {"c": min(max(c, 0.0), self.most), "entropy": entropy}
