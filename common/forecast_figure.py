"""The picture of `isentrope forecast`: the law, and the run beside what the law says of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.figures import BLUE, GREY, ORANGE, PURPLE, STYLE, steps_axis
from common.forecast import Law, Points, first_part, identify, interventions, residuals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from common.forecast_cli import Read

WORDS = {"heldout": "held-out accuracy", "training": "right answers in training (share)"}


def draw(run: Read, baseline: Read | None, share: float, path: Path) -> Path:
    """Write the PNG; returns its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fitted = baseline or run
    law = None if interventions(fitted.learner) else identify(fitted.points).law
    cut = first_part(fitted.points, share)
    first = identify(fitted.points.part(0, cut)).law if law else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, 4.0), layout="constrained")
        if baseline is None:
            _curve(left, run.points, BLUE, law, run.folder.resolve().name)
            _course(right, run.points, law, first, cut)
        else:
            _curve(left, baseline.points, GREY, law, baseline.folder.resolve().name)
            left.scatter(
                run.points.entropy,
                run.points.accuracy,
                s=16,
                color=PURPLE,
                label=run.folder.resolve().name,
            )
            _residuals(right, run.points, law)
        if first is not None and baseline is None:
            _line(left, first, ORANGE, f"fitted to the first {cut} points", "--")
        left.set(
            title="The entropy law  $R = -a\\,e^{H} + b$",
            xlabel="policy entropy H (nats per token)",
            ylabel=WORDS[run.kind],
        )
        left.set_xlim(left=-0.01)
        left.legend(loc="lower left")
        figure.savefig(path)
        plt.close(figure)
    return path


def _curve(axis: Axes, points: Points, colour: str, law: Law | None, name: str) -> None:
    """The points, darker as the run goes on, and the law with its ceiling."""
    shade: Any = 0.25 + 0.75 * np.arange(len(points.step)) / max(1, len(points.step) - 1)
    axis.scatter(
        points.entropy,
        points.accuracy,
        s=16,
        color=colour,
        alpha=shade,
        label=f"{name}, later: darker",
    )
    if law is None:
        return
    _line(axis, law, colour, "fitted to all of them", "-", reach=float(points.entropy.max()))
    axis.errorbar(0, law.ceiling, 1.96 * law.ceiling_se, fmt="*", color=colour, ms=11, capsize=3)
    axis.annotate(
        f"ceiling {law.ceiling:.3f} ± {law.ceiling_se:.3f}",
        (0, law.ceiling),
        xytext=(12, 7),
        textcoords="offset points",
        color=colour,
        weight="bold",
    )


def _line(
    axis: Axes, law: Law, colour: str, name: str, style: str, reach: float | None = None
) -> None:
    at = np.linspace(0, axis.get_xlim()[1] if reach is None else reach, 200)
    axis.plot(at, law.predict(at), style, color=colour, linewidth=1.4, label=name)


def _course(axis: Axes, points: Points, law: Law | None, first: Law | None, cut: int) -> None:
    """What was, and what the laws say given the entropy there was."""
    axis.plot(points.step, points.accuracy, "o", ms=3.5, color=BLUE, label="measured")
    if law is not None:
        axis.plot(points.step, law.predict(points.entropy), color=BLUE, alpha=0.6, label="law")
    if first is not None:
        rest = points.part(cut - 1)
        axis.plot(rest.step, first.predict(rest.entropy), "--", color=ORANGE, label="forecast")
        axis.axvline(points.step[cut - 1], color=ORANGE, linewidth=0.8)
    axis.set(title="The run, and what its first part foretold", ylabel="accuracy")
    axis.legend(loc="lower right")
    steps_axis(axis)


def _residuals(axis: Axes, points: Points, law: Law | None) -> None:
    axis.set(title="Above the law: more accuracy for the entropy spent", ylabel="R - law(H)")
    steps_axis(axis)
    if law is None:
        return
    axis.axhspan(-law.rmse, law.rmse, color=GREY, alpha=0.15, label="scatter of the baseline")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.plot(points.step, residuals(points, law), "o", ms=3.5, color=PURPLE, label="residual")
    axis.legend(loc="lower right")
