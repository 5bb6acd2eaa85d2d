"""What a predicted entropy change is worth: realised = drift + slope · predicted, fitted on line.

Adam makes a step's size independent of the gradient's, and shared weights rescale what is left, so
a prediction says little by its size. It is therefore taken as a share of the flows it is made of,
-1 if all tokens lowered the entropy, and what happened as the change of the entropy's logarithm:
the mean of a ratio of two noisy entropies is above 1 by the square of their noise, which a drift
would take for entropy that comes by itself. The slope is what such a share moves in a step, from a
ridge regression with intercept and forgetting, drawn to a guess and kept within a band around it,
so that it is positive. The drift follows what the slope leaves unexplained, faster.

What is realised is the change from batch to batch: where choices lead shows in no measure that is
taken on the same tokens. It holds the difference of the batches too, hence the narrow band.
"""

from __future__ import annotations

from typing import Any, Self

import msgspec

REACH = 0.1  # the guess: both flows together move the entropy by so much of itself in a step
_MEMORY = 0.95  # weight of an observation, one observation later
_SLOPE_PRIOR, _DRIFT_PRIOR = 10.0, 10.0  # in observations …
_SIZE = 0.5  # … of this size: small predictions drown in the difference of the batches
_PACE = 0.05  # share of an unexplained change that goes into the drift at once
# Bounds of the slope, in guesses. A controller that works makes predictions and changes look
# unrelated, so that the fit errs towards 0, where it would make the controller wild.
_LEAST, _MOST = 0.5, 4.0
_VARIES = 0.01  # variance of the predictions over their mean square, below which nothing is learned


class Gain(msgspec.Struct, kw_only=True):
    slope: float = REACH
    drift: float = 0.0
    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        return cls(**state)

    def state(self) -> dict[str, float]:
        return msgspec.structs.asdict(self)

    def add(self, predicted: float, realised: float) -> None:
        """Learn from one step."""
        x, y = predicted, realised
        new = {"n": 1.0, "x": x, "y": y, "xx": x * x, "xy": x * y}
        for name, value in new.items():
            setattr(self, name, _MEMORY * getattr(self, name) + value)
        square = self.xx / self.n
        if square - (self.x / self.n) ** 2 > _VARIES * square:  # else nothing tells the slope
            self._fit()
        self.drift += _PACE * (realised - self.drift - self.slope * predicted)

    def _fit(self) -> None:
        hold = _SLOPE_PRIOR * _SIZE**2
        a, b, d = self.n + _DRIFT_PRIOR, self.x, self.xx + hold
        right = self.xy + hold * REACH
        slope = (a * right - b * self.y) / (a * d - b * b)
        self.slope = min(max(slope, REACH * _LEAST), REACH * _MOST)
