"""Runs side by side: what each came to, and what tells their recipes apart.

    runs = [read(folder) for folder in folders]
    labels(runs)        ["grpo", "isentropic, target 0.25", ...]
    facts(run)          accuracy with its interval, entropy, target, tokens, seconds, forecast

Everything is read from the run folder (recipe.toml, metrics.jsonl, summary.json); a run that has no
summary, since it still goes on or was killed, is told by its metrics alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from common import metrics, recipe, summary
from common.errors import DataError
from common.options import existing_run

Z95 = 1.959964  # two-sided, of the normal distribution
LABEL_WIDTH = 60
# How a run was looked at and stored: told apart by it only where nothing else differs.
BESIDE = (
    *("learner.eval.", "learner.realised_every", "learner.keep_"),
    *("learner.tensorboard", "learner.wandb"),
)


class Run(NamedTuple):
    folder: Path
    recipe: Mapping[str, Any]  # its tables
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: Mapping[str, Any]  # {}: it did not come to its end

    @property
    def learner(self) -> Mapping[str, Any]:
        table: Mapping[str, Any] = self.recipe.get("learner", {})
        return table

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps; line 0 holds the first evaluation only."""
        return [line for line in self.lines if "reward" in line]


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out accuracy with its 95 % interval, and the share of problems solved at least once."""

    value: float
    low: float
    high: float
    pass_any: float | None = None  # pass@samples
    samples: int = 1


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to; None: not known."""

    run: str
    label: str
    ending: str  # as the summary says it; "": it has none
    steps: int
    before: Accuracy | None
    after: Accuracy | None
    entropy_first: float | None  # nats per token
    entropy_last: float | None
    entropy_late: float | None  # mean over the last half of the steps
    target: float | None  # nats per token, at the end
    tracking: float | None  # mean of |H - target| / target over the last half
    tokens: int  # response tokens trained on
    sampled: int  # response tokens of all groups that a step looked at
    seconds: float
    lag: float | None
    nats_per_accuracy: float | None  # entropy spent, over held-out accuracy gained
    correlation: float | None  # of predicted and realised entropy change
    slope: float | None  # realised over predicted


# -- reading ----------------------------------------------------------------------------------


def read(folder: Path) -> Run:
    """Raises ConfigError where no run is, DataError where it has no finished step or is damaged."""
    tables = recipe.read(str(existing_run(folder) / "recipe.toml"))
    run = Run(folder, tables, metrics.read(folder), summary.read(folder))
    if not run.steps:
        raise DataError(f"{folder}: no finished step in {metrics.FILE} yet, nothing to compare")
    return run


def facts(run: Run, label: str) -> Facts:
    steps = run.steps
    late = steps[len(steps) // 2 :]
    target, tracking = _target(run, late)
    before, after = (accuracy(run, end) for end in ("before", "after"))
    first, last = _first(steps, "entropy"), _last(steps, "entropy")
    return Facts(
        run=str(run.folder),
        label=label,
        ending=str(run.summary.get("ending", "")),
        steps=steps[-1]["step"],
        before=before,
        after=after,
        entropy_first=first,
        entropy_last=last,
        entropy_late=mean(line.get("entropy") for line in late),
        target=target,
        tracking=tracking,
        tokens=round(sum(line.get("tokens") or 0 for line in steps)),
        sampled=round(sum(_sampled(line, run) for line in steps)),
        seconds=float(_last(steps, "seconds") or 0.0),
        lag=mean(line.get("lag_mean") for line in steps),
        nats_per_accuracy=_price(first, last, before, after),
        correlation=_last(steps, "entropy_correlation"),
        slope=_last(steps, "entropy_slope"),
    )


def accuracy(run: Run, end: str) -> Accuracy | None:
    """The evaluation "before" or "after"; without a summary what the metrics have of it."""
    samples = int(run.learner.get("eval", {}).get("samples", 1))
    point = (run.summary.get("evaluations") or {}).get(end)
    if point is None:
        line = next((line for line in run.lines if line["step"] == 0), {})
        if end == "after" or line.get("heldout") is None:
            return None
        value, count = line["heldout"], int(run.learner.get("eval", {}).get("problems", 512))
        low, high = interval(value, count)
        return Accuracy(value=value, low=low, high=high, samples=samples)
    value, error = point["accuracy"], point.get("standard_error") or 0.0
    if value is None or math.isnan(value):
        return None
    # as many independent answers as would have this error: those to one problem are not
    count = value * (1 - value) / error**2 if error > 0 else point["rollouts"] / samples
    low, high = interval(value, count)
    solved = point.get("pass_any") if samples > 1 else None
    return Accuracy(value=value, low=low, high=high, pass_any=solved, samples=samples)


def interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent answers."""
    if count <= 0:
        return 0.0, 1.0
    squared = Z95**2 / count
    middle = (share + squared / 2) / (1 + squared)
    half = Z95 / (1 + squared) * math.sqrt(share * (1 - share) / count + squared / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def targets(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The entropy that a method aimed at in each step, in nats; None where there is no target."""
    for method in run.learner.get("methods") or []:
        fixed, name = method.get("target"), method.get("type")
        if fixed is None or method.get("preset", "none") != "none":
            continue
        own = [line.get(f"methods/{name}/target") for line in lines]
        nats = fixed if method.get("unit", "nats") == "nats" else None
        return [nats if value is None else value for value in own]
    return [None] * len(lines)


def _target(run: Run, late: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """The last target, and the mean relative distance from it."""
    aims = targets(run, late)
    off = [
        abs(line["entropy"] - aim) / aim
        for line, aim in zip(late, aims, strict=True)
        if aim and line.get("entropy") is not None
    ]
    return (aims[-1], mean(off)) if aims else (None, None)


def _sampled(line: Mapping[str, Any], run: Run) -> float:
    groups = (line.get("groups") or 0) + sum((line.get("dropped") or {}).values())
    return float(groups * run.learner.get("group_size", 1) * (line.get("length") or 0.0))


def _price(
    first: float | None, last: float | None, before: Accuracy | None, after: Accuracy | None
) -> float | None:
    if first is None or last is None or before is None or after is None:
        return None
    gained = after.value - before.value
    return (first - last) / gained if gained > 0 else None


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _first(lines: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return next((line[name] for line in lines if line.get(name) is not None), None)


def _last(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return _first(reversed(lines), name)


# -- names ------------------------------------------------------------------------------------


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells each from the others: its methods and the values that differ; where that is too
    long to read, or tells nothing, its folder's name."""
    flat = [_flat(run.recipe) for run in runs]
    kinds = [_kind(run) for run in runs]
    differing = _differing(flat)
    trained = [path for path in differing if not path.startswith(BESIDE)]
    if trained or len(set(kinds)) > 1:
        differing = trained
    short = _short(differing)
    named = []
    for run, values, kind in zip(runs, flat, kinds, strict=True):
        parts = [kind] if len(set(kinds)) > 1 else []
        parts += [f"{short[key]} {_plain(values[key])}" for key in differing if key in values]
        label = ", ".join(parts)
        named.append(label if 0 < len(label) <= LABEL_WIDTH else run.folder.resolve().name)
    return [
        label if named.count(label) == 1 else f"{label} ({run.folder.resolve().name})"
        for run, label in zip(runs, named, strict=True)
    ]


def _kind(run: Run) -> str:
    """The methods, or the advantage estimator where there is none: the empty list is GRPO."""
    methods = [str(method.get("type")) for method in run.learner.get("methods") or []]
    return " + ".join(methods) or str(run.learner.get("advantage", "grpo"))


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values by path; those of a method under its type, whatever its place in the list."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        elif name == "learner.methods":
            for method in value:
                own = {k: v for k, v in method.items() if k != "type"}
                found |= _flat(own, f"{name}.{method.get('type')}.")
        else:
            found[name] = value
    return found


def _differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths whose values differ between the runs that have them; a method's own values count among
    the runs with that method, all others only where every run has them."""
    found = []
    for path in dict.fromkeys(path for values in flat for path in values):
        having = [values[path] for values in flat if path in values]
        everywhere = len(having) == len(flat) or path.startswith("learner.methods.")
        if everywhere and any(value != having[0] for value in having):
            found.append(path)
    return found


def _short(paths: Sequence[str]) -> dict[str, str]:
    """The last word of each path, or its last two where the last one is not enough."""
    last = [path.rpartition(".")[2] for path in paths]
    return {
        path: word if last.count(word) == 1 else ".".join(path.split(".")[-2:])
        for path, word in zip(paths, last, strict=True)
    }


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
