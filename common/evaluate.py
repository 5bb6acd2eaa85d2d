"""`isentrope eval`: the held-out accuracy of a run's model, sampled by the same actors.

It is a run of no steps, in a folder of its own under the run's: one published version, eval tickets
through ordinary actors, nothing trained.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from common.errors import DataError
from common.options import existing_run, json_option, overrides_option, run_folder_argument


@click.command("eval")
@run_folder_argument
@click.option(
    "--problems",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Held-out problems; all where there are fewer.",
)
@click.option(
    "--samples", type=click.IntRange(1), default=1, show_default=True, help="Answers a problem."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the sampling.",
)
@json_option
@overrides_option
def evaluate(
    run_folder: Path,
    problems: int,
    samples: int,
    temperature: float,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Measure the held-out accuracy of a run's model."""
    from common.run import carry_out, prepare

    recipe = existing_run(run_folder) / "recipe.toml"
    model = run_folder / "model"
    if not (model / "config.json").is_file():
        raise DataError(
            f"{run_folder} has no model yet: a run writes it when it ends; finish it with "
            f"`isentrope run --resume {run_folder}`"
        )
    settings = {
        "run.model": json.dumps(str(model.resolve())),
        "run.failpoint": '""',
        "learner.steps": "0",
        "learner.eval.first": "false",
        "learner.eval.last": "true",
        "learner.eval.problems": str(problems),
        "learner.eval.samples": str(samples),
        "learner.eval.temperature": str(temperature),
    }
    chosen = (*(f"{key}={value}" for key, value in settings.items()), *overrides)
    out = run_folder / "evals" / time.strftime("%Y%m%d-%H%M%S")
    plan = prepare(str(recipe), out, None, chosen)
    summary, signal_number = carry_out(plan, plain=True, to_stderr=True)
    if signal_number:
        sys.exit(128 + signal_number)
    found = summary["evaluations"]["after"]
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(
        f"held-out accuracy {found['accuracy']:.3f} ± {found['standard_error']:.3f} "
        f"(pass@{samples} {found['pass_any']:.3f}, {found['rollouts']} answers of "
        f"{found['length']:.1f} tokens)"
    )
