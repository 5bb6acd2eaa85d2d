"""The picture of `isentrope compare`: reward and entropy, against steps and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compare import Run, targets
from common.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    STYLE,
    log_scale,
    smooth,
    steps_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY, "#2aa5a0", "#b05f8c", "#8b6b3d", "#4d4d4d")
LOWEST = 1e-3  # nats: an entropy below is drawn here


def draw(runs: Sequence[Run], labels: Sequence[str], path: Path) -> Path:
    """Write the PNG; returns its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = 2 if max(map(len, labels)) > 30 else min(4, len(labels))
    extra = 0.22 * -(-len(labels) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 2, figsize=(10.8, 6.2 + extra), layout="constrained", sharey="row", sharex="col"
        )
        for index, run in enumerate(runs):
            colour = PALETTE[index % len(PALETTE)]
            style = "-" if index < len(PALETTE) else "--"
            for side, clock in enumerate(("step", "seconds")):
                _reward(axes[0][side], run, clock, colour, style)
                _entropy(axes[1][side], run, clock, colour, style, labels[index])
        _finish(axes)
        figure.legend(
            *axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=columns
        )
        figure.savefig(path)
        plt.close(figure)
    return path


def _reward(axis: Axes, run: Run, clock: str, colour: str, style: str) -> None:
    """Right answers among all that were sampled, and the held-out points."""
    at, values = against(run.steps, clock, "correct")
    if values:
        axis.plot(at, values, color=colour, alpha=0.18, linewidth=0.8)
        axis.plot(at, smooth(values), style, color=colour)
    points = against(run.lines, clock, "heldout")
    axis.plot(*points, "D", color=colour, ms=6, mec="white", zorder=5)


def _entropy(axis: Axes, run: Run, clock: str, colour: str, style: str, label: str) -> None:
    at, values = against(run.steps, clock, "entropy")
    shown = [max(LOWEST, value) for value in values]
    axis.plot(at, shown, color=colour, alpha=0.18, linewidth=0.8)
    axis.plot(at, smooth(shown), style, color=colour, label=label)
    lines = [line for line in run.steps if line.get("entropy") is not None]
    aims = targets(run, lines)
    if any(aims):
        nan = float("nan")
        axis.plot(at, [aim or nan for aim in aims], ":", color=colour, linewidth=1.2)


def _finish(axes: Any) -> None:
    for side in (0, 1):
        log_scale(axes[1][side], "y")
    axes[0][0].set(title="Right answers; ◆ held-out", ylabel="share", ylim=(None, 1.02))
    axes[0][1].set_title("… against time")
    axes[1][0].set(title="Policy entropy; dotted: target", ylabel="nats per token (log scale)")
    axes[1][1].set(title="… against time", xlabel="training time (s)")
    steps_axis(axes[1][0])


def against(
    lines: Sequence[Mapping[str, Any]], clock: str, name: str
) -> tuple[list[float], list[float]]:
    """Values of `name` and when they were, by `clock` ("step" or "seconds"); 0 before training."""
    found = [
        (float(line.get(clock) or 0.0), float(line[name]))
        for line in lines
        if isinstance(line.get(name), int | float)
    ]
    return [at for at, _ in found], [value for _, value in found]
