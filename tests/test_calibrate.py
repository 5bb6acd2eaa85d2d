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

from learner.methods.calibrate import LIFT, SLOPE, Filter

START = 0.2  # nats
RIGHT = 0.4  # share of the answers, at the start …
ODDS = math.log(RIGHT / (1 - RIGHT))  # … and their log-odds


def follow(
    shares: list[float],
    *,
    slope: float = SLOPE,
    drift: float = 0.0,
    climb: float = 0.0,
    lift: float = LIFT,
    beta: float = 0.9,
    lags: Sequence[int] = (2,),
    noise: float = 0.0,
) -> tuple[list[float], Filter]:
    """The logarithms of a plant's entropies, and what has been made of them when the batch after
    the last step is seen. `lags`: of the batches, again and again. `climb`: of the log-odds of
    right answers, a step.
    """
    course, entropies, moment, begun = Filter(), [math.log(START)], 0.0, 0.0
    rng = torch.Generator().manual_seed(0)
    for t, share in enumerate([*shares, None]):
        lag = lags[t % len(lags)]
        seen = entropies[max(0, t - lag)] + noise * float(torch.randn((), generator=rng))
        right = 1 / (1 + math.exp(-ODDS - climb * max(0, t - lag)))
        course.see(math.exp(seen), noise or None, lag)
        course.learn(right)
        if share is not None:
            course.step(share, 1.0, 1.0, beta)
            moment, begun = beta * moment + (1 - beta) * share, beta * begun + (1 - beta)
            by_itself = drift + slope * lift * climb * t
            entropies.append(entropies[-1] + slope * moment / begun + by_itself)
    return entropies, course


def shares(n: int, around: float = 0.0) -> list[float]:
    return (around + 0.6 * torch.randn(n, generator=torch.Generator().manual_seed(1))).tolist()


@pytest.mark.parametrize("lags", [(2,), (0,), (1, 2), (0, 1, 2, 2, 1)])
def test_a_plant_as_guessed_is_followed_without_a_surprise(lags: tuple[int, ...]) -> None:
    entropies, course = follow(shares(40), lags=lags)
    assert course.level == pytest.approx(entropies[40 - lags[40 % len(lags)]])
    assert course.off == pytest.approx(0, abs=1e-6)
    assert (course.slope, course.drift) == (pytest.approx(SLOPE), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize(("climb", "steps"), [(0.0, 1), (0.0, 4), (0.0, 80), (0.01, 80)])
def test_the_heading_is_where_the_entropy_ends_when_every_later_step_rests(
    beta: float, lag: int, climb: float, steps: int
) -> None:
    own: dict[str, Any] = {"beta": beta, "lags": (lag,), "drift": 0.02, "climb": climb}
    first = [-0.8] * steps
    course = follow(first, **own)[1]
    course.drift, course.slope, course.lift, course.climb = 0.02, SLOPE, LIFT, climb
    course.right = ODDS + climb * (steps - lag)
    ahead = beta / (1 - beta)
    rests = [-0.02 / SLOPE - LIFT * climb * (steps + j + ahead) for j in range(200)]
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
        course.learn(RIGHT)
        course.step(0.0, 1.0, 1.0, 0.9)
        drifts.append(course.drift)
    assert abs(sum(drifts) / len(drifts)) < 0.01, "the mean of the ratios is 1.09"


def test_noisy_batches_move_the_estimate_less() -> None:
    moved = []
    for noise in (0.02, 0.3):
        course = Filter()
        course.see(START, 0.1, 0)
        course.learn(RIGHT)
        course.see(2 * START, noise, 0)
        course.learn(RIGHT)
        assert course.level is not None
        moved.append(course.level - math.log(START))
    assert 0 < moved[1] < moved[0] < math.log(2)


def test_the_slope_stays_positive_and_moves_only_when_predictions_vary() -> None:
    for slope, bound in ((-SLOPE, SLOPE / 20), (9 * SLOPE, 3 * SLOPE)):
        course = follow(shares(100), slope=slope, beta=0.0, lags=(0,))[1]
        assert course.slope == pytest.approx(bound)
    alike = follow([0.5] * 9, slope=1.5 * SLOPE, beta=0.0, lags=(0,))[1]
    assert alike.slope == pytest.approx(SLOPE, rel=0.03)
    assert alike.drift == pytest.approx(0.5 * 0.5 * SLOPE, rel=0.1)


def test_a_warm_up_step_is_worth_its_share_of_the_rate() -> None:
    whole, half = Filter(), Filter()
    for course, rate in ((whole, 1.0), (half, 0.5)):
        course.see(START, 0.05, 0)
        course.learn(RIGHT)
        course.step(-0.8, 1.0, rate, 0.9)
        course.see(START, 1e6, 0)
        course.learn(RIGHT)
    assert whole.level is not None
    assert half.level is not None
    falls = [course - math.log(START) for course in (whole.level, half.level)]
    assert falls[1] == pytest.approx(falls[0] / 2)


def test_a_lag_that_shrinks_shows_the_steps_that_it_held_back() -> None:
    course = Filter()
    course.see(START, 0.05, 0)
    course.learn(RIGHT)
    for _ in range(3):
        course.step(-0.5, 1.0, 1.0, 0.0)
        course.see(START, 1e6, 3)
        course.learn(RIGHT)
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
        one.learn(RIGHT)
        one.step(0.2, 1.0, 1.0, 0.9)
    assert again == course


def test_what_comes_with_right_answers_is_answered_where_it_will_be() -> None:
    course = follow([-0.3] * 60, climb=0.03, noise=0.03)[1]
    ahead = 2 + 9
    assert course.climb == pytest.approx(0.03, rel=0.15)
    assert course.rest(0.9) == pytest.approx(-LIFT * 0.03 * (58 + ahead), rel=0.15)


def test_a_batch_that_is_all_right_or_all_wrong_has_odds() -> None:
    for right, odds in ((0.0, -4.6), (1.0, 4.6)):
        course = Filter()
        course.see(START, 0.1, 0)
        course.learn(right)
        assert course.right == pytest.approx(odds, abs=0.01)


@pytest.mark.parametrize("lags", [(2,), (0,), (1, 2)])
def test_a_climb_that_is_known_is_followed_without_a_surprise(lags: tuple[int, ...]) -> None:
    course, entropies, right = Filter(), [math.log(START)], ODDS
    for t, share in enumerate(shares(40)):
        lag = lags[t % len(lags)]
        shown = max(0, t - lag)
        course.see(math.exp(entropies[shown]), None, lag)
        course.learn(1 / (1 + math.exp(-ODDS - 0.03 * shown)))
        course.right, course.climb = right + 0.03 * shown, 0.03
        course.step(share, 1.0, 1.0, 0.0)
        entropies.append(entropies[-1] + SLOPE * (share + LIFT * 0.03 * t))
    assert course.off == pytest.approx(0, abs=1e-6)
    assert (course.slope, course.lift) == (pytest.approx(SLOPE), pytest.approx(LIFT))
    assert course.drift == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lift", [0.0, 0.5 * LIFT, LIFT, 1.5 * LIFT])
def test_where_the_lift_is_not_as_guessed_lift_and_drift_take_the_error(lift: float) -> None:
    course = follow(shares(200, -0.2), lift=lift, climb=0.01, noise=0.02)[1]
    assert abs(course.lift - lift) <= 0.9 * abs(LIFT - lift) + 0.05
    assert course.slope == pytest.approx(SLOPE, rel=0.1)
    assert course.rest(0.9) == pytest.approx(-lift * 0.01 * (200 + 9), abs=0.15)


def test_odds_that_climb_far_do_not_drag_the_slope() -> None:
    course = follow([0.1 * share for share in shares(80)], lift=0.0, climb=0.07)[1]
    assert course.slope == pytest.approx(SLOPE, rel=0.1)
    assert course.rest(0.9) == pytest.approx(0, abs=0.3)


def test_what_no_answer_could_hold_does_not_wind_up() -> None:
    course = follow(shares(80), slope=1.5 * SLOPE, climb=0.09)[1]
    assert course.rest(0.9) == pytest.approx(-0.9)
    assert course.drift / course.slope < 0.3
    assert 0 <= course.lift <= 2 * LIFT


def test_the_script_finds_the_constants_that_foretell_a_recorded_run_best(tmp_path: Path) -> None:
    moved, beta, climb = shares(120), 0.9, 0.03
    entropies = follow(moved, beta=beta, climb=climb)[0]
    rng = torch.Generator().manual_seed(2)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for t, share in enumerate(moved):
            seen = entropies[max(0, t - 2)] + 0.06 * float(torch.randn((), generator=rng))
            own = {"noise": 0.05, "share": share, "mass": 1.0, "lag": 2.0, "target": START}
            line = {"step": t + 1, "time": 0.0, "lr": 1e-4, "entropy": math.exp(seen)}
            line["correct"] = 1 / (1 + math.exp(-ODDS - climb * max(0, t - 2)))
            line |= {f"methods/isentropic/{name}": value for name, value in own.items()}
            file.write(json.dumps(line) + "\n")
            del line["methods/isentropic/share"]  # as of a batch with nothing to learn from
            file.write(json.dumps(line | {"step": t + 1000}) + "\n")
    script = Path(__file__).parent.parent / "scripts" / "likelihood"
    command = [sys.executable, str(script), str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    nats = {name: numbers["nats"] for name, numbers in found.items()}
    best = nats["as they are"]
    assert found["as they are"]["ahead"] < 0.9 * found["without lift"]["ahead"]
    assert 0.02 < found["as they are"]["off"] < 0.8 * found["without lift"]["off"]
    assert best > nats["without momentum"] + 0.1
    for other in ("WIDE x 2", "WIDE x 0.5", "SLOPE x 0.5", "LIFT x 0.5", "LIFT x 2"):
        assert best > nats[other], other
