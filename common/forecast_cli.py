"""`isentrope forecast RUN`: where the entropy law says that a run ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from common.errors import ConfigError, DataError
from common.options import existing_run, json_option, run_folder_argument

if TYPE_CHECKING:
    from common.forecast import Law, Points

KINDS = {
    "heldout": "held-out accuracy, one point an evaluation",
    "training": "share of right answers in training, one point a step",
}


class Read(NamedTuple):
    """A run as the forecast sees it."""

    folder: Path
    learner: Mapping[str, Any]  # of its recipe
    lines: list[dict[str, Any]]
    kind: str  # of KINDS
    points: Points


@click.command()
@run_folder_argument
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Hold RUN against the law of this run, which has no methods.",
)
@click.option(
    "--points",
    "kind",
    type=click.Choice(["auto", *KINDS]),
    default="auto",
    show_default=True,
    help="What R is; auto: held-out where there are six evaluations or more.",
)
@click.option(
    "--first",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.15,
    show_default=True,
    help="Share of the points that the rest is predicted from; six at least.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PNG",
    help="Draw it there.",
)
@json_option
def forecast(
    run_folder: Path,
    baseline: Path | None,
    kind: str,
    first: float,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Fit the entropy law R = -a e^H + b to a run: its ceiling, and the rest from its first part.

    A run with methods is not fitted; with --baseline it is held against the law of that run:
    positive residuals are more accuracy for the entropy spent.
    """
    runs = [read(folder, kind) for folder in (run_folder, baseline) if folder is not None]
    if len({run.kind for run in runs}) > 1:
        runs = [read(run.folder, "training") for run in runs]
    run, base = runs[0], (*runs, None)[1]
    found = judge(run, base, first)
    if picture is not None:
        from common.forecast_figure import draw

        found["plot"] = str(draw(run, base, first, picture))
    click.echo(json.dumps(found) if as_json else "\n".join(said(found)))


def read(folder: Path, kind: str) -> Read:
    """Raises ConfigError where no run is, DataError where it has no finished step."""
    from common import metrics, recipe
    from common.forecast import LEAST_POINTS, heldout, training

    learner = recipe.read(str(existing_run(folder) / "recipe.toml")).get("learner", {})
    lines = metrics.read(folder)
    if not any("entropy" in line for line in lines):
        raise DataError(f"{folder}: no finished step in {metrics.FILE} yet, nothing to fit")
    found = {"heldout": heldout(lines), "training": training(lines)}
    if kind == "auto":
        kind = "heldout" if len(found["heldout"].step) >= LEAST_POINTS else "training"
    return Read(folder, learner, lines, kind, found[kind])


def judge(run: Read, baseline: Read | None, first: float) -> dict[str, Any]:
    """Everything there is to say, for --json. Raises ConfigError for a baseline that intervenes."""
    from common.forecast import departures, identify, interventions

    fitted = baseline or run
    methods = interventions(fitted.learner)
    if baseline is not None and methods:
        raise ConfigError(
            f"--baseline {baseline.folder}: intervenes in the entropy itself "
            f"({', '.join(methods)}); give a run without methods"
        )
    law, why = identify(fitted.points)
    if methods:
        law, why = (
            None,
            (
                f"{', '.join(methods)}: the law is not fitted to a run that intervenes; "
                "hold it against one without methods: --baseline RUN"
            ),
        )
    found: dict[str, Any] = {
        "run": str(run.folder),
        "baseline": None if baseline is None else str(baseline.folder),
        "points": {"kind": run.kind, "count": len(fitted.points.step)},
        "spread": fitted.points.spread,
        "departures": departures(fitted.learner, fitted.lines),
        "identifiable": law is not None,
        "why": why,
    }
    if law is None:
        return found
    found |= {"law": law._asdict(), "first": _first(fitted.points, first)}
    return found if baseline is None else found | {"residual": _residual(run.points, law)}


def _first(points: Points, share: float) -> dict[str, Any]:
    """The law of the first part, and how far the rest was from it."""
    from common.forecast import first_part, identify, residuals

    count = first_part(points, share)
    law, why = identify(points.part(0, count))
    found = {"points": count, "last_step": int(points.step[count - 1]), "why": why}
    rest = points.part(count)
    if law is None or not len(rest.step):
        return found | {"law": None, "why": why or "nothing is left to predict"}
    off = residuals(rest, law)
    return found | {
        "law": law._asdict(),
        "rest": len(rest.step),
        "rest_rmse": float((off**2).mean() ** 0.5),
        "final_step": int(rest.step[-1]),
        "final_predicted": float(law.predict(rest.entropy[-1])),
        "final": float(rest.accuracy[-1]),
    }


def _residual(points: Points, law: Law) -> dict[str, Any]:
    """Of an intervention against the baseline's law; the last half is where it has settled."""
    from common.forecast import residuals

    off = residuals(points, law)
    half = off[len(off) // 2 :]
    return {
        "step": [int(step) for step in points.step],
        "value": [float(value) for value in off],
        "mean": float(off.mean()) if len(off) else None,
        "last_half": float(half.mean()) if len(half) else None,
        "final": float(off[-1]) if len(off) else None,
    }


# -- in words ---------------------------------------------------------------------------------


def said(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a person."""
    points = found["points"]
    yield f"points     {points['count']} of {found['baseline'] or found['run']}"
    yield f"           {KINDS[points['kind']]}; e^H varies by {found['spread']:.3f}"
    for departure in found["departures"]:
        yield f"           {departure}"
    if not found["identifiable"]:
        yield f"law        not identifiable: {found['why']}"
    else:
        yield from _said_law(found["law"])
        yield from _said_first(found["first"])
    if "residual" in found:
        yield from _said_residual(found["residual"], found["law"])
    if "plot" in found:
        yield f"picture    {found['plot']}"


def _said_law(law: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"law        R = -a e^H + b    a = {law['a']:.4f} ± {law['a_se']:.4f}    "
        f"b = {law['b']:.4f} ± {law['b_se']:.4f}    rmse {law['rmse']:.4f}"
    )
    yield f"ceiling    {law['ceiling']:.4f} ± {law['ceiling_se']:.4f} at H = 0"


def _said_first(first: Mapping[str, Any]) -> Iterator[str]:
    begin = f"forecast   from the first {first['points']} points (to step {first['last_step']})"
    if first["law"] is None:
        yield f"{begin}: not identifiable: {first['why']}"
        return
    law = first["law"]
    yield (
        f"{begin}: a = {law['a']:.4f}, b = {law['b']:.4f}, "
        f"ceiling {law['ceiling']:.4f} ± {law['ceiling_se']:.4f}"
    )
    yield (
        f"           the {first['rest']} later points: rmse {first['rest_rmse']:.4f}; "
        f"step {first['final_step']}: predicted {first['final_predicted']:.4f}, "
        f"was {first['final']:.4f}"
    )


def _said_residual(residual: Mapping[str, Any], law: Mapping[str, Any]) -> Iterator[str]:
    if residual["mean"] is None:
        yield "residual   the run has no such points"
        return
    worth = "within the scatter of the baseline"
    if not math.isclose(residual["last_half"], 0.0, abs_tol=law["rmse"]):
        worth = "more accuracy" if residual["last_half"] > 0 else "less accuracy"
        worth += " for the entropy spent than the baseline"
    yield (
        f"residual   {residual['last_half']:+.4f} over the last half ({worth}), "
        f"{residual['final']:+.4f} at the end, {residual['mean']:+.4f} in all"
    )
