"""The entropy law: golden numbers, when it is not identifiable, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from common import forecast
from common.errors import IsentropeError
from common.forecast_cli import forecast as command
from common.metrics import Metrics

GOLDEN = json.loads((Path(__file__).parent / "golden" / "entropy.json").read_text())
ENTROPY = (0.6, 0.45, 0.32, 0.22, 0.15, 0.1)
ACCURACY = (0.2, 0.243, 0.276, 0.299, 0.314, 0.325)


def points(entropy: Any, accuracy: Any) -> forecast.Points:
    entropy = np.asarray(entropy, np.float64)
    return forecast.Points(
        np.arange(len(entropy), dtype=np.float64), entropy, np.asarray(accuracy, np.float64)
    )


def a_run(folder: Path, steps: int = 30, methods: str = "[]", lift: float = 0.0) -> Path:
    """A run that follows R = -0.5 e^H + 1.4, `lift` above it; evaluated every fourth step."""
    folder.mkdir(parents=True)
    recipe = '[run]\nmodel = "tiny"\n[learner]\nclip_low = 0.2\nclip_high = 0.28\n'
    (folder / "recipe.toml").write_text(f"{recipe}methods = {methods}\n")
    sink = Metrics(folder)
    for step in range(1, steps + 1):
        entropy = 0.5 * math.exp(-0.1 * step)
        line: dict[str, Any] = {
            "entropy": entropy,
            "reward": 0.5,
            "correct": -0.5 * math.exp(entropy) + 1.4 + lift + 0.01 * (-1) ** step,
            "lag_mean": 1.5,
        }
        if step % 4 == 0:
            sampled = 0.5 * math.exp(-0.1 * (step - 1))  # of version step - 2, step - 1 begins so
            line["heldout"] = -0.5 * math.exp(sampled) + 1.4 + lift
            line["heldout_versions"] = {"oldest": step - 2, "newest": step - 2}
        sink.write(step, line)
    sink.close()
    return folder


def told(*arguments: Any) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def found(*arguments: Any) -> dict[str, Any]:
    done = told(*arguments, "--json")
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.output)
    return answer


def test_the_law_gives_the_golden_numbers() -> None:
    law = forecast.fit(ENTROPY, ACCURACY)
    assert [law.a, law.b, law.ceiling] == pytest.approx(GOLDEN["GV8.[a,b,ceiling]"], rel=1e-5)
    told = [law.ceiling_se, law.rmse, float(law.predict(0.05)), law.slope(0.3)]
    assert told == pytest.approx(GOLDEN["GV8.[SE ceiling, RMSE, R(.05), slope(.3)]"], rel=1e-5)


def test_the_first_four_points_foretell_the_last_two_as_they_should() -> None:
    law = forecast.fit(ENTROPY[:4], ACCURACY[:4])
    told = [law.a, law.b, *law.predict(ENTROPY[4:])]
    assert told == pytest.approx(GOLDEN["GV8.first4[a,b]+pred"], rel=1e-5)


def test_standard_errors_cover_what_the_points_were_made_from() -> None:
    """The true ceiling is within two of them in 95 of 100 fits."""
    draw = np.random.default_rng(0)
    entropy = np.linspace(0.05, 0.6, 30)
    within = 0
    for _ in range(2000):
        law = forecast.fit(entropy, -0.3 * np.exp(entropy) + 0.9 + draw.normal(0, 0.02, 30))
        within += abs(law.ceiling - 0.6) < 2 * law.ceiling_se
    assert 0.93 < within / 2000 < 0.96


@pytest.mark.parametrize(
    ("entropy", "accuracy", "why"),
    [
        (ENTROPY[:5], ACCURACY[:5], "5 points; it takes 6 or more"),
        (np.linspace(0, 0.09, 9), np.linspace(0.5, 0.4, 9), "e^H varies by 0.094"),
        (ENTROPY, ACCURACY[::-1], "the accuracy does not rise as the entropy falls"),
        ([0.3] * 8, [0.5] * 8, "e^H varies by 0.000"),
        ([], [], "0 points"),
    ],
)
def test_what_does_not_determine_a_law_is_not_identifiable(
    entropy: Any, accuracy: Any, why: str
) -> None:
    verdict = forecast.identify(points(entropy, accuracy))
    assert verdict.law is None
    assert why in verdict.why


def test_points_that_are_enough_are_identified() -> None:
    assert forecast.identify(points(ENTROPY, ACCURACY)).law == forecast.fit(ENTROPY, ACCURACY)


def test_an_evaluation_stands_beside_the_entropy_of_the_weights_it_sampled(
    tmp_path: Path,
) -> None:
    answer = found(a_run(tmp_path / "run"))
    assert answer["points"] == {"kind": "heldout", "count": 7}
    assert answer["law"]["a"] == pytest.approx(0.5, rel=1e-9)
    assert answer["law"]["ceiling"] == pytest.approx(0.9, rel=1e-9)


def test_a_run_with_few_evaluations_gives_one_point_a_step(tmp_path: Path) -> None:
    answer = found(a_run(tmp_path / "run", steps=20))
    assert answer["points"] == {"kind": "training", "count": 20}
    assert answer["law"]["a"] == pytest.approx(0.5, abs=3 * answer["law"]["a_se"])


def test_run_and_baseline_are_seen_through_the_same_kind_of_points(tmp_path: Path) -> None:
    base = a_run(tmp_path / "base", steps=20)
    answer = found(a_run(tmp_path / "run", methods='[{type = "steer"}]'), "--baseline", base)
    assert answer["points"]["kind"] == "training"
    assert answer["identifiable"] is True


def test_the_rest_is_predicted_from_the_first_part(tmp_path: Path) -> None:
    first = found(a_run(tmp_path / "run"), "--points", "training", "--first", "0.5")["first"]
    assert first["points"] == 15
    assert first["rest"] == 15
    assert first["final_predicted"] == pytest.approx(first["final"], abs=0.03)
    assert first["rest_rmse"] < 0.03


def test_a_run_that_intervenes_is_not_fitted_but_held_against_one_that_does_not(
    tmp_path: Path,
) -> None:
    base = a_run(tmp_path / "base")
    steered = a_run(tmp_path / "steered", methods='[{type = "steer"}]', lift=0.05)
    alone = found(steered)
    assert alone["identifiable"] is False
    assert "--baseline RUN" in alone["why"]
    assert "law" not in alone
    answer = found(steered, "--baseline", base, "--points", "training")
    assert answer["residual"]["mean"] == pytest.approx(0.05, abs=0.01)
    assert answer["law"] == found(base, "--points", "training")["law"]
    assert "more accuracy for the entropy spent" in told(steered, "--baseline", base).output


def test_a_baseline_that_intervenes_is_refused_in_one_line(tmp_path: Path) -> None:
    steered = a_run(tmp_path / "steered", methods='[{type = "steer"}]')
    with pytest.raises(IsentropeError, match=r"intervenes .*\(steer\).* without methods"):
        command.main([str(steered), "--baseline", str(steered)], standalone_mode=False)


def test_where_a_run_is_unlike_those_of_the_law_is_said(tmp_path: Path) -> None:
    departures = found(a_run(tmp_path / "run"))["departures"]
    assert departures == ["not on-policy: mean lag 1.50", "clip 0.2 / 0.28 instead of 0.2 / 0.2"]


def test_a_person_reads_law_ceiling_and_forecast_and_gets_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "law.png"
    done = told(a_run(tmp_path / "run"), "--plot", picture)
    for word in (
        "R = -a e^H + b",
        "a = 0.5000 ±",
        "ceiling    0.9000 ±",
        "from the first 6 points",
    ):
        assert word in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_an_intervention_has_a_picture_too(tmp_path: Path) -> None:
    base, picture = a_run(tmp_path / "base"), tmp_path / "law.png"
    steered = a_run(tmp_path / "steered", methods='[{type = "steer"}]', lift=0.05)
    for arguments in ([steered, "--baseline", base], [steered]):
        assert told(*arguments, "--plot", picture).exit_code == 0
        assert picture.stat().st_size > 10_000


def test_a_run_without_a_finished_step_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(IsentropeError, match="no finished step") as caught:
        command.main([str(tmp_path)], standalone_mode=False)
    assert "\n" not in str(caught.value)
