"""/metrics, read by an independent parser."""

from __future__ import annotations

import re
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
    assert {s.labels["actor"] for s in found["isentrope_actor_tokens_per_second"].samples} == {
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
    named = {re.sub("_s$", "_second" if "_per_" in n else "_seconds", n): n for n in wanted}
    meant = {name: found[f"isentrope_step_{name}"].documentation for name in named}
    assert meant == {name: GLOSSARY[of] for name, of in named.items()}
    method = found["isentrope_step_methods"].samples[0]
    assert method.labels == {"name": "isentropic", "number": "target"}
    reasons = {sample.labels["reason"] for sample in found["isentrope_step_dropped"].samples}
    assert 'odd "name"\\\n' in reasons


def test_names_keep_the_conventions_of_prometheus() -> None:
    """As `promtool check metrics` has them: base units in full, _total for counters alone, no
    ending that means something else, no type in a name, help for each."""
    line: dict[str, Any] = {name: 0.25 for name in GLOSSARY if not name.endswith("/")}
    shown = families(prometheus.text(a_troubled_status(), line, time.time()))
    text = prometheus.text(a_troubled_status(), line, time.time())
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    short = {
        "s",
        "ms",
        "us",
        "ns",
        "sec",
        "min",
        "h",
        "d",
        "b",
        "kb",
        "mb",
        "gb",
        "kib",
        "mib",
        "gib",
    }
    for name, kind in types.items():
        assert re.fullmatch(r"isentrope(_[a-z0-9]+)+", name), name
        assert not short & set(name.split("_")), name
        assert name.endswith("_total") == (kind == "counter"), name
        assert not name.endswith(("_count", "_sum", "_bucket", "_gauge", "_counter")), name
        assert shown[name.removesuffix("_total")].documentation, name
    assert len(types) > 60


def test_a_run_that_has_not_begun_is_down_in_prometheus(tmp_path: Path) -> None:
    found = families(Watch(tmp_path / "gone").metrics())
    assert found["isentrope_learner_up"].samples[0].value == 0
