"""Whole runs whose engines die, hang, or are too small: the run goes on, and nothing is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import runs
from tests.conftest import Start

# A run of this size samples some 2,500 tokens.
DYING = {"actor__scripted__dies_after_tokens": "900", "actor__engine_restarts": "20"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("actors", [1, 2])
def test_an_engine_that_dies_in_mid_run_costs_nothing_but_time(actors: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = runs.run(folder, recipe="scripted", actor__count=str(actors), **DYING)
    assert summary["steps"] == 4
    assert sum(summary["engine_restarts"].values()) >= 1
    assert not any(summary["restarts"].values()), "no process had to be started again"
    assert runs.promises_kept(folder)
    log = (folder / "logs" / "actor-0.log").read_text()
    assert "the engine broke: the scripted engine died after" in log


@pytest.mark.timeout(400)
def test_an_engine_that_hangs_is_found_out_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hanging = {"actor__scripted__hangs_after_tokens": "1200", "actor__engine_hang_s": "0.5"}
    summary = runs.run(folder, recipe="scripted", actor__engine_restarts="20", **hanging)
    assert summary["steps"] == 4
    assert summary["engine_restarts"]["actor-0"] >= 1
    assert runs.promises_kept(folder)


@pytest.mark.timeout(400)
def test_an_actor_whose_engine_always_dies_leaves_and_the_run_goes_on_with_another(
    tmp_path: Path, redis_url: str, free_port: int, processes: Start
) -> None:
    folder, learner = tmp_path / "run", f"tcp://127.0.0.1:{free_port}"
    places = {"run__redis": redis_url, "run__learner": learner}
    run = runs.begin(folder, "scripted", actor__count="0", **places)

    def actor(name: str, *settings: str) -> subprocess.Popen[str]:
        recipe = str(wait_for(folder / "recipe.toml", run))
        chosen = [part for setting in settings for part in ("-s", f"actor.{setting}")]
        ends = ("--learner", learner, "--redis", redis_url)
        return processes(
            "-m", "actor", recipe, "--name", name, *ends, *chosen, stderr=subprocess.PIPE
        )

    doomed = actor("doomed", "engine_restarts=1", "scripted.dies_after_tokens=1")
    words = doomed.communicate(timeout=300)[1]
    assert doomed.returncode == 1, words
    last = words.strip().splitlines()[-1]
    assert "its restarts within an hour (1) are spent" in last
    assert "as it was told to" in last
    assert "Traceback" not in words
    sound = actor("sound")
    assert runs.end(run) == 0, runs.said(folder)[-2000:]
    sound.communicate(timeout=60)
    assert runs.summary(folder)["steps"] == 4
    assert runs.promises_kept(folder)


def wait_for(path: Path, run: subprocess.Popen[bytes]) -> Path:
    """Until the run has written `path`."""
    while not path.exists():
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(0.05)
    return path
