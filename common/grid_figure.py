"""The pictures of a grid: what each cell came to, and how its entropy and reward went.

overview.png    accuracy and pass@k beside the entropy it was reached at; accuracy against entropy
curves.png      entropy and right answers of every cell, the first cell in grey behind each
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from common.compare import targets
from common.compare_figure import LOWEST, against
from common.figures import BLUE, GREY, ORANGE, PURPLE, RED, STYLE, log_scale, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from common.grid_table import Row

COLUMNS = 6  # panels beside each other in curves.png


def draw(table: Sequence[Row], out: Path) -> list[Path]:
    """Write both PNGs; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in table if row.runs]
    with plt.rc_context(STYLE):
        _overview(plt, done, out / "overview.png")
        _curves(plt, done, out / "curves.png")
    return [out / "overview.png", out / "curves.png"]


# -- what each came to ------------------------------------------------------------------------


def _overview(plt: Any, table: Sequence[Row], path: Path) -> None:
    height = max(3.4, 1.2 + 0.24 * len(table))
    figure, axes = plt.subplots(
        1, 3, figsize=(13.5, height), layout="constrained", width_ratios=(3, 2.4, 3.6)
    )
    accuracy, entropy, trade = axes
    for place, row in enumerate(table):
        _dots(accuracy, place, row.values("pass_any"), ORANGE, "o", "pass@k", hollow=True)
        _dots(accuracy, place, row.values("accuracy"), BLUE, "o", "accuracy")
        _dots(entropy, place, row.values("entropy_late"), PURPLE, "o", "mean of the last half")
        _dots(entropy, place, row.values("target"), RED, "|", "target")
    _named_axis(accuracy, table, "Held-out")
    _named_axis(entropy, table, "Entropy (nats per token)", named=False)
    log_scale(entropy, "x")
    _trade(trade, table)
    figure.savefig(path)
    plt.close(figure)


def _dots(
    axis: Axes,
    place: int,
    values: Sequence[float],
    colour: str,
    mark: str,
    label: str,
    hollow: bool = False,
) -> None:
    """The mean of the seeds, on a line from the least to the largest of them."""
    if not values:
        return
    shown = [max(LOWEST, value) for value in values]
    if len(shown) > 1:
        axis.plot([min(shown), max(shown)], [place, place], color=colour, alpha=0.45, linewidth=3)
    axis.plot(
        fmean(shown),
        place,
        mark,
        color=colour,
        ms=11 if mark == "|" else 5.5,
        mew=2 if mark == "|" else 1.2,
        mfc="white" if hollow else colour,
        label=label if place == 0 or mark == "|" else None,
    )


def _named_axis(axis: Axes, table: Sequence[Row], title: str, named: bool = True) -> None:
    names = [row.name if named else "" for row in table]
    axis.set_yticks(range(len(table)), names)
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.set_title(title)
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if found:
        axis.legend(
            list(found.values()),
            list(found),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.04 - 0.5 / max(4, len(table))),
            ncols=2,
        )


def _trade(axis: Axes, table: Sequence[Row]) -> None:
    """What accuracy costs in entropy; names where there is room for them."""
    spots = [
        (row.name, max(LOWEST, entropy), accuracy, bool(row.values("target")))
        for row in table
        if (entropy := row.mean("entropy_late")) is not None
        and (accuracy := row.mean("accuracy")) is not None
    ]
    log_scale(axis, "x")
    axis.set(title="Accuracy against entropy held", xlabel="entropy, mean of the last half")
    axis.set_ylabel("held-out accuracy")
    for _, entropy, accuracy, aimed in spots:
        axis.plot(entropy, accuracy, "o", ms=6, color=PURPLE if aimed else BLUE, mec="white")
    axis.margins(0.12)
    _names(axis, [(name, entropy, accuracy) for name, entropy, accuracy, _ in spots])


def _names(axis: Axes, spots: Sequence[tuple[str, float, float]]) -> None:
    """Greedily: a name goes beside its point unless it would lie on another name or point."""
    taken: list[tuple[float, float, float, float]] = []
    points = [axis.transData.transform((x, y)) for _, x, y in spots]
    axis.figure.canvas.draw()
    points = [axis.transData.transform((x, y)) for _, x, y in spots]
    size = axis.figure.dpi / 72 * 7
    for (name, x, y), (px, py) in zip(spots, points, strict=True):
        for dx, dy, side in (
            (7, -3, "left"),
            (-7, -3, "right"),
            (0, 7, "center"),
            (0, -13, "center"),
        ):
            width = 0.56 * size * len(name)
            left = px + dx - {"left": 0.0, "right": width, "center": width / 2}[side]
            box = (left, py + dy - 1, left + width, py + dy + size)
            others = [(qx - 4, qy - 4, qx + 4, qy + 4) for qx, qy in points if (qx, qy) != (px, py)]
            if not any(_overlap(box, other) for other in (*taken, *others)):
                taken.append(box)
                axis.annotate(
                    name, (x, y), xytext=(dx, dy), textcoords="offset pixels", ha=side, fontsize=7
                )
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- how they went ----------------------------------------------------------------------------


def _curves(plt: Any, table: Sequence[Row], path: Path) -> None:
    columns = min(COLUMNS, len(table))
    rows = -(-len(table) // columns)
    width, height = 2.4 * columns + 0.5, 1.75 * rows + 0.7  # inches
    edges = {
        "left": 0.45 / width,
        "right": 1 - 0.1 / width,
        "bottom": 0.3 / height,
        "top": 1 - 0.6 / height,
        "wspace": 0.08,
        "hspace": 0.32,
    }
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        gridspec_kw=edges,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for place, (axis, row) in enumerate(zip(axes.flat, table, strict=False)):
        _panel(axis, row, table[0], bottom=place + columns >= len(table), left=not place % columns)
    for axis in axes.flat[len(table) :]:
        axis.set_visible(False)
    log_scale(axes[0][0], "y")
    figure.suptitle(
        f"Policy entropy (nats, log scale; dotted: target; grey: {table[0].name}) and right "
        "answers in training (blue, 0 to 1)",
        fontsize=9,
        x=0.1 / width,
        y=1 - 0.1 / height,
        ha="left",
    )
    figure.savefig(path)
    plt.close(figure)


def _panel(axis: Axes, row: Row, first: Row, bottom: bool, left: bool) -> None:
    for run in first.runs:
        _smooth(axis, *against(run.steps, "step", "entropy"), GREY, 1.0)
    for run in row.runs:
        _shares(axis, *against(run.steps, "step", "correct"))
        _smooth(axis, *against(run.steps, "step", "entropy"), PURPLE, 1.5)
        aims = targets(run, run.steps)
        if any(aims):
            steps = [line["step"] for line in run.steps]
            axis.plot(steps, [aim or float("nan") for aim in aims], ":", color=RED, linewidth=1)
    axis.set_title(row.name, fontsize=8)
    axis.tick_params(labelsize=7, labelbottom=bottom, labelleft=left)


def _shares(axis: Axes, at: Sequence[float], values: Sequence[float]) -> None:
    """From the bottom of the panel, 0, to its top, 1: a second axis for each would take long."""
    from matplotlib.transforms import blended_transform_factory

    where = blended_transform_factory(axis.transData, axis.transAxes)
    axis.plot(at, smooth(values), color=BLUE, linewidth=1.0, alpha=0.55, transform=where)


def _smooth(
    axis: Axes, at: Sequence[float], values: Sequence[float], colour: str, width: float
) -> None:
    shown = smooth([max(LOWEST, value) for value in values])
    axis.plot(at, shown, color=colour, linewidth=width)
