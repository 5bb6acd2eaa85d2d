"""Where the entropy is, where it is heading, and what an answer is worth: estimated on line.

With x the logarithm of the mean entropy, and the net share u of a step: what is predicted of it,
over all flows that its weights leave, -1 if all tokens lowered the entropy and 1 if all raised it,

    x ← x + slope · m + drift           m ← β m + (1 - β) u

Adam makes a step's size independent of the gradient's, and shared weights rescale what is left, so
a prediction says little by its size: hence shares, and a slope. The optimizer's first moment
spreads a step over the next 1 / (1 - β), so most of what was decided last is yet to come; and
answers sampled by a version that is some steps old do not show yet where later choices lead. Both
are known, not noise: they are what `heading` adds to the level. Drift is what comes by itself:
batches that are drawn from harder problems, steps along what noise a balance leaves. It has a trend
as long as the policy learns, and an answer that shows ten steps later must be that of ten steps
later.

A Kalman filter follows level, drift, slope and trend: the regression of what is realised on what
was predicted, with an intercept, a prior and forgetting, that also knows the noise of a batch,
which is measured from its groups. Beliefs in drift and slope are tied such that steps alike tell
the drift alone: the slope moves only when predictions vary, and is kept positive. Logarithms
throughout: the mean of a ratio of two noisy entropies is above 1 by the square of their noise,
which a drift would take for entropy that comes by itself.
"""

from __future__ import annotations

import math
from typing import Any, Self

import msgspec
import numpy as np

SLOPE = 0.2  # the guess: all flows together move the entropy by so much of itself in a step
_BAND = (0.05, 3.0)  # bounds of the slope, in guesses
_NOISE = 0.1  # of a batch's entropy, as a share of it, where less than two groups tell it
WIDE = 1.2  # what groups tell of it is times this: a few rich answers hold most of it
_QUIET = 0.02  # … and at least: groups that agree by chance are no proof
# Standard deviations of what is not foreseen, in slopes: in a step, and before the first. Those of
# a step, SLOPE and WIDE are near where recorded runs of the demo are likeliest: scripts/likelihood.
STEP = (0.05, 0.02, 0.01, 0.001)  # of level, drift, slope, trend
_FIRST = (0.25, 0.5, 0.005)  # of drift, slope, trend
_MOST = 0.9  # bound of the drift, in slopes: what no answer could hold is no drift


class Filter(msgspec.Struct, kw_only=True):
    level: float | None = None  # ln nats, at the last step that a batch shows
    drift: float = 0.0  # a step
    slope: float = SLOPE
    trend: float = 0.0  # of the drift, a step
    moment: float = 0.0  # the optimizer's first, of what moves the entropy …
    mass: float = 0.0  # … and of all that moves
    begun: float = 0.0  # how much of it has been filled: Adam scales a young one up
    ahead: list[float] = msgspec.field(default_factory=list)  # moments that no batch shows yet
    doubt: list[list[float]] | None = None  # covariance of (level, drift, slope, trend)
    off: float = 0.0  # the last batch: what was seen less what was foreseen, in logarithms …
    square: float = 1.0  # … and what the square of it was expected to be

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        return msgspec.convert(state, cls)

    def state(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    def rest(self, beta: float) -> float:
        """The net share that will keep the entropy where it is when it shows."""
        steps = len(self.ahead) + beta / (1 - beta)
        return -_within((self.drift + self.trend * steps) / self.slope, _MOST)

    def heading(self, beta: float) -> float:
        """ln nats: where the level ends if from now on every step is at rest."""
        assert self.level is not None
        rest, turn = -self.drift / self.slope, -self.trend / self.slope
        coming = sum(m - rest - turn * i for i, m in enumerate(self.ahead))
        last = rest + turn * (len(self.ahead) - 1)  # when the newest moment shows
        left = _carried(beta, self.begun) * (self._moment(last) - last)
        return self.level + self.slope * (coming + left)

    def lead(self, beta: float) -> float:
        """What the trend adds to the level while one answer comes in and the next is found.

        A trend is believed late. Judged without it the entropy hung a tenth above its target for
        half a run in which the drift rose.
        """
        return self.trend * beta / (1 - beta) * (1 + 1 / (1 - beta))

    def see(self, entropy: float, noise: float | None, lag: int) -> None:
        """Take in a batch: its mean entropy, in nats, the standard error as a share of it, and how
        many steps old the version is that it was sampled by.
        """
        while self.level is not None and len(self.ahead) > lag:
            self._pass(self.ahead.pop(0))
        value = math.log(entropy)
        noise = _NOISE if noise is None else max(WIDE * noise, _QUIET)
        if self.level is None or self.doubt is None:
            self.level = value
            self.doubt = np.diag([noise**2, 0.0, 0.0, 0.0]).tolist()
            return
        doubt = np.array(self.doubt)
        self.off, self.square = value - self.level, float(doubt[0, 0]) + noise**2
        by = doubt[:, 0] / self.square
        level, drift, slope, trend = (float(moves) for moves in by * self.off)
        self.level += level
        self.slope = min(max(self.slope + slope, SLOPE * _BAND[0]), SLOPE * _BAND[1])
        self.drift = _within(self.drift + drift, _MOST * self.slope)
        self.trend += trend
        self.doubt = (doubt - np.outer(by, doubt[0])).tolist()

    def step(self, share: float, mass: float, rate: float, beta: float) -> None:
        """Take in the step that followed: its net share, how much of the flows its weights left,
        and its learning rate as a share of the full one.
        """
        self.moment = beta * self.moment + (1 - beta) * mass * share
        self.mass = beta * self.mass + (1 - beta) * mass
        self.begun = beta * self.begun + (1 - beta)
        self.ahead.append(rate * self._moment(share))

    def _moment(self, otherwise: float) -> float:
        return self.moment / self.mass if self.mass else otherwise

    def _pass(self, moment: float) -> None:
        """One more step shows."""
        assert self.level is not None
        doubt = np.array(self.doubt)
        if doubt[2, 2] == 0:  # the first: slope and drift are in doubt such that their sum is known
            drift, slope, trend = np.square(np.array(_FIRST) * self.slope)
            doubt[1:, 1:] = [
                [drift + moment**2 * slope, -moment * slope, 0],
                [-moment * slope, slope, 0],
                [0, 0, trend],
            ]
        self.level += self.slope * moment + self.drift
        self.drift = _within(self.drift + self.trend, _MOST * self.slope)
        move = np.array([[1, 1, moment, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        new = np.diag(np.square(np.array(STEP) * self.slope))
        self.doubt = (move @ doubt @ move.T + new).tolist()


def _carried(beta: float, begun: float) -> float:
    """How often the newest moment's distance from rest is yet to come; β / (1 - β) once it is
    filled. A young one is scaled up, and less so in every later step.
    """
    fades = beta ** np.arange(1, 2 + int(20 / (1 - beta)))
    return float((fades * begun / (1 - fades * (1 - begun))).sum()) if begun else 0.0


def _within(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)
