"""Where the entropy is, where it is heading, and what an answer is worth: estimated on line.

With x the logarithm of the mean entropy, the net share u of a step (what is predicted of it, over
all flows that its weights leave, -1 if all tokens lowered the entropy and 1 if all raised it), and
r the log-odds that an answer is right, of all that were looked at for a batch,

    x ← x + slope · (m + lift · (r - r at the start)) + drift           m ← β m + (1 - β) u

Adam makes a step's size independent of the gradient's, and shared weights rescale what is left, so
a prediction says little by its size: hence shares, and a slope. The optimizer's first moment
spreads a step over the next 1 / (1 - β), so most of what was decided last is yet to come; and
answers sampled by a version that is some steps old do not show yet where later choices lead. Both
are known, not noise: they are what `heading` adds to the level.

Lift and drift are what comes by itself: batches that are drawn from harder problems, steps along
what noise a balance leaves. Much of it goes with what the policy has learned, and that is measured
better than the entropy is: so r and how fast it climbs tell where the entropy will be when today's
answer shows. Drift is what they leave.

A Kalman filter follows level, drift, slope and lift: the regression of what is realised on what
was predicted, with an intercept, a prior and forgetting, that also knows the noise of a batch,
which is measured from its groups. Beliefs in drift and slope are tied such that steps alike tell
the drift alone, and what comes by itself tells nothing of the slope: that moves only when
predictions vary, and is kept positive. Logarithms throughout: the mean of a ratio of two noisy
entropies is above 1 by the square of their noise, which a drift would take for entropy that comes
by itself.
"""

from __future__ import annotations

import math
from typing import Any, Self

import msgspec
import numpy as np

SLOPE = 0.2  # the guess: all flows together move the entropy by so much of itself in a step
_BAND = (0.05, 3.0)  # bounds of the slope, in guesses
NOISE = 0.1  # of a batch's entropy, as a share of it, where less than two groups tell it
WIDE = 1.0  # what groups tell of it is times this
_QUIET = 0.02  # … and at least: groups that agree by chance are no proof
LIFT = 0.15  # the guess, in slopes: what a unit of log-odds of right answers adds to a step …
_RIGHT = (0.3, 0.01)  # … and how fast these odds, and their climb, are believed
_SURE = 0.01  # no batch shows that fewer than so many answers are right, or wrong
# Standard deviations of what is not foreseen, in slopes: in a step, and before the first. Those of
# a step, SLOPE, LIFT and WIDE are near where runs of the demo are likeliest: scripts/likelihood.
STEP = (0.1, 0.05, 0.01)  # of level, drift, slope
_FIRST = (0.25, 0.25)  # of drift, slope
_DOUBT = 0.04  # of the lift, for good
_MOST = 0.9  # bound of what comes by itself, in slopes: what no answer could hold is no drift


class Filter(msgspec.Struct, kw_only=True):
    level: float | None = None  # ln nats, at the last step that a batch shows
    drift: float = 0.0  # a step
    slope: float = SLOPE
    lift: float = LIFT
    right: float = 0.0  # log-odds of the answers, smoothed …
    climb: float = 0.0  # … what they gain in a step …
    first: float | None = None  # … and where they were at the start
    moment: float = 0.0  # the optimizer's first, of what moves the entropy …
    mass: float = 0.0  # … and of all that moves
    begun: float = 0.0  # how much of it has been filled: Adam scales a young one up
    ahead: list[float] = msgspec.field(default_factory=list)  # moments that no batch shows yet
    doubt: list[list[float]] | None = None  # covariance of (level, drift, slope, lift)
    off: float = 0.0  # the last batch: what was seen less what was foreseen, in logarithms …
    square: float = 1.0  # … and what the square of it was expected to be

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        return msgspec.convert(state, cls)

    def state(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    def rest(self, beta: float) -> float:
        """The net share that will keep the entropy where it is when it shows."""
        return self._rest(len(self.ahead) + beta / (1 - beta))

    def heading(self, beta: float) -> float:
        """ln nats: where the level ends if from now on every step is at rest."""
        assert self.level is not None
        coming = sum(m - self._rest(i) for i, m in enumerate(self.ahead))
        last = self._rest(len(self.ahead) - 1)  # when the newest moment shows
        left = _carried(beta, self.begun) * (self._moment(last) - last)
        return self.level + self.slope * (coming + left)

    def see(self, entropy: float, noise: float | None, lag: int) -> None:
        """Take in a batch: its mean entropy, in nats, the standard error as a share of it, and how
        many steps old the version is that it was sampled by.
        """
        self.show(lag)
        value = math.log(entropy)
        noise = NOISE if noise is None else max(WIDE * noise, _QUIET)
        if self.level is None or self.doubt is None:
            self.level = value
            self.doubt = np.diag([noise**2, 0.0, 0.0, 0.0]).tolist()
            return
        doubt = np.array(self.doubt)
        self.off, self.square = value - self.level, float(doubt[0, 0]) + noise**2
        by = doubt[:, 0] / self.square
        level, drift, slope, lift = (float(moves) for moves in by * self.off)
        self.level += level
        self.slope = min(max(self.slope + slope, SLOPE * _BAND[0]), SLOPE * _BAND[1])
        self.drift = _within(self.drift + drift, _MOST * self.slope)
        self.lift = min(max(self.lift + lift, 0.0), 2 * LIFT)
        self.doubt = (doubt - np.outer(by, doubt[0])).tolist()

    def learn(self, right: float) -> None:
        """Take in what share of the answers is right, of the batch that was seen last."""
        right = min(max(right, _SURE), 1 - _SURE)
        odds = math.log(right / (1 - right))
        if self.first is None:
            self.right = self.first = odds
        off = odds - self.right
        self.right += _RIGHT[0] * off
        self.climb += _RIGHT[1] * off

    def show(self, lag: int) -> None:
        """Foretell the level as a batch of that lag would show it."""
        while self.level is not None and len(self.ahead) > lag:
            self._pass(self.ahead.pop(0))

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

    def _more(self, steps: float) -> float:
        """Log-odds above those of the start, so many steps after the last that shows."""
        return 0.0 if self.first is None else self.right + self.climb * steps - self.first

    def _rest(self, steps: float) -> float:
        """The share at which the entropy rests then."""
        return -_within(self.drift / self.slope + self.lift * self._more(steps), _MOST)

    def _pass(self, moment: float) -> None:
        """One more step shows."""
        assert self.level is not None
        doubt = np.array(self.doubt)
        if doubt[2, 2] == 0:  # the first: slope and drift are in doubt such that their sum is known
            drift, slope = np.square(np.array(_FIRST) * self.slope)
            doubt[1:, 1:] = [
                [drift + moment**2 * slope, -moment * slope, 0],
                [-moment * slope, slope, 0],
                [0, 0, _DOUBT**2],
            ]
        more, most = self._more(0), _MOST * self.slope
        by_itself = self.slope * self.lift * more + self.drift
        cut = abs(by_itself) > most  # then neither drift nor lift had a part in how much it was
        self.level += self.slope * moment + _within(by_itself, most)
        self.right += self.climb
        by_drift, by_lift = (0.0, 0.0) if cut else (1.0, self.slope * more)
        move = np.array([[1, by_drift, moment, by_lift], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        new = np.diag(np.square([*(sigma * self.slope for sigma in STEP), 0.0]))
        self.doubt = (move @ doubt @ move.T + new).tolist()


def _carried(beta: float, begun: float) -> float:
    """How often the newest moment's distance from rest is yet to come; β / (1 - β) once it is
    filled. A young one is scaled up, and less so in every later step.
    """
    fades = beta ** np.arange(1, 2 + int(20 / (1 - beta)))
    return float((fades * begun / (1 - fades * (1 - begun))).sum()) if begun else 0.0


def _within(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)
