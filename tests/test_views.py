"""What people see: the live picture, plain lines, `status`, the PNGs, the summary."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from common import figures, live, metrics, status, summary
from common.metrics import Metrics
from common.runfolder import RunFolder
from common.status import ActorStatus, Heldout, Status, StatusFile
from common.status_cli import is_over
from common.status_cli import status as isentrope_status
from common.versions import Registry

STEPS = 12


def a_status(step: int = STEPS) -> Status:
    return Status(
        run="r1",
        at=time.time(),
        phase="training",
        step=step,
        steps=60,
        version=step,
        seconds=25.0,
        eta_s=100.0,
        reward=0.61,
        length=17.2,
        entropy=0.21,
        heldout=[Heldout(step=0, accuracy=0.452, length=12.1, done=512, of=512, label="before")],
        lags={0: 180, 1: 60, 2: 10},
        max_lag=2,
        groups={
            "main": {"issued": 1234, "trained": 900, "zero_variance": 300, "in_flight": 34},
            "eval": {"issued": 512, "evaluated": 512},
        },
        learner_idle=0.3,
        tokens_per_s=3210.0,
        actors={
            "actor-0": ActorStatus(version=step, tokens_per_s=2200, busy=0.9, held=9, capacity=9),
            "actor-1": ActorStatus(version=step - 1, silent_s=7.0),
        },
    )


def a_run(folder: Path) -> Path:
    """A run folder in which twelve steps happened."""
    (folder / "recipe.toml").write_text("[run]\n")
    sink = Metrics(folder)
    sink.write(0, {"heldout": 0.45, "heldout_length": 12.0})
    for step in range(1, STEPS + 1):
        sink.write(
            step,
            {
                "reward": 0.4 + 0.03 * step,
                "entropy": 0.4 / step,
                "length": 10.0 + step,
                "lag": {"0": 200, "1": 50},
                "groups": 32,
                "dropped": {"zero_variance": step},
                "tokens_per_s": 3000.0,
                "sampled_tokens_per_s": 4000.0,
                "learner_idle": 0.3,
                "actor_idle": 0.1,
                "entropy_predicted": -0.01,
                "entropy_realised": -0.012 if step % 10 == 0 else None,
            },
        )
    sink.close()
    StatusFile(folder).write(a_status(), force=True)
    return folder


def shown(now: Status | None, folder: Path, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(live.render(now, metrics.read(folder), ["a note"], width, "tiny"))
    return captured.get()


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_picture_says_it_all_within_the_width(tmp_path: Path, width: int) -> None:
    text = shown(a_status(), a_run(tmp_path), width)
    for word in (
        *("12/60 steps", "1:40 to go", "reward", "0.610", "entropy", "0.210", "held-out", "0.452"),
        *("lag 2", "learner idle", "30 %", "3,210 tokens/s", "1,234 issued = 900 trained"),
        *("300 zero variance", "✓ conserved", "actor-0", "2,200", "silent 7 s", "a note"),
    ):
        assert word in text, word
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_the_entropy_stands_beside_its_target(width: int) -> None:
    now, lines = a_status(), [{"step": step, "entropy": 0.31} for step in range(300)]
    now.entropy_target = 0.297
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(live.render(now, lines, (), width))
    (row,) = (row for row in captured.get().splitlines() if row.startswith("entropy"))
    assert row.rstrip().endswith("0.31 → 0.31, target 0.297")


def test_the_picture_before_the_first_word_of_the_learner_says_that_it_starts(
    tmp_path: Path,
) -> None:
    assert "start" in shown(None, tmp_path, 80)


@pytest.mark.parametrize("height", [24, 30, 60])
def test_many_actors_take_the_lines_that_are_left_and_those_in_trouble_come_first(
    tmp_path: Path, height: int
) -> None:
    now = a_status()
    now.actors = {f"actor-{n:02d}": ActorStatus(window=1, ceiling=9) for n in range(30)}
    now.actors["actor-29"].silent_s = 40.0
    now.warnings = ["the disk is full: " + "no checkpoint is written until there is room " * 3]
    console = Console(width=80, height=height, force_terminal=False)
    with console.capture() as captured:
        console.print(live.render(now, metrics.read(a_run(tmp_path)), ["a note"], 80, "t", height))
    text = captured.get()
    assert len(text.splitlines()) <= height
    for word in ("actor-29", "silent 40 s", "more remarks", "! the disk is full", "· a note"):
        assert word in text, word
    hidden = 30 - len(table_of(text))
    assert (f"… and {hidden} more actors" in text) == (hidden > 0) == (height < 60)


def table_of(text: str) -> list[str]:
    """The lines of the actors' table."""
    return [line for line in text.splitlines() if line.startswith("actor-")]


def test_without_actors_nobody_is_said_to_be_busy(tmp_path: Path) -> None:
    now = a_status()
    now.actors = {}
    (row,) = (row for row in shown(now, tmp_path, 80).splitlines() if "actors idle" in row)
    assert row.split("actors idle")[1].strip() == "–"


def test_a_broken_sum_and_warnings_stand_out(tmp_path: Path) -> None:
    now = a_status()
    now.conserved = False
    now.warnings = ["the disk is full"]
    text = shown(now, tmp_path, 80)
    assert "NOT CONSERVED" in text
    assert "! the disk is full" in text


def a_troubled_status() -> Status:
    now = a_status()
    now.actors = {
        "actor-0": ActorStatus(up=False, trouble="worker 3 was killed"),
        "actor-1": ActorStatus(
            window=5,
            ceiling=10,
            window_why="smaller: 12 sequences lost their place",
            refused=2,
            refusal="version 7 refused: blob 7-ab-0 is missing; serving 6",
        ),
    }
    return now


def test_the_picture_says_what_ails_an_actor(tmp_path: Path) -> None:
    text = shown(a_troubled_status(), tmp_path, 120)
    for words in (
        "! actor-0: its engine broke and is made again: worker 3 was killed",
        "no engine",
        "! actor-1: version 7 refused: blob 7-ab-0 is missing; serving 6 (2 refused so far)",
        "actor-1 takes 5 of 10 tickets, smaller: 12 sequences lost their place",
    ):
        assert words in text, words


def test_a_heartbeat_becomes_the_status_of_an_actor_whatever_it_lacks() -> None:
    assert ActorStatus.of(-1, 4, {}, {}) == ActorStatus(capacity=4, window=4, ceiling=4)
    stats = {"up": 1.0, "restarts": 2.0, "window": 3.0, "ceiling": 9.0, "held": 7.0}
    found = ActorStatus.of(5, 3, stats, {"trouble": "it hung", "window": "smaller: so"}, held=6)
    assert (found.version, found.held, found.window, found.ceiling) == (5, 6, 3, 9)
    assert found.remarks() == ["engine restarted 2 × (the last one: it hung)"]


def test_a_plain_view_says_once_what_ails_an_actor(tmp_path: Path) -> None:
    StatusFile(tmp_path).write(a_troubled_status(), force=True)
    console = Console(force_terminal=False, width=80)
    with console.capture() as captured:
        view = live.PlainView(tmp_path, console)
        view.refresh()
        view.refresh()
    assert captured.get().count("note: actor-0: its engine broke") == 1
    assert captured.get().count("note: actor-1: version 7 refused") == 1


def test_plain_lines_are_one_a_step_and_never_twice(tmp_path: Path) -> None:
    console = Console(force_terminal=False, width=80)
    with console.capture() as captured:
        view = live.open_view(tmp_path, console, plain=False)
        a_run(tmp_path)
        view.refresh()
        view.refresh()
        view.close()
    lines = captured.get().splitlines()
    assert len([line for line in lines if line.startswith("step ")]) == STEPS
    assert len([line for line in lines if "held-out before: 0.452" in line]) == 1


def test_a_resumed_run_does_not_say_again_what_it_said(tmp_path: Path) -> None:
    a_run(tmp_path)
    console = Console(force_terminal=False, width=80)
    with console.capture() as captured:
        view = live.open_view(tmp_path, console, plain=False)
        view.refresh()
        view.close()
    assert not [line for line in captured.get().splitlines() if line.startswith(("step ", "held"))]


def test_a_run_that_was_stopped_and_is_resumed_is_not_said_to_stop(tmp_path: Path) -> None:
    before = msgspec.structs.replace(a_status(2), phase="stopped")
    StatusFile(tmp_path).write(before, force=True)
    console = Console(force_terminal=False, width=80)
    with console.capture() as captured:
        view = live.PlainView(tmp_path, console)
        view.refresh()
        for phase in ("waiting", "stopped"):
            now = msgspec.structs.replace(before, phase=phase)
            StatusFile(tmp_path).write(now, force=True)
            view.refresh()
    assert captured.get().split() == ["stopped"], "the second time alone"


def test_a_learner_lives_until_its_run_has_ended_and_again_once_it_is_resumed(
    tmp_path: Path,
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    ended = msgspec.structs.replace(a_troubled_status(), phase="stopped", at=time.time())
    StatusFile(folder.path).write(ended, force=True)
    assert alive(folder.path) == 1
    folder.claim()  # a resumed learner, which has said nothing yet
    assert alive(folder.path) == 0
    StatusFile(folder.path).write(msgspec.structs.replace(ended, phase="training"), force=True)
    assert alive(folder.path) == 0
    folder.release()


def alive(folder: Path) -> int:
    return CliRunner().invoke(isentrope_status, [str(folder), "--alive", "learner"]).exit_code


def test_a_sparkline_shows_the_course_in_the_room_there_is() -> None:
    assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert len(live.sparkline(list(range(1000)), 20)) == 20
    assert live.sparkline([1.0, 1.0], 5) == "▁▁"
    assert live.sparkline([], 5) == ""


def test_a_status_is_replaced_atomically_and_not_more_often_than_needed(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    assert file.write(a_status(1))
    assert not file.write(a_status(2))
    assert file.write(a_status(3), force=True)
    found = status.read(tmp_path)
    assert found is not None
    assert found.step == 3
    assert [path.name for path in tmp_path.iterdir()] == [status.FILE]


def test_a_folder_that_takes_no_status_stops_nobody(tmp_path: Path) -> None:
    assert not StatusFile(tmp_path / "gone").write(a_status())


def test_a_status_of_another_program_is_no_status(tmp_path: Path) -> None:
    (tmp_path / status.FILE).write_text('{"step": "many"}')
    assert status.read(tmp_path) is None


def test_the_command_shows_a_run_from_its_folder(tmp_path: Path) -> None:
    done = isentrope("status", str(a_run(tmp_path)))
    assert "12/60 steps" in done.stdout
    assert status.decode(isentrope("status", str(tmp_path), "--json").stdout.encode()) is not None


def test_the_command_shows_a_run_over_redis(redis_url: str) -> None:
    nobody = isentrope("status", "--redis", redis_url)
    assert nobody.returncode == 2
    assert "expected one live run, found 0" in nobody.stderr
    registry = Registry(redis_url, "r1")
    registry.live("learner", status.encode(a_status()))
    registry.close()
    assert "12/60 steps" in isentrope("status", "--redis", redis_url).stdout


def test_plot_writes_pictures_that_are_not_empty(tmp_path: Path) -> None:
    done = isentrope("plot", str(a_run(tmp_path)))
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [path.stem for path in paths] == list(figures.PAGES)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_plot_of_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    done = isentrope("plot", str(tmp_path))
    assert done.returncode == 2
    assert "nothing to draw" in done.stderr


def test_a_run_that_was_stopped_is_over_and_not_called_done(tmp_path: Path) -> None:
    now = a_status()
    now.phase, now.at = "stopped", now.at - 99
    text = shown(now, tmp_path, 80)
    assert "stopped" in text
    assert "no word of the learner" not in text
    assert "to go" not in text
    rows = dict(summary.rows({"steps": 9, "heldout_before": 0.5, "heldout_after": None}))
    assert (rows["held-out"], rows["entropy"]) == ("0.500", "– nats per token")


def test_the_summary_says_what_rose_and_what_was_dropped() -> None:
    facts = {
        "steps": 60,
        "heldout_before": 0.452,
        "heldout_after": 0.914,
        "groups": {"issued": 100, "trained": 60, "dropped": {"zero_variance": 40, "stale": 0}},
        "conserved": True,
        "restarts": {"actor-0": 2, "redis": 0},
    }
    said = dict(summary.rows(facts))
    assert said["held-out"] == "0.452 → 0.914"
    assert said["dropped"] == "40 zero_variance"
    assert said["restarts"] == "actor-0 2"
    assert "audit" in dict(summary.rows({"run": "runs/x"}))["conserved"]


def isentrope(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'isentrope'; from common.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_finished_run_that_is_resumed_is_not_over(tmp_path: Path) -> None:
    now = a_status()
    now.phase = "done"
    assert is_over(now, tmp_path)
    (tmp_path / "lock").write_text(str(os.getpid()))  # … by this process
    assert not is_over(now, tmp_path)
    assert is_over(now, None)  # over Redis only the learner itself speaks
