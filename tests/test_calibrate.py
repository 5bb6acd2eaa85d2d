"""Where the entropy is heading and what an answer is worth, estimated as a run goes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.methods.calibrate import SLOPE, Filter

START = 0.2  # nats


def follow(
    shares: list[float],
    *,
    slope: float = SLOPE,
    drift: float = 0.0,
    trend: float = 0.0,
    beta: float = 0.9,
    lags: Sequence[int] = (2,),
    noise: float = 0.0,
) -> tuple[list[float], Filter]:
    """The logarithms of a plant's entropies, and what has been made of them when the batch after
    the last step is seen. `lags`: of the batches, again and again.
    """
    course, entropies, moment, begun = Filter(), [math.log(START)], 0.0, 0.0
    rng = torch.Generator().manual_seed(0)
    for t, share in enumerate([*shares, None]):
        lag = lags[t % len(lags)]
        seen = entropies[max(0, t - lag)] + noise * float(torch.randn((), generator=rng))
        course.see(math.exp(seen), noise or None, lag)
        if share is not None:
            course.step(share, 1.0, 1.0, beta)
            moment, begun = beta * moment + (1 - beta) * share, beta * begun + (1 - beta)
            entropies.append(entropies[-1] + slope * moment / begun + drift + trend * t)
    return entropies, course


def shares(n: int, around: float = 0.0) -> list[float]:
    return (around + 0.6 * torch.randn(n, generator=torch.Generator().manual_seed(1))).tolist()


@pytest.mark.parametrize("lags", [(2,), (0,), (1, 2), (0, 1, 2, 2, 1)])
def test_a_plant_as_guessed_is_followed_without_a_surprise(lags: tuple[int, ...]) -> None:
    entropies, course = follow(shares(40), lags=lags)
    assert course.level == pytest.approx(entropies[40 - lags[40 % len(lags)]], abs=1e-3)
    assert course.off == pytest.approx(0, abs=1e-3)
    assert (course.slope, course.drift) == (pytest.approx(SLOPE), pytest.approx(0, abs=1e-3))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize(("trend", "steps"), [(0.0, 1), (0.0, 4), (0.0, 80), (0.001, 80)])
def test_the_heading_is_where_the_entropy_ends_when_every_later_step_rests(
    beta: float, lag: int, trend: float, steps: int
) -> None:
    own: dict[str, Any] = {"beta": beta, "lags": (lag,), "drift": 0.02, "trend": trend}
    first = [-0.8] * steps
    course = follow(first, **own)[1]
    course.drift, course.slope, course.trend = 0.02 + trend * (steps - lag), SLOPE, trend
    ahead = beta / (1 - beta)
    rests = [-(0.02 + trend * (steps + j + ahead)) / SLOPE for j in range(200)]
    assert course.rest(beta) == pytest.approx(rests[0])
    ends = follow(first + rests, **own)[0]
    assert course.level is not None
    off = course.level - ends[max(0, steps - lag)]
    assert course.heading(beta) - off == pytest.approx(ends[-1], abs=1e-3)


def test_slope_and_drift_are_found_from_what_happened() -> None:
    course = follow(shares(200, -0.3), slope=1.5 * SLOPE, drift=0.06, beta=0.0, lags=(0,))[1]
    assert course.slope == pytest.approx(1.5 * SLOPE, rel=0.15)
    assert course.drift == pytest.approx(0.06, abs=0.02)


def test_a_drift_shows_through_noise_and_steps_that_answer_it() -> None:
    course = follow([-0.4] * 60, drift=0.08, noise=0.1)[1]
    assert course.rest(0.9) == pytest.approx(-0.4, abs=0.15)


def test_noise_of_the_measured_entropy_is_no_drift() -> None:
    course, drifts = Filter(), []
    rng = torch.Generator().manual_seed(0)
    for noise in (0.3 * torch.randn(400, generator=rng)).tolist():
        course.see(0.05 * math.exp(noise), 0.3, 0)
        course.step(0.0, 1.0, 1.0, 0.9)
        drifts.append(course.drift)
    assert abs(sum(drifts) / len(drifts)) < 0.01, "the mean of the ratios is 1.09"


def test_noisy_batches_move_the_estimate_less() -> None:
    moved = []
    for noise in (0.02, 0.3):
        course = Filter()
        course.see(START, 0.1, 0)
        course.see(2 * START, noise, 0)
        assert course.level is not None
        moved.append(course.level - math.log(START))
    assert 0 < moved[1] < moved[0] < math.log(2)


def test_the_slope_stays_positive_and_moves_only_when_predictions_vary() -> None:
    for slope, bound in ((-SLOPE, SLOPE / 20), (9 * SLOPE, 3 * SLOPE)):
        course = follow(shares(100), slope=slope, beta=0.0, lags=(0,))[1]
        assert course.slope == pytest.approx(bound, rel=0.01)
    alike = follow([0.5] * 9, slope=1.5 * SLOPE, beta=0.0, lags=(0,))[1]
    assert alike.slope == pytest.approx(SLOPE, rel=0.03)
    assert alike.drift == pytest.approx(0.5 * 0.5 * SLOPE, rel=0.1)


def test_a_warm_up_step_is_worth_its_share_of_the_rate() -> None:
    whole, half = Filter(), Filter()
    for course, rate in ((whole, 1.0), (half, 0.5)):
        course.see(START, 0.05, 0)
        course.step(-0.8, 1.0, rate, 0.9)
        course.see(START, 1e6, 0)
    assert whole.level is not None
    assert half.level is not None
    falls = [course - math.log(START) for course in (whole.level, half.level)]
    assert falls[1] == pytest.approx(falls[0] / 2)


def test_a_lag_that_shrinks_shows_the_steps_that_it_held_back() -> None:
    course = Filter()
    course.see(START, 0.05, 0)
    for _ in range(3):
        course.step(-0.5, 1.0, 1.0, 0.0)
        course.see(START, 1e6, 3)
    assert (course.level, len(course.ahead)) == (pytest.approx(math.log(START)), 3)
    course.step(-0.5, 1.0, 1.0, 0.0)
    course.see(START, 1e6, 1)  # a batch that says nothing of its own
    assert len(course.ahead) == 1
    assert course.level == pytest.approx(math.log(START) - 3 * 0.5 * SLOPE)


def test_its_state_is_plain_and_goes_on_the_same() -> None:
    course = follow(shares(20), noise=0.1)[1]
    again = Filter.of(course.state())
    for one in (course, again):
        one.see(0.1, 0.1, 2)
        one.step(0.2, 1.0, 1.0, 0.9)
    assert again == course


def test_a_drift_that_moves_on_is_answered_where_it_will_be() -> None:
    course, level = Filter(), math.log(START)
    for t in range(60):
        course.see(math.exp(level), 0.03, 2)
        course.step(-0.3, 1.0, 1.0, 0.9)
        level += SLOPE * -0.3 + 0.002 * t  # rests at -0.01 t: it is the step's own answer that lags
    drift, ahead = 0.002 * 59, 2 + 9
    assert course.rest(0.9) == pytest.approx(-(drift + 0.002 * ahead) / SLOPE, rel=0.1)
    assert -course.drift / course.slope == pytest.approx(-drift / SLOPE, rel=0.1)


def test_the_script_finds_the_constants_that_foretell_a_recorded_run_best(tmp_path: Path) -> None:
    moved, beta = shares(120), 0.9
    entropies = follow(moved, beta=beta)[0]
    rng = torch.Generator().manual_seed(2)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for t, share in enumerate(moved):
            seen = entropies[max(0, t - 2)] + 0.06 * float(torch.randn((), generator=rng))
            own = {"noise": 0.05, "share": share, "mass": 1.0, "lag": 2.0}
            line = {"step": t + 1, "time": 0.0, "lr": 1e-4, "entropy": math.exp(seen)}
            line |= {f"methods/isentropic/{name}": value for name, value in own.items()}
            file.write(json.dumps(line) + "\n")
    script = Path(__file__).parent.parent / "scripts" / "likelihood"
    command = [sys.executable, str(script), str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    nats = {name: found[0] for name, found in json.loads(done.stdout).items()}
    best = nats["as they are"]
    assert best > nats["without momentum"] + 0.1
    for other in ("WIDE x 2", "WIDE x 0.5", "SLOPE x 0.5", "level of a step x 2"):
        assert best > nats[other], other
