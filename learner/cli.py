"""`isentrope learner`, `isentrope replay`. Nothing heavy is imported before the recipe is known to
be good.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from common.options import (
    existing_run,
    json_option,
    overrides_option,
    recipe_argument,
    run_folder_argument,
)

if TYPE_CHECKING:
    from common.config import RunConfig
    from common.runfolder import RunFolder
    from learner.config import LearnerConfig
    from learner.step import StepReport


@click.command()
@recipe_argument
@click.option(
    "--run-folder", type=click.Path(path_type=Path), required=True, help="Where this run lives."
)
@click.option("--resume", is_flag=True, help="Go on with the run that is in the folder.")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Processes of this learner on this machine; learner.ranks.count if not given.",
)
@overrides_option
def learner(
    recipe: str, run_folder: Path, resume: bool, ranks: int | None, overrides: tuple[str, ...]
) -> None:
    """Train on what actors send; publish every new version."""
    from common import log
    from common.errors import JournalError
    from common.failpoints import Failpoint
    from common.runfolder import RunFolder

    run, config = _sections(recipe, overrides)
    count = ranks or (config.ranks.count if config.ranks else 1)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(_launch(count, recipe, run_folder, resume, overrides))
    rank, restarts = _torchrun()
    log.setup(f"learner-{rank}" if rank else "learner")
    if rank:
        return _follow(run, config)
    if restarts:
        failpoint = Failpoint.parse(run.failpoint, restarts)  # each kills once
        run = msgspec.structs.replace(run, failpoint=str(failpoint))
    exists = (run_folder / "run.json").exists()
    folder = RunFolder.open(run_folder) if exists else RunFolder.create(run_folder)
    if any(folder.journal.iterdir()) and not (resume or restarts):
        raise JournalError(
            f"{run_folder} already holds a journal; go on with --resume, or choose another folder"
        )
    if not folder.recipe.exists():
        from common.recipe import freeze

        folder.recipe.write_text(freeze(recipe, overrides))
    from common.imports import lasting

    with lasting():
        from learner.loop import learn
        from learner.ranks import session
        from learner.wiring import check_same_run

    check_same_run(folder, run)
    with session(config) as comm:
        ended = learn(run, config, folder, comm)
    click.echo(ended)


def _launch(
    count: int, recipe: str, run_folder: Path, resume: bool, overrides: tuple[str, ...]
) -> int:
    """This command again, as each of `count` ranks; its exit code. `-P`: see common/run.py."""
    from learner.launch import launch

    command = [sys.executable, "-P", "-m", "learner", recipe, "--run-folder", str(run_folder)]
    command += ["--resume"] if resume else []
    return launch(count, [*command, *(part for one in overrides for part in ("-s", one))])


def _torchrun() -> tuple[int, int]:
    """This process' rank, and how often torchrun started the ranks again (`--max-restarts`)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 0
    return int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _follow(run: RunConfig, config: LearnerConfig) -> None:
    """One of the other ranks."""
    from learner.ranks import follow, session

    with session(config) as comm:
        follow(run, config, comm)


@click.command()
@run_folder_argument
@overrides_option
@click.option(
    "--least-ess",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="With overrides: stop when the effective sample size falls below this share of tokens.",
)
@click.option(
    "--compare",
    metavar="RECIPE,RECIPE,…",
    default="",
    help="From every checkpoint one step with the methods and the loss of each of these recipes, "
    "on the recorded data: predicted and realised entropy change, change of the surrogate.",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    help="With --compare: steps between comparisons; those between the run's checkpoints if not "
    "given.",
)
@json_option
def replay(
    run_folder: Path,
    overrides: tuple[str, ...],
    least_ess: float,
    compare: str,
    every: int | None,
    as_json: bool,
) -> None:
    """Train again from a run's journal: to the same bits, or with other settings on the same
    data.
    """
    from common.errors import ConfigError
    from common.runfolder import RunFolder

    folder = RunFolder.open(existing_run(run_folder))
    run, config = _sections(str(folder.recipe), overrides)
    if compare:
        if overrides:
            raise ConfigError("--compare: the run is walked as it was recorded; leave -s out")
        rivals = {name: _sections(name, ())[1] for name in compare.split(",")}
        _compare(folder, run, config, rivals, every or config.checkpoint_every, as_json)
        return
    from learner.replay import replay as again

    def show(t: int, report: StepReport, same: bool) -> None:
        facts = "  ".join(
            f"{name} {report.metrics[name]:.4f}" for name in ("reward", "entropy", "ess_share")
        )
        word = "recomputed" if overrides else "bit-equal" if same else "approximate"
        click.echo(f"step {t + 1:5d}  {facts}  {word}", err=as_json)

    done = again(folder, run, config, override=bool(overrides), least_ess=least_ess, show=show)
    if as_json:
        click.echo(json.dumps(done._asdict()))
        return
    click.echo(
        f"{done.steps} steps, {done.equal} bit-equal to the record; parameters {done.digest}"
    )
    if done.stopped:
        click.echo(f"stopped: {done.stopped}")


def _compare(
    folder: RunFolder,
    run: RunConfig,
    config: LearnerConfig,
    rivals: dict[str, LearnerConfig],
    every: int,
    as_json: bool,
) -> None:
    from learner.first_order import compare, row, summary

    def show(line: str) -> None:
        click.echo(line, err=as_json)

    show(row())
    points = compare(folder, run, config, rivals, every, show=lambda point: show(row(point)))
    means = summary(points)
    if as_json:
        facts = {"points": [p._asdict() for p in points], "summary": means}
        click.echo(json.dumps(facts))
        return
    click.echo("")
    for name, numbers in means.items():
        facts_line = "  ".join(f"{key} {value:+.3e}" for key, value in numbers.items())
        click.echo(f"{name:18} {facts_line}")


def _sections(recipe: str, overrides: tuple[str, ...]) -> tuple[RunConfig, LearnerConfig]:
    from common.config import RunConfig
    from common.recipe import load
    from learner.config import LearnerConfig

    sections = load(recipe, {"run": RunConfig, "learner": LearnerConfig}, overrides)
    run, config = sections["run"], sections["learner"]
    assert isinstance(run, RunConfig)
    assert isinstance(config, LearnerConfig)
    return run, config
