"""One short recorded run, trained on again with every method, and step by step with several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from common.metrics import read as read_metrics
from learner.cli import replay
from learner.methods import AnyMethod
from tests import runs

pytestmark = pytest.mark.timeout(400)

METHODS = sorted(str(kind.__struct_config__.tag) for kind in get_args(AnyMethod))
# recipes whose methods and losses differ: weights, drops, a set-point, another loss, group factors
RIVALS = ["steer", "clip_cov", "kl_cov", "isentropic", "adora", "gspo", "psr_nsr"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first_order") / "run"
    runs.run(folder, learner__steps="3", learner__eval__problems="4", learner__realised_every="1")
    return folder


def said(folder: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(replay, [str(folder), "--json", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_run_is_trained_again_with_any_method(recorded: Path, method: str) -> None:
    needed = {"isentropic": ", target=0.2", "adaptive_entropy": ", target=0.2"}.get(method, "")
    override = f'learner.methods=[{{type="{method}"{needed}}}]'
    again = said(recorded, "-s", override, "--least-ess", "0")
    assert again["steps"] == 3
    assert again["stopped"] == ""


@pytest.fixture(scope="module")
def compared(recorded: Path) -> dict[str, Any]:
    return said(recorded, "--compare", ",".join(RIVALS), "--every", "2")


def test_every_rival_takes_one_step_from_every_point(compared: dict[str, Any]) -> None:
    found = [(p["t"], p["name"]) for p in compared["points"]]
    assert found == [(t, name) for t in (0, 2) for name in ("plain", *RIVALS)]
    assert list(compared["summary"]) == ["plain", *RIVALS]


def test_without_methods_it_is_the_recorded_step_itself(
    recorded: Path, compared: dict[str, Any]
) -> None:
    lines = {line["step"]: line for line in read_metrics(recorded)}
    for point in compared["points"]:
        if point["name"] == "plain":
            line = lines[point["t"] + 1]
            assert point["predicted"] == pytest.approx(line["entropy_predicted"], rel=1e-5)
            assert point["realised"] == pytest.approx(line["entropy_realised"], rel=1e-3, abs=1e-6)
            assert point["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)


def test_methods_differ_on_identical_data_and_every_step_serves_the_surrogate(
    compared: dict[str, Any],
) -> None:
    first = {p["name"]: p for p in compared["points"] if p["t"] == 0}
    plain = first["plain"]
    for name in ("steer", "clip_cov", "kl_cov", "adora"):
        assert first[name]["predicted"] != plain["predicted"], name
    assert plain["surrogate"] > 0
    assert all(point["surrogate"] > 0 for name, point in first.items() if name != "psr_nsr")


def test_a_table_is_shown_and_an_override_beside_it_is_refused(recorded: Path) -> None:
    done = CliRunner().invoke(replay, [str(recorded), "--compare", "steer", "--every", "3"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == [
        "step",
        "methods",
        "predicted",
        "realised",
        "surrogate",
        "grad",
        "norm",
    ]
    assert [line.split()[1] for line in lines[1:3]] == ["plain", "steer"]
    refused = CliRunner().invoke(
        replay, [str(recorded), "--compare", "steer", "-s", "learner.lr=1e-5"]
    )
    assert "leave -s out" in str(refused.exception)
    unknown = CliRunner().invoke(replay, [str(recorded), "--compare", "stear"])
    assert "no recipe 'stear'; did you mean steer?" in str(unknown.exception)
