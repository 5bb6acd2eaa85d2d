"""`isentrope size`: how many actors does a learner like this need?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.errors import DataError
from common.options import existing_run, json_option, run_folder_argument

if TYPE_CHECKING:
    from common.size import Predicted, Shape
    from common.size_of import Measured

ENOUGH = 0.05  # of the learner's time without work


@click.command()
@run_folder_argument
@click.option("--actors", type=click.IntRange(min=1), multiple=True, help="Predict for so many.")
@click.option("--train-s", type=float, help="Seconds a step takes, instead of what RUN measured.")
@click.option("--length", type=float, help="Mean tokens of an answer, instead of RUN's.")
@click.option("--tokens-per-s", type=float, help="Of one actor with full slots, instead of RUN's.")
@click.option("--max-lag", type=click.IntRange(min=0), help="Instead of RUN's.")
@click.option("--groups-per-step", type=click.IntRange(min=1), help="Instead of RUN's.")
@json_option
def size(
    run_folder: Path,
    actors: tuple[int, ...],
    as_json: bool,
    **changes: float | int | None,
) -> None:
    """Predict idle shares and lag for other numbers of actors, from what RUN measured.

    RUN may be short and need not be finished; what it has not got yet can be given. The prediction
    takes it that learner and actors do not share cores.
    """
    import msgspec

    from common.size import around, needed, predict
    from common.size_of import measure

    measured = measure(existing_run(run_folder))
    given = {name: value for name, value in changes.items() if value is not None}
    renamed = {"length": "length_mean"}
    shape = msgspec.structs.replace(
        measured.shape, **{renamed.get(name, name): value for name, value in given.items()}
    )
    enough = needed(shape, ENOUGH)
    rows = [predict(shape, count) for count in actors] or list(around(shape, enough.actors))
    if as_json:
        click.echo(json.dumps(to_json(shape, measured, enough, rows)))
        return
    show(shape, measured, enough, rows, changed=bool(given))


def to_json(
    shape: Shape, measured: Measured, enough: Predicted, rows: list[Predicted]
) -> dict[str, Any]:
    import msgspec

    return {
        "shape": msgspec.structs.asdict(shape),
        "measured": measured.numbers,
        "needed": enough._asdict(),
        "predicted": [row._asdict() for row in rows],
    }


def show(
    shape: Shape, measured: Measured, enough: Predicted, rows: list[Predicted], changed: bool
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{shape.groups_per_step} groups of {shape.group_size} a step, {100 * shape.useful:.0f} % "
        f"of them useful, answers of {shape.length_mean:.0f} tokens, max_lag {shape.max_lag}; "
        f"a step trains {shape.train_s:.2f} s, an actor makes {shape.tokens_per_s:,.0f} tokens/s"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("actors", "step s", "learner idle", "actors idle", "lag mean", "largest", "stale"):
        table.add_column(name, justify="right")
    numbers = measured.numbers
    if not changed:
        table.add_row(
            f"measured {numbers['actors']:.0f}",
            f"{numbers['step_s']:.2f}",
            f"{100 * numbers['learner_idle']:.0f} %",
            f"{100 * numbers['actor_idle']:.0f} %",
            f"{numbers['lag_mean']:.2f}",
            f"{numbers['lag_max']:.0f}",
            f"{100 * numbers['stale']:.0f} %",
            style="bold",
        )
    for row in rows:
        table.add_row(
            str(row.actors),
            f"{row.step_s:.2f}",
            f"{100 * row.learner_idle:.0f} %",
            f"{100 * row.actor_idle:.0f} %",
            f"{row.lag_mean:.2f}",
            str(row.lag_max),
            f"{100 * row.stale:.0f} %",
        )
    console.print(table)
    if enough.learner_idle > ENOUGH:
        raise DataError(
            f"no number of actors keeps this learner busy: with {enough.actors} it is idle "
            f"{100 * enough.learner_idle:.1f} % of the time; take a larger max_lag or "
            "groups_per_step, or shorter answers"
        )
    console.print(f"needed     {enough.actors} actors leave the learner at most 5 % without work")
