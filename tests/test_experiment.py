"""`scripts/experiment`: a grid of real runs that is skipped, resumed, and survives its failures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import grid, grid_table
from common.errors import ConfigError
from tests.conftest import Start
from tests.test_compare import a_run

TOP = Path(__file__).resolve().parent.parent
GRIDS = TOP / "scripts" / "grids"
SMOKE = (GRIDS / "smoke.toml").read_text()
EXPERIMENT = [sys.executable, str(TOP / "scripts" / "experiment")]
BAD = """
[[cell]]
name = "bad"
set = { "run.model" = "/nowhere" }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def cells(text: str, folder: Path, *only: str) -> list[grid.Cell]:
    return grid.cells(grid.read(write(folder, text)), folder / "out", only)


def experiment(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EXPERIMENT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


# -- the grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_grid_resolves_to_recipes(path: Path, tmp_path: Path) -> None:
    found = grid.cells(grid.read(path), tmp_path)
    assert len({cell.folder for cell in found}) == len(found)
    assert len({cell.frozen for cell in found}) == len(found), "two cells are the same run"


def test_one_seed_of_every_cell_comes_before_the_second_of_any(tmp_path: Path) -> None:
    text = 'seeds = [0, 1]\n[[cell]]\nname = "a"\n[[cell]]\nname = "b"\nseeds = [5]\n'
    found = [(cell.name, cell.seed) for cell in cells(text, tmp_path)]
    assert found == [("a", 0), ("b", 5), ("a", 1)]


def test_a_cell_s_value_wins_over_the_grid_s(tmp_path: Path) -> None:
    text = '[set]\n"learner.lr" = 1e-3\n[[cell]]\nname = "a"\nset = { "learner.lr" = 2e-3 }\n'
    assert "lr = 0.002\n" in cells(text, tmp_path)[0].frozen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[cell]]\nname = "a"\nsead = 1\n', "cell[0].sead: unknown; did you mean"),
        ('[[cell]]\nname = "a"\nset = { "learner.lrr" = 1 }\n', "cell a: -s learner.lrr=1: "),
        (
            '[[cell]]\nname = "a"\nrecipe = "tinny"\n',
            "cell a: no recipe 'tinny'; did you mean tiny",
        ),
        ('[[cell]]\nname = "a"\n[[cell]]\nname = "a"\n', "a: one name, two cells"),
        ('[[cell]]\nname = "a/b"\n', "cell[0].name"),
        ("recipe = 'tiny'\n", "cell"),
        ("[[cell", "not a TOML file"),
    ],
)
def test_a_mistake_is_told_before_the_first_cell_starts(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        cells(text, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_cell_and_a_missing_grid_are_one_line(tmp_path: Path) -> None:
    done = experiment(GRIDS / "smoke.toml", "--only", "gropo", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no cell gropo; there is: grpo, steer" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert "No such file" in experiment(tmp_path / "none.toml").stderr


def test_a_run_of_another_recipe_is_neither_taken_nor_written_over(tmp_path: Path) -> None:
    (cell,) = cells(SMOKE, tmp_path, "grpo")
    assert grid.state(cell) == "new"
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.toml").write_text(cell.frozen)
    assert grid.state(cell) == "interrupted"
    (cell.folder / "summary.json").write_text('{"ending": "done", "conserved": true}')
    assert grid.state(cell) == "done"
    (cell.folder / "summary.json").write_text('{"ending": "stopped", "conserved": true}')
    assert grid.state(cell) == "interrupted"
    (cell.folder / "recipe.toml").write_text(cell.frozen.replace("lr = ", "lr = 1"))
    with pytest.raises(ConfigError, match="another recipe"):
        grid.state(cell)


# -- the table ------------------------------------------------------------------------------------


def test_the_table_is_of_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    config = grid.read(write(tmp_path, SMOKE))
    found = grid.cells(config, tmp_path / "out")
    point = {"standard_error": 0.02, "pass_any": 0.95, "rollouts": 512}
    done = [cell for cell in found if cell.name == "steer"]
    for cell, accuracy in zip(done, (0.9, 0.8), strict=True):
        ended = {"evaluations": {"after": {"accuracy": accuracy, **point}}}
        a_run(cell.folder, summary=ended)
    table = grid_table.rows(config, found, done)
    lines = grid_table.markdown("mine", config, table, {"bad seed 0": "why"}).splitlines()
    (steer,) = [line for line in lines if line.startswith("| steer")]
    assert "| 2 of 2 | 0.850 ± 0.071 | 0.950 ± 0.000 | 0.200 ± 0.000 |" in steer
    (empty,) = [line for line in lines if line.startswith("| grpo")]
    assert "| 0 of 1 | – | – |" in empty
    assert lines[-1] == "* bad seed 0: why"
    tree = grid_table.tree("mine", config, table, {})
    assert tree["left"] == 1
    assert tree["cells"][1]["sd"]["accuracy"] == pytest.approx(0.0707, abs=1e-4)
    assert json.loads(json.dumps(tree)) == tree


# -- real runs ------------------------------------------------------------------------------------


@pytest.mark.timeout(480)  # three real runs, on a machine that may be busy
def test_a_failed_cell_is_named_and_a_finished_one_is_skipped(tmp_path: Path) -> None:
    chosen = (write(tmp_path, SMOKE + BAD), "--out", tmp_path / "out")
    only = ("--only", "grpo", "--only", "bad")
    first = experiment(*chosen, *only, "--json")
    assert first.returncode == 1, first.stderr
    assert "bad seed 0: FAILED: exit code 2" in first.stderr
    assert "no model at '/nowhere'" in first.stderr
    table = json.loads(first.stdout.splitlines()[-1])
    assert list(table["failed"]) == ["bad seed 0"]
    assert [cell["name"] for cell in table["cells"]] == ["grpo", "steer", "bad"]
    grpo = table["cells"][0]
    assert grpo["mean"]["accuracy"] is not None
    assert 0 <= grpo["mean"]["pass_any"] <= 1
    assert table == json.loads((tmp_path / "out" / "table.json").read_text()) | {"at": table["at"]}
    for picture in ("overview.png", "curves.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    began = (tmp_path / "out" / "grpo-s0" / "summary.json").stat().st_mtime
    again = experiment(*chosen, "--only", "grpo")
    assert again.returncode == 0, again.stderr
    assert "grpo seed 0: done before" in again.stderr
    assert (tmp_path / "out" / "grpo-s0" / "summary.json").stat().st_mtime == began


@pytest.mark.timeout(480)
def test_ctrl_c_stops_in_good_order_and_the_same_command_goes_on(
    tmp_path: Path, processes: Start
) -> None:
    text = SMOKE.replace('"learner.steps" = 3', '"learner.steps" = 25')
    chosen = [str(write(tmp_path, text)), "--out", str(tmp_path / "out"), "--only", "grpo"]
    process = processes(*EXPERIMENT, *chosen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = tmp_path / "out" / "grpo-s0"
    await_file(folder, process)
    second = experiment(*chosen)
    assert second.returncode == 2
    assert "another experiment is at work here" in second.stderr
    await_file(folder / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 130, said
    assert "the same command goes on from here" in said
    stopped_at = json.loads((folder / "summary.json").read_text())["steps"]
    assert stopped_at < 25
    done = experiment(*chosen)
    assert done.returncode == 0, done.stderr
    assert "grpo seed 0: going on" in done.stderr
    assert json.loads((folder / "summary.json").read_text())["steps"] == 25
    assert (folder / "incarnation").read_text() == "2"

    process = processes(*EXPERIMENT, *chosen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert "done before" in process.stdout.readline()
    process.send_signal(signal.SIGINT)  # within the table and the pictures
    said = process.communicate(timeout=150)[0]
    assert (process.returncode, "Traceback" in said) == (130, False), said


def await_file(path: Path, writer: subprocess.Popen[str]) -> None:
    while not path.exists():  # the test's own deadline ends a wait in vain
        assert writer.poll() is None, writer.communicate()[0]
        time.sleep(0.05)
