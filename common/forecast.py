"""The entropy law R = -a e^H + b of a run: fitted, judged, and held against what came later.

Entropy is spent on reward along one curve while nothing intervenes (arXiv 2505.22617, section 2.4):
linear in x = -e^H, so ordinary least squares find a and b. At H = 0 nothing is left to spend and
the curve ends at its ceiling, R = b - a.

    points, kind = heldout(lines), ...      one (step, H, R) an evaluation, or one a step
    verdict = identify(points)              verdict.law, or verdict.why there is none
    verdict.law.predict(H)                  the rest of the run from its first part
    residuals(points, verdict.law)          an intervention held against a run without one

H is the mean over the tokens of the groups that a step trained on, at temperature 1 unless the
recipe says otherwise; R is the held-out accuracy, or the share of right answers among all that a
step looked at. Nothing is smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST_POINTS = 6
LEAST_SPREAD = 0.1  # of e^H
FIRST_SHARE = 0.15  # of the points; the paper's 36 of 236 steps

Lines = Sequence[Mapping[str, Any]]
Array = NDArray[np.float64]


class Points(NamedTuple):
    """Three arrays [n]: step, policy entropy (nats per token), accuracy (share)."""

    step: Array
    entropy: Array
    accuracy: Array

    def part(self, begin: int, end: int | None = None) -> Points:
        return Points(*(column[begin:end] for column in self))

    @property
    def spread(self) -> float:
        """Of e^H over the points."""
        return float(np.ptp(np.exp(self.entropy))) if len(self.entropy) else 0.0


class Law(NamedTuple):
    """R = -a e^H + b with standard errors (nan from two points: nothing is left to judge by)."""

    a: float
    b: float
    a_se: float
    b_se: float
    ceiling: float  # b - a, at H = 0
    ceiling_se: float
    rmse: float  # over its own points
    points: int

    def predict(self, entropy: ArrayLike) -> Array:
        return np.asarray(-self.a * np.exp(entropy) + self.b, dtype=np.float64)

    def slope(self, entropy: float) -> float:
        """dR/dH."""
        return -self.a * math.exp(entropy)


class Verdict(NamedTuple):
    law: Law | None
    why: str  # there is none: "" with a law


# -- the points of a run ----------------------------------------------------------------------


def heldout(lines: Lines) -> Points:
    """One point an evaluation: its accuracy beside the entropy of the very weights it sampled.

    Version v is what step v + 1 begins with, so its entropy stands in the line of that step; after
    the last step the line before has to do.
    """
    entropies = {line["step"]: line["entropy"] for line in lines if _has(line, "entropy")}
    rows = []
    for line in lines:
        if _has(line, "heldout") and entropies:
            entropy = _entropy_of(line.get("heldout_versions") or {}, line["step"], entropies)
            rows.append((line["step"], entropy, line["heldout"]))
    return _points(rows)


def training(lines: Lines) -> Points:
    """One point a step: the share of right answers among all the groups it looked at."""
    return _points(
        [
            (line["step"], line["entropy"], line["correct"])
            for line in lines
            if _has(line, "entropy") and _has(line, "correct")
        ]
    )


def _entropy_of(versions: Mapping[str, int], step: int, entropies: Mapping[int, float]) -> float:
    oldest, newest = versions.get("oldest", step), versions.get("newest", step)
    found = [entropies[v + 1] for v in range(oldest, newest + 1) if v + 1 in entropies]
    if found:
        return sum(found) / len(found)
    return entropies[min(entropies, key=lambda at: abs(at - newest - 1))]


def _has(line: Mapping[str, Any], name: str) -> bool:
    return isinstance(line.get(name), int | float)


def _points(rows: Sequence[tuple[int, float, float]]) -> Points:
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 3).T
    return Points(*columns)


# -- the fit ----------------------------------------------------------------------------------


def fit(entropy: ArrayLike, accuracy: ArrayLike) -> Law:
    """Ordinary least squares of R on (-e^H, 1). Asserts two points of different entropy."""
    x, y = -np.exp(np.asarray(entropy, np.float64)), np.asarray(accuracy, np.float64)
    design = np.stack([x, np.ones_like(x)], axis=1)  # [n, 2]
    assert len(x) >= 2, "a line needs two points"
    assert np.ptp(x) > 0, "a line needs two points of different entropy"
    inverse = np.linalg.inv(design.T @ design)
    a, b = inverse @ design.T @ y
    rss = float(np.square(y - design @ (a, b)).sum())
    covariance = inverse * (rss / (len(x) - 2) if len(x) > 2 else math.nan)
    at_zero = np.array([-1.0, 1.0])
    return Law(
        a=float(a),
        b=float(b),
        a_se=math.sqrt(covariance[0, 0]),
        b_se=math.sqrt(covariance[1, 1]),
        ceiling=float(b - a),
        ceiling_se=math.sqrt(at_zero @ covariance @ at_zero),
        rmse=math.sqrt(rss / len(x)),
        points=len(x),
    )


def identify(points: Points) -> Verdict:
    """The law of these points where they determine one, else the reason why they do not."""
    count, spread = len(points.step), points.spread
    if count < LEAST_POINTS:
        return Verdict(None, f"{count} points; it takes {LEAST_POINTS} or more")
    if spread < LEAST_SPREAD:
        return Verdict(
            None, f"e^H varies by {spread:.3f} over the points; it takes {LEAST_SPREAD:g} or more"
        )
    law = fit(points.entropy, points.accuracy)
    if law.a <= 0:
        return Verdict(None, f"a = {law.a:.3f}: the accuracy does not rise as the entropy falls")
    return Verdict(law, "")


def first_part(points: Points, share: float = FIRST_SHARE) -> int:
    """How many points a forecast is made from: `share` of them, and as many as a fit takes."""
    return min(len(points.step), max(LEAST_POINTS, math.ceil(share * len(points.step))))


def residuals(points: Points, law: Law) -> Array:
    """R + a e^H - b, [n]: positive is more accuracy for the entropy spent than the law has."""
    return points.accuracy - law.predict(points.entropy)


# -- its conditions ---------------------------------------------------------------------------


def interventions(learner: Mapping[str, Any]) -> list[str]:
    """The methods of a recipe's [learner]: the law is not fitted to a run that has any."""
    return [str(method.get("type")) for method in learner.get("methods") or []]


def departures(learner: Mapping[str, Any], lines: Lines) -> list[str]:
    """Where a run is not as those that the law was found on; none of it forbids the fit."""
    found = []
    lags = [line["lag_mean"] for line in lines if _has(line, "lag_mean")]
    if lags and sum(lags) > 0:
        found.append(f"not on-policy: mean lag {sum(lags) / len(lags):.2f}")
    low, high = learner.get("clip_low"), learner.get("clip_high")
    if (low, high) != (0.2, 0.2):
        found.append(f"clip {low} / {high} instead of 0.2 / 0.2")
    if learner.get("loss", "ppo") != "ppo":
        found.append(f"loss {learner['loss']}")
    if learner.get("advantage") == "psr_nsr":
        found.append("advantage psr_nsr")
    if learner.get("temperature", 1.0) != 1.0:
        found.append(f"sampled at temperature {learner['temperature']:g}")
    return found
