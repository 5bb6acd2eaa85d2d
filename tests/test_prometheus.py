"""/metrics, read by an independent parser."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from common import prometheus
from common.dash_state import Watch
from common.metrics import GLOSSARY
from tests.test_views import a_run, a_troubled_status


def families(text: str) -> dict[str, Any]:
    parser = pytest.importorskip("prometheus_client.parser")
    return {family.name: family for family in parser.text_string_to_metric_families(text)}


def test_prometheus_reads_every_number_with_its_meaning(tmp_path: Path) -> None:
    found = families(Watch(a_run(tmp_path)).metrics())
    reward = found["isentrope_step_reward"]
    assert (reward.documentation, reward.type) == (GLOSSARY["reward"], "gauge")
    assert reward.samples[0].value == pytest.approx(0.76)
    lags = {s.labels["lag"]: s.value for s in found["isentrope_step_lag"].samples}
    assert lags == {"0": 200, "1": 50}
    tickets = {tuple(s.labels.values()): s.value for s in found["isentrope_tickets"].samples}
    assert tickets["main", "zero_variance"] == 300
    assert {s.labels["actor"] for s in found["isentrope_actor_tokens_per_s"].samples} == {
        "actor-0",
        "actor-1",
    }
    assert found["isentrope_learner_up"].samples[0].value == 1


def test_every_metric_of_the_glossary_has_a_place_in_prometheus() -> None:
    table = {"0": 1.0, "1/up": -2.5, 'odd "name"\\\n': 3}
    line: dict[str, Any] = {name: 0.25 for name in GLOSSARY if not name.endswith("/")}
    line |= dict.fromkeys((*prometheus.BY_LAG, "dropped", "agreement"), table)
    line |= {"methods/isentropic/target": 0.3, "heldout": None, "unheard_of": 1.0}
    found = families(prometheus.text(a_troubled_status(), line, time.time()))
    wanted = {n for n in line if n in GLOSSARY and n not in {*prometheus.SKIPPED, "heldout"}}
    assert {f"isentrope_step_{name}" for name in wanted} <= found.keys()
    method = found["isentrope_step_methods"].samples[0]
    assert method.labels == {"name": "isentropic", "number": "target"}
    reasons = {sample.labels["reason"] for sample in found["isentrope_step_dropped"].samples}
    assert 'odd "name"\\\n' in reasons


def test_a_run_that_has_not_begun_is_down_in_prometheus(tmp_path: Path) -> None:
    found = families(Watch(tmp_path / "gone").metrics())
    assert found["isentrope_learner_up"].samples[0].value == 0
