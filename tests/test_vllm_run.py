"""Whole runs on vLLM: the learner's promises hold with its processes in between, and when they
die."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.test_kill import wait_for_step

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
PATIENCE_S = 500.0  # vLLM starts in half a minute on a machine that has nothing else to do


def test_a_run_without_lag_trains_on_the_very_probabilities_that_vllm_sampled_with(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    process = runs.begin(folder, actor__engine="vllm", learner__max_lag="0", learner__steps="6")
    assert runs.end(process, PATIENCE_S) == 0, runs.said(folder)[-2000:]
    summary = runs.summary(folder)
    assert (summary["steps"], summary["lag_max"]) == (6, 0)
    assert summary["conserved"] is True
    assert summary["heldout_after"] is not None
    steps = {line["step"]: line for line in metrics(folder) if "lag" in line}
    assert len(steps) == 6
    for step in steps.values():  # each under weights that were swapped in while vLLM ran
        assert step["kl"]["0"] == pytest.approx(0.0, abs=1e-5)
        assert step["ess"]["0"] == pytest.approx(1.0, abs=1e-4)
        assert step["agreement"]["max"] < 1e-3
        assert step["agreement"]["outside"] == 0
    assert runs.promises_kept(folder)
    again = runs.replay(folder)
    assert (again["steps"], again["equal"]) == (6, 6)


def test_a_run_survives_the_death_of_vllms_engine_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = runs.begin(folder, actor__engine="vllm", learner__steps="30")
    try:
        wait_for_step(folder, 2, PATIENCE_S)
        os.kill(engine_core(process.pid), signal.SIGKILL)
    finally:
        code = runs.end(process, PATIENCE_S)
    assert code == 0, runs.said(folder)[-2000:]
    summary = runs.summary(folder)
    assert summary["steps"] == 30
    assert summary["lag_max"] <= summary["max_lag"]
    assert "EngineCore was killed" in (folder / "logs" / "actor-0.log").read_text()
    assert runs.promises_kept(folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def engine_core(run: int) -> int:
    """The process that vLLM's engine runs in, among the descendants of `run`."""
    import psutil  # comes with vLLM

    titles = {p.pid: " ".join(p.cmdline()) for p in psutil.Process(run).children(recursive=True)}
    cores = [pid for pid, title in titles.items() if "EngineCore" in title]
    assert len(cores) == 1, titles
    return cores[0]
