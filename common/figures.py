"""Pictures of a run, from its metrics.jsonl: PNGs worth looking at.

overview.png    the story in one picture: reward and held-out accuracy, length, entropy, lag,
                and who waited for whom
reward.png entropy.png lag.png throughput.png    each of its parts, larger
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import metrics
from common.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[Mapping[str, Any]]

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#3b6fb6",
    "#e08a1e",
    "#3a9a5b",
    "#c8473f",
    "#7d58a6",
    "#8a8f98",
)
MOST_LABELS = 8  # held-out points that are written out; of more the first and the last
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#9aa0a8",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "figure.dpi": 130,
}


def draw(folder: Path, out: Path | None = None) -> list[Path]:
    """Write the PNGs into `out` (default: the run folder's plots/); the overview comes first."""
    lines = metrics.read(folder)
    if not any("reward" in line for line in lines):
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    out = out or folder / "plots"
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, parts in PAGES.items():
            rows, columns = (len(parts) + 1) // 2, min(2, len(parts))
            figure, axes = plt.subplots(
                rows,
                columns,
                figsize=(5.4 * columns, 3.1 * rows),
                squeeze=False,
                layout="constrained",
            )
            for axis, part in zip(axes.flat, parts, strict=False):
                part(axis, lines)
            for axis in axes.flat[len(parts) :]:
                axis.set_visible(False)
            figure.suptitle(folder.resolve().name, x=0.01, ha="left", color=GREY, fontsize=9)
            figure.savefig(out / f"{name}.png")
            plt.close(figure)
            written.append(out / f"{name}.png")
    return written


def drawn(folder: Path, out: Path | None = None) -> list[Path]:
    """As `draw`; raises DataError when there is nothing to draw."""
    written = draw(folder, out)
    if not written:
        raise DataError(f"{folder}: no finished step in {metrics.FILE} yet, nothing to draw")
    return written


# -- the parts --------------------------------------------------------------------------------


def reward(axis: Axes, lines: Lines) -> None:
    """Every group that was looked at, those trained on, and the held-out points."""
    steps, values = column(lines, "reward")
    axis.plot(steps, smooth(values), color=GREY, linewidth=1.2, label="reward, groups trained on")
    steps, every = column(lines, "correct")
    axis.plot(steps, every, color=BLUE, alpha=0.3, linewidth=1)
    axis.plot(steps, smooth(every), color=BLUE, label="correct, every group of a step")
    points = column(lines, "heldout")
    if points[0]:
        line = "o--" if len(points[0]) > 2 else "o"  # a line between two points would say too much
        axis.plot(
            *points, line, color=ORANGE, markersize=7, linewidth=1, zorder=5, label="held-out"
        )
        for i, (x, y) in enumerate(zip(*points, strict=True)):
            ends = i in (0, len(points[0]) - 1)
            if ends or len(points[0]) <= MOST_LABELS:
                axis.annotate(
                    f"{y:.2f}",
                    (x, y),
                    xytext=(0, 8 if y < 0.9 else -16),  # within the frame
                    textcoords="offset points",
                    ha="center",
                    color=ORANGE,
                    weight="bold",
                    bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
                )
    axis.set(title="Reward and held-out accuracy", ylim=(0, 1.02) if max(values) <= 1 else None)
    axis.legend(loc="lower right")
    steps_axis(axis)


def length(axis: Axes, lines: Lines) -> None:
    axis.plot(*column(lines, "length"), color=GREEN, label="training")
    points = column(lines, "heldout_length")
    if points[0]:
        axis.plot(*points, "o", color=ORANGE, markersize=7, label="held-out", zorder=5)
        axis.legend(loc="lower right")
    axis.set(title="Response length", ylabel="tokens")
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    steps_axis(axis)


def entropy(axis: Axes, lines: Lines) -> None:
    axis.plot(*column(lines, "entropy"), color=PURPLE, label="entropy")
    aims = [(line["step"], aim) for line in lines if (aim := metrics.target(line)) is not None]
    if aims:
        axis.plot(*zip(*aims, strict=True), color=ORANGE, linestyle="--", label="target")
        axis.legend()
    axis.set(title="Policy entropy", ylabel="nats per token")
    axis.set_ylim(bottom=0)
    steps_axis(axis)


def entropy_change(axis: Axes, lines: Lines) -> None:
    """What first-order theory predicts, and what happened."""
    axis.axhline(0, color=GREY, linewidth=0.8)
    steps, predicted = column(lines, "entropy_predicted")
    slopes, correlations = (
        column(lines, f"entropy_{name}")[1] for name in ("slope", "correlation")
    )
    # The theory is that of plain gradient descent; Adam's steps are larger by a factor, the slope.
    scale = slopes[-1] if slopes and slopes[-1] > 0 else 1.0
    fitted = f"× {scale:,.0f}, the fitted slope" if scale != 1.0 else "(no slope fitted yet)"
    label = f"predicted {fitted}"
    axis.plot(steps, [scale * p for p in predicted], color=PURPLE, alpha=0.8, label=label)
    steps, realised = column(lines, "entropy_realised")
    axis.plot(steps, realised, "D", color=RED, markersize=5, label="realised, same tokens")
    found = f" (correlation {correlations[-1]:.2f})" if correlations else ""
    axis.set(title=f"Entropy change of a step{found}", ylabel="nats per token")
    axis.legend(loc="best")
    steps_axis(axis)


def lag(axis: Axes, lines: Lines) -> None:
    """Shares of the rollouts of each batch by lag, stacked."""
    rows = [line for line in lines if line.get("lag")]
    steps = [line["step"] for line in rows]
    top = max((int(k) for line in rows for k, n in line["lag"].items() if n), default=0)
    below = [0.0] * len(rows)
    for value in range(top + 1):
        shares = [line["lag"].get(str(value), 0) / sum(line["lag"].values()) for line in rows]
        shade = 0.25 + 0.75 * value / max(1, top)
        colour, alpha = (RED, shade) if value else (BLUE, 0.45)
        axis.bar(steps, shares, 1.0, below, color=colour, alpha=alpha, label=f"lag {value}")
        below = [b + s for b, s in zip(below, shares, strict=True)]
    axis.set(title="Lag of the rollouts trained on", ylabel="share of the batch", ylim=(0, 1))
    axis.grid(visible=False)
    axis.legend(loc="upper center", ncols=min(5, top + 1), bbox_to_anchor=(0.5, -0.16))
    steps_axis(axis)


def throughput(axis: Axes, lines: Lines) -> None:
    for name, colour, label in (
        ("sampled_tokens_per_s", ORANGE, "sampled, all actors"),
        ("tokens_per_s", BLUE, "trained on"),
    ):
        steps, values = column(lines, name)
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axis.plot(steps, smooth(values), color=colour, label=label)
    axis.set(title="Throughput", ylabel="tokens per second")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")
    steps_axis(axis)


def idle(axis: Axes, lines: Lines) -> None:
    for name, colour, label in (
        ("learner_idle", BLUE, "learner waits for groups"),
        ("actor_idle", ORANGE, "actors have nothing to decode"),
    ):
        steps, values = column(lines, name)
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axis.plot(steps, smooth(values), color=colour, label=label)
    axis.set(title="Who waits", ylabel="share of the time", ylim=(0, 1))
    axis.legend(loc="upper right")
    steps_axis(axis)


def dropped(axis: Axes, lines: Lines) -> None:
    """Groups a step, by fate."""
    rows = [line for line in lines if "reward" in line]
    steps = [line["step"] for line in rows]
    reasons = sorted({reason for line in rows for reason in line.get("dropped") or {}})
    series = {"trained": [line.get("groups") or 0 for line in rows]}
    series |= {r: [(line.get("dropped") or {}).get(r, 0) for line in rows] for r in reasons}
    below = [0.0] * len(rows)
    colours = [GREEN, GREY, RED, ORANGE, PURPLE, BLUE]
    for (name, values), colour in zip(series.items(), colours, strict=False):
        axis.bar(steps, values, 1.0, below, color=colour, alpha=0.7, label=name.replace("_", " "))
        below = [b + v for b, v in zip(below, values, strict=True)]
    axis.set(title="Groups by fate", ylabel="groups of a step")
    axis.grid(visible=False)
    axis.legend(loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.16))
    steps_axis(axis)


Part = Callable[["Axes", Lines], None]

PAGES: dict[str, tuple[Part, ...]] = {
    "overview": (reward, entropy, length, entropy_change, lag, idle),
    "reward": (reward, length),
    "entropy": (entropy, entropy_change),
    "lag": (lag, dropped),
    "throughput": (throughput, idle),
}


# -- columns ----------------------------------------------------------------------------------


def column(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of those lines that have the number."""
    found = [
        (line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)
    ]
    return [step for step, _ in found], [float(value) for _, value in found]


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Mean over a centred window, narrower at the ends: as many values as before."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def log_scale(axis: Axes, which: Literal["x", "y"]) -> None:
    """Ticks at 1, 2 and 5 of each decade, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = axis.xaxis if which == "x" else axis.yaxis
    scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    scale.set_major_formatter("{x:g}")
    scale.set_minor_formatter(NullFormatter())


def steps_axis(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
