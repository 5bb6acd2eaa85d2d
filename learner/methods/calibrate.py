"""What a predicted entropy change is worth: realised = drift + slope · predicted, fitted on line.

Adam and shared weights make the realised change a multiple of the first-order prediction, and add
to it what no prediction knows: momentum, curvature, tokens that are not in the batch. The slope is
that of a ridge regression with intercept and forgetting, drawn to a guess and kept within a band
around it, so that it is positive. The drift follows what the slope leaves unexplained, faster.
"""

from __future__ import annotations

from typing import Any, Self

import msgspec

REACH = 0.1  # the guess: both flows together move the entropy by so much of itself in a step
_MEMORY = 0.95  # weight of an observation, one observation later
_SLOPE_PRIOR, _DRIFT_PRIOR = 2.0, 10.0  # in observations
_PACE = 0.2  # share of an unexplained change that goes into the drift at once
# Bounds of the slope, in guesses. A controller that works makes predictions and changes look
# unrelated, so that the fit errs towards 0, where it would make the controller wild.
_LEAST, _MOST = 0.25, 30.0
_OTHER_TOKENS = 0.25  # weight of a change between two batches, which holds their difference too
_VARIES = 0.01  # variance of the predictions over their mean square, below which nothing is learned


class Gain(msgspec.Struct, kw_only=True):
    prior: float
    slope: float
    drift: float = 0.0
    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @classmethod
    def guess(cls, entropy: float, flow: float) -> Self | None:
        """`flow`: predicted change a step if all tokens pushed one way. None: nothing to go by."""
        if flow <= 0 or entropy <= 0:
            return None
        slope = REACH * entropy / flow
        return cls(prior=slope, slope=slope)

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> Self | None:
        return None if state is None else cls(**state)

    def state(self) -> dict[str, float]:
        return msgspec.structs.asdict(self)

    def add(self, predicted: float, realised: float, *, same_tokens: bool) -> None:
        """Learn from one step."""
        w = 1.0 if same_tokens else _OTHER_TOKENS
        for name, value in self._products(predicted, realised).items():
            setattr(self, name, _MEMORY * getattr(self, name) + w * value)
        square = self.xx / self.n
        if square - (self.x / self.n) ** 2 > _VARIES * square:  # else nothing tells the slope
            self._fit(square)
        self.drift += _PACE * w * (realised - self.drift - self.slope * predicted)

    @staticmethod
    def _products(x: float, y: float) -> dict[str, float]:
        return {"n": 1.0, "x": x, "y": y, "xx": x * x, "xy": x * y}

    def _fit(self, square: float) -> None:
        hold = _SLOPE_PRIOR * square
        a, b, d = self.n + _DRIFT_PRIOR, self.x, self.xx + hold
        right = self.xy + hold * self.prior
        slope = (a * right - b * self.y) / (a * d - b * b)
        self.slope = min(max(slope, self.prior * _LEAST), self.prior * _MOST)
