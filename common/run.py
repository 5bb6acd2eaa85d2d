"""`isentrope run`: one command, one machine: a private Redis, a learner, actors, watched to the
end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from common.errors import ConfigError
from common.failpoints import Failpoint
from common.options import existing_run, json_option, overrides_option

if TYPE_CHECKING:
    from common.supervise import Supervisor, View


class Plan(NamedTuple):
    """What is to be started, known to be good."""

    folder: Path
    resume: bool
    actors: int
    redis: str  # "": a private one
    learner: str
    failpoint: str

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"


@click.command()
@click.argument("recipe", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default runs/NAME-TIME.")
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with this run."
)
@json_option
@click.option("--plain", is_flag=True, help="Plain lines instead of the live view.")
@click.option("--plots/--no-plots", default=True, help="Draw pictures at the end, or not.")
@overrides_option
def run(
    recipe: str | None,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
    plain: bool,
    plots: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train on this machine: Redis, a learner and actors, watched live.

    RECIPE is a TOML file or the name of a shipped recipe. With --resume the run's own recipe is
    used, as it was then; -s changes it from here on.
    """
    plan = prepare(recipe, out, resume, overrides)

    summary, signal_number = carry_out(plan, plain, to_stderr=as_json, plots=plots)
    if as_json:
        click.echo(json.dumps(summary))
    if signal_number:
        click.echo(f"stopped; go on with: isentrope run --resume {plan.folder}", err=True)
        sys.exit(128 + signal_number)


def carry_out(
    plan: Plan, plain: bool, to_stderr: bool = False, plots: bool = True
) -> tuple[dict[str, Any], int]:
    """Supervise the run to its end, shown as it goes; its summary, and the signal that stopped it
    (0: none).
    """
    from rich.console import Console

    from common.live import open_view
    from common.summary import complete, show

    console = Console(stderr=to_stderr)
    view = open_view(plan.folder, console, plain)
    view.note(f"run folder {plan.folder}")
    supervisor = _supervisor(plan, view)
    began = time.monotonic()
    try:
        supervisor.run()
    finally:
        view.close()
    wall_s = time.monotonic() - began
    facts = {"restarts": supervisor.restarts(), "wall_s": round(wall_s, 2)}
    summary = complete(plan.folder, facts, plots)
    show(summary, console)
    return summary, supervisor.stopped_by or 0


# -- before anything starts -------------------------------------------------------------------


def prepare(
    recipe: str | None, out: Path | None, resume: Path | None, overrides: Sequence[str]
) -> Plan:
    """Check all there is to check without torch, then make the run folder. Raises ConfigError, and
    JournalError where a learner is at work.
    """
    from common import models
    from common.config import RunConfig
    from common.recipe import dump, load_all, read
    from common.runfolder import RunFolder

    if recipe is None and resume is None:
        raise click.UsageError("give a RECIPE, or --resume RUN")
    if recipe is not None and resume is not None:
        raise click.UsageError(
            f"RECIPE and --resume exclude each other: a run keeps its own, {resume}/recipe.toml; "
            "change it by -s"
        )
    if resume is not None and out is not None:
        raise click.UsageError("--out and --resume exclude each other: a run stays in its folder")
    source = str(existing_run(resume) / "recipe.toml") if resume else str(recipe)
    given = read(source, overrides)
    if not given:
        raise ConfigError(
            f"{source}: there is nothing in it; a recipe has the tables [run], [actor], [learner] "
            "(isentrope init makes one)"
        )
    if resume is not None and (resume / "run.json").exists():
        RunFolder.open(resume).check_free()
    sections = load_all(source, overrides)
    shared = sections["run"]
    assert isinstance(shared, RunConfig)
    models.find(shared.model)
    folder = resume or _new_folder(out, Path(source).stem)
    frozen = f"# The recipe of this run: every value in force.\n\n{dump(sections)}"
    (folder / "recipe.toml").write_text(frozen, encoding="utf-8")
    ends = given.get("run", {})
    return Plan(
        folder=folder,
        resume=resume is not None,
        actors=getattr(sections["actor"], "count", 0),
        redis=ends.get("redis", ""),
        learner=ends.get("learner", ""),
        failpoint=shared.failpoint,
    )


def _new_folder(out: Path | None, name: str) -> Path:
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "recipe.toml").exists() or (folder / "run.json").exists():
        raise ConfigError(f"{folder} holds a run: go on with --resume {folder}, or choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot make the run folder: {error.strerror}") from None
    return folder


# -- the processes ----------------------------------------------------------------------------


def _supervisor(plan: Plan, view: View) -> Supervisor:
    from common.redis_server import RedisServer, free_port
    from common.softstate import hidden
    from common.supervise import ACTOR_BUDGET, LEARNER_BUDGET, Child, Supervisor

    logs = plan.folder / "logs"
    redis = None if plan.redis else RedisServer(logs)
    if redis is not None:
        redis.choose_port()
    ends = {
        "run.redis": redis.url if redis else hidden(plan.redis),
        "run.learner": plan.learner or f"tcp://127.0.0.1:{free_port()}",
    }

    def learner(life: int) -> list[str]:
        # A life that ended before it made the run has nothing to resume.
        resume = ["--resume"] if (plan.folder / "run.json").exists() else []
        where = ("--run-folder", str(plan.folder), *resume)
        return _command("learner", plan, life, ends, *where)

    def actor(index: int) -> Child:
        name = f"actor-{index}"
        here = ("--learner", ends["run.learner"], "--redis", ends["run.redis"], "--name", name)
        return Child(
            name,
            lambda life: _command("actor", plan, life, {}, *here),
            logs / f"{name}.log",
            ACTOR_BUDGET,
        )

    return Supervisor(
        learner=Child("learner", learner, logs / "learner.log", LEARNER_BUDGET),
        actors=[actor(index) for index in range(plan.actors)],
        redis=redis,
        view=view,
    )


def _command(
    module: str, plan: Plan, life: int, overrides: dict[str, str], *options: str
) -> list[str]:
    """`-P`: a folder named like one of our packages in the working directory does not shadow it."""
    failpoint = Failpoint.parse(plan.failpoint, life)  # each kills once
    values = {**overrides, "run.failpoint": json.dumps(str(failpoint))}
    settings = [part for key, value in values.items() for part in ("-s", f"{key}={value}")]
    return [sys.executable, "-P", "-m", module, str(plan.recipe), *options, *settings]
