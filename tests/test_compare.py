"""Runs side by side: facts, names, one table, one picture, and what is missing said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common import compare
from common.compare_cli import compare as command
from common.errors import ConfigError, DataError
from common.metrics import Metrics


def a_run(
    folder: Path,
    learner: str = "",
    seed: int = 0,
    steps: int = 8,
    summary: dict[str, Any] | None = None,
    entropy: float = 0.2,
) -> Path:
    """A run whose entropy falls to `entropy` in its first half and stays."""
    folder.mkdir(parents=True)
    recipe = f"[run]\nseed = {seed}\n[learner]\ngroup_size = 4\n{learner}\n[learner.eval]\n"
    (folder / "recipe.toml").write_text(recipe + "problems = 64\nsamples = 8\n")
    sink = Metrics(folder)
    sink.write(0, {"heldout": 0.4})
    for step in range(1, steps + 1):
        now = entropy if step > steps // 2 else 0.5
        sink.write(step, {"reward": 0.5, "correct": 0.5, "entropy": now, **COMMON, "seconds": step})
    sink.close()
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(ENDED | summary))
    return folder


COMMON = {"tokens": 100, "groups": 2, "dropped": {"zero_variance": 3}, "length": 10, "lag_mean": 1}


def point(accuracy: float, error: float = 0.02) -> dict[str, Any]:
    return {"accuracy": accuracy, "standard_error": error, "pass_any": 0.95, "rollouts": 512}


ENDED = {"ending": "done", "evaluations": {"before": point(0.4), "after": point(0.9)}}


def facts(folder: Path) -> compare.Facts:
    return compare.facts(compare.read(folder), "it")


def names(*folders: Path) -> list[str]:
    return compare.labels([compare.read(folder) for folder in folders])


def compared(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_a_run_is_told_in_numbers(tmp_path: Path) -> None:
    found = facts(a_run(tmp_path / "run", summary={}))
    assert found.before is not None
    assert found.after is not None
    assert (found.before.value, found.after.value, found.after.pass_any) == (0.4, 0.9, 0.95)
    assert (found.entropy_first, found.entropy_last, found.entropy_late) == (0.5, 0.2, 0.2)
    assert found.nats_per_accuracy == pytest.approx(0.3 / 0.5)
    assert (found.steps, found.tokens, found.seconds, found.lag) == (8, 800, 8, 1)
    assert found.sampled == 8 * 5 * 4 * 10  # every group that was looked at, trained on or not
    assert found.target is None


def test_the_interval_is_that_of_the_error_and_never_leaves_0_to_1(tmp_path: Path) -> None:
    after = facts(a_run(tmp_path / "run", summary={})).after
    assert after is not None
    assert after.high - after.low == pytest.approx(2 * 1.96 * 0.02, rel=0.02)
    low, high = compare.interval(1.0, 512)
    assert 0.99 < low < high <= 1.0


def test_tracking_is_the_relative_distance_from_the_target_in_the_last_half(
    tmp_path: Path,
) -> None:
    methods = 'methods = [{type = "aepo", target = 0.25}]'
    found = facts(a_run(tmp_path / "run", methods, summary={}))
    assert found.target == 0.25
    assert found.tracking == pytest.approx(0.2)


def test_a_target_in_another_unit_is_known_from_the_metrics_only(tmp_path: Path) -> None:
    methods = 'methods = [{type = "isentropic", target = 0.5, unit = "start", preset = "none"}]'
    folder = a_run(tmp_path / "run", methods)
    assert facts(folder).target is None
    sink = Metrics(folder)
    for step in range(1, 9):
        line = {
            "reward": 0.5,
            "entropy": 0.2,
            "methods/isentropic/target": 0.1 if step < 7 else 0.2,
        }
        sink.write(step, line)
    sink.close()
    assert facts(folder).target == 0.2
    assert facts(folder).tracking == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_no_accuracy_gained_has_no_price(tmp_path: Path) -> None:
    worse = {"evaluations": {"before": point(0.4), "after": point(0.3)}}
    assert facts(a_run(tmp_path / "run", summary=worse)).nats_per_accuracy is None


def test_runs_are_named_by_what_differs_between_their_recipes(tmp_path: Path) -> None:
    grpo = a_run(tmp_path / "a", "lr = 3e-4\nmethods = []")
    steer = a_run(tmp_path / "b", 'lr = 3e-4\nmethods = [{type = "steer", form = "theorem"}]')
    assert names(grpo, steer) == ["grpo", "steer"]
    fast = a_run(tmp_path / "c", "lr = 1e-3\nmethods = []")
    assert names(grpo, fast) == ["lr 0.0003", "lr 0.001"]
    released = a_run(tmp_path / "d", 'lr = 3e-4\nmethods = [{type = "steer", form = "released"}]')
    assert names(grpo, steer, released) == ["grpo", "steer, form theorem", "steer, form released"]


def test_how_a_run_was_looked_at_names_it_only_where_nothing_else_does(tmp_path: Path) -> None:
    often = a_run(tmp_path / "often", "realised_every = 1\nmethods = []")
    seldom = a_run(tmp_path / "seldom", "realised_every = 9\nmethods = []")
    steer = a_run(tmp_path / "steer", 'realised_every = 9\nmethods = [{type = "steer"}]')
    assert names(often, steer) == ["grpo", "steer"]
    assert names(often, seldom) == ["realised_every 1", "realised_every 9"]


def test_runs_of_one_recipe_are_named_by_seed_or_folder(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / f"r{seed}", seed=seed) for seed in (0, 1)]
    assert names(*runs) == ["seed 0", "seed 1"]
    again = a_run(tmp_path / "again")
    assert names(runs[0], again) == ["r0", "again"]
    assert names(*runs, again) == ["seed 0 (r0)", "seed 1", "seed 0 (again)"]


def test_the_command_gives_a_table_and_a_picture(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "a", summary={}), a_run(tmp_path / "b", seed=1, summary={})]
    done = CliRunner().invoke(command, [*map(str, runs)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for word in ("seed 0", "0.900 (0.8", "@8 0.950", "0.500 → 0.200", "0.60", "picture"):
        assert word in done.output
    picture = runs[0] / "plots" / "compare.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_a_narrow_terminal_reads_the_same_as_blocks(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, [str(a_run(tmp_path / "a"))], env={"COLUMNS": "80"})
    assert max(map(len, done.output.replace(str(tmp_path), "").splitlines())) <= 100
    assert "  entropy          0.500 → 0.200" in done.output


def test_what_is_missing_or_unlike_is_one_line_each(tmp_path: Path) -> None:
    whole = a_run(tmp_path / "whole", summary={})
    crashed = a_run(tmp_path / "crashed", seed=1, steps=5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.toml").write_text("[run]\nseed = 2\n")
    found = compared(whole, crashed, tmp_path / "empty")
    assert [row["label"] for row in found["runs"]] == ["seed 0", "seed 1"]
    left_out, killed, unlike = found["notes"]
    assert left_out.startswith(f"left out: {tmp_path / 'empty'}: no finished step")
    assert killed.startswith("seed 1: no summary")
    assert unlike == "runs of 5, 8 steps: their ends are not alike"
    assert found["runs"][1]["before"]["value"] == 0.4
    assert found["runs"][1]["after"] is None


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        command.main([str(tmp_path / "nowhere")], standalone_mode=False)
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(DataError, match="no finished step"):
        command.main([str(tmp_path)], standalone_mode=False)


def test_a_damaged_summary_leaves_its_run_out_with_its_name(tmp_path: Path) -> None:
    damaged = a_run(tmp_path / "damaged")
    (damaged / "summary.json").write_text('{"steps": ')
    found = compared(a_run(tmp_path / "whole", summary={}), damaged)
    assert len(found["runs"]) == 1
    assert f"{damaged / 'summary.json'} is damaged" in found["notes"][0]
