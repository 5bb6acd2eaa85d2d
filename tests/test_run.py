"""`isentrope run` as a person starts it: validated first, watched, drained, resumed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from common import metrics, status
from tests.conftest import Start

pytestmark = pytest.mark.timeout(400)  # starts of torch, on a machine that may be busy

ISENTROPE = str(Path(sys.executable).parent / "isentrope")
KEYS = {
    *("steps", "seconds", "heldout_before", "heldout_after", "length_before", "length_after"),
    *("entropy_first", "entropy_last", "groups", "conserved", "lag_mean", "lag_max", "max_lag"),
    *("learner_idle", "actor_idle", "tokens_trained_per_s"),
}
SMALL = ("-s", "learner.steps=4", "-s", "learner.eval.problems=8", "-s", "actor.count=1")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ISENTROPE, "run", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_a_run_ends_with_one_json_line_and_pictures(tmp_path: Path) -> None:
    held = ("-s", 'learner.methods=[{type="adaptive_entropy", target=0.3}]')
    done = run("scripted", "--out", str(tmp_path / "run"), "--json", *SMALL, *held)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    summary = json.loads(done.stdout)
    assert set(summary) >= KEYS
    assert summary["steps"] == 4
    assert summary["conserved"] is True
    assert summary["lag_max"] <= summary["max_lag"]
    assert all(Path(plot).stat().st_size > 10_000 for plot in summary["plots"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    last = status.read(tmp_path / "run")
    assert last is not None
    assert (last.phase, last.entropy_target) == ("done", 0.3)
    for line in ("held-out before", "step 4/4", "held-out after", "conserved"):
        assert line in done.stderr
    lines = [line for line in metrics.read(tmp_path / "run") if "step_s" in line]
    assert all(0 < line["publish_s"] < line["step_s"] for line in lines)
    assert ["checkpoint_s" in line for line in lines] == [False, False, False, True]


def test_ctrl_c_takes_a_checkpoint_and_resume_finishes(tmp_path: Path, processes: Start) -> None:
    folder = tmp_path / "run"
    process = processes(
        *(ISENTROPE, "run", "scripted", "--out", str(folder), "--no-plots", *SMALL),
        *("-s", "learner.steps=1000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _until(process.stdout, "step ")
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=200)[0]
    assert process.returncode == 128 + signal.SIGINT
    assert f"isentrope run --resume {folder}" in rest
    last = status.read(folder)
    assert last is not None
    assert last.phase == "stopped"
    stopped_at = json.loads((folder / "summary.json").read_text())["steps"]
    more = ("-s", f"learner.steps={stopped_at + 2}")
    done = run("--resume", str(folder), "--no-plots", "--json", *more)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == stopped_at + 2
    assert summary["conserved"] is True
    assert summary["plots"] == []


def test_a_run_that_is_killed_leaves_no_process(tmp_path: Path, processes: Start) -> None:
    folder = tmp_path / "run"
    process = processes(
        *(ISENTROPE, "run", "scripted", "--out", str(folder), "-s", "learner.steps=1000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _until(process.stdout, "step ")
    family = _descendants(process.pid)
    assert len(family) >= 4  # Redis, a learner, two actors, and what grades for them
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(_runs, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in family if _runs(pid)]


def test_a_port_in_use_is_one_line_and_ends_the_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = run("scripted", "--out", str(tmp_path / "run"), "-s", f"run.learner={address}")
    assert done.returncode == 2
    assert address in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_holds_a_run_is_not_started_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    done = run("scripted", "--out", str(tmp_path))
    assert done.returncode == 2
    assert f"--resume {tmp_path}" in done.stderr


def test_a_missing_file_of_prompts_ends_the_run_with_its_name(tmp_path: Path) -> None:
    settings = ("-s", "learner.prompts.source=jsonl", "-s", "learner.prompts.path=/nowhere.jsonl")
    done = run("scripted", "--out", str(tmp_path / "run"), *settings)
    assert done.returncode == 2
    assert "/nowhere.jsonl" in done.stderr


def test_neither_a_recipe_nor_a_run_to_resume_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert "give a RECIPE, or --resume RUN" in done.stderr


def test_a_recipe_beside_a_run_to_resume_is_refused_not_ignored(tmp_path: Path) -> None:
    done = run("tiny", "--resume", str(tmp_path))
    assert done.returncode == 2
    assert "RECIPE and --resume exclude each other" in done.stderr


def _until(stream: IO[str] | None, beginning: str) -> None:
    """Read lines until one begins so; the test's own deadline ends a wait in vain."""
    assert stream is not None
    seen = []
    for line in stream:
        seen.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line began with {beginning!r}: {''.join(seen)}")


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [n for child in map(int, children) for n in (child, *_descendants(child))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_whose_answers_are_never_right_is_stuck_not_solved(tmp_path: Path) -> None:
    wrong = ("-s", "learner.prompts.grader=exact")
    wrong += ("-s", 'learner.prompts.grader_options={after="@"}')  # nobody writes one
    folder = tmp_path / "run"
    done = run("scripted", "--out", str(folder), "--plain", "--no-plots", *wrong, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "teaches nothing" in done.stdout + done.stderr
    assert json.loads((folder / "summary.json").read_text())["ending"] == "stuck"
    assert "0 % of their answers are right" in (folder / "logs" / "learner.log").read_text()
