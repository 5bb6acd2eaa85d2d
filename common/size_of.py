"""What a run is like, for the model of size.py: from its recipe, its metrics and its journal."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import journal, metrics, recipe
from common.codec import Codec
from common.errors import DataError
from common.records import Admit
from common.runfolder import RunFolder
from common.size import Shape
from common.wire import FromActor, Group

LEAST = 5  # finished steps
FIRST = 2  # of them: start-up, not counted …
STARTUP_S = 6.0  # … nor those whose numbers of actors, means over 5 s, look back into it
GROUPS = 4096  # the last of the journal, for lengths and speeds


class Measured(NamedTuple):
    shape: Shape
    numbers: dict[str, float]  # what the model predicts, as this run had it


def measure(folder: Path) -> Measured:
    """Raises DataError when the run is too young."""
    lines = [line for line in metrics.read(folder) if "train_s" in line]
    if len(lines) < LEAST:
        raise DataError(f"{folder}: {len(lines)} steps are too few to measure; {LEAST} are needed")
    lines = _settled(lines)
    if not lines:
        raise DataError(
            f"{folder}: it is too young to measure; {STARTUP_S:g} s after its first step"
        )
    sections = recipe.load_all(str(RunFolder.open(folder).recipe))
    learner, actor = sections["learner"], sections["actor"]
    groups = _groups(folder)
    actors = _mean(lines, "actors")
    numbers = {
        "actors": actors,
        "step_s": _mean(lines, "step_s"),
        "learner_idle": _sum(lines, "wait_s") / _sum(lines, "step_s"),
        "actor_idle": _weighted(lines, "actor_idle"),
        "lag_mean": _mean(lines, "lag_mean"),
        "lag_max": max(float(line["lag_max"]) for line in lines),
        "stale": _share(lines, "stale"),
    }
    mean, sigma = _lengths(groups)
    busy = max(0.05, 1 - numbers["actor_idle"])
    rate = _weighted(lines, "sampled_tokens_per_s") / max(1.0, actors) / busy
    shape = Shape(
        groups_per_step=_setting(learner, "groups_per_step"),
        group_size=_setting(learner, "group_size"),
        max_lag=_setting(learner, "max_lag"),
        max_tokens=_setting(learner, "max_tokens"),
        slots=_setting(actor, "slots"),
        prefetch=_setting(actor, "prefetch"),
        length_mean=mean,
        length_sigma=sigma,
        tokens_per_s=rate,
        sequence_tokens_per_s=min(rate, _sequence_speed(groups)),
        useful=1 - _share(lines, "zero_variance"),
        train_s=numbers["step_s"] - _mean(lines, "wait_s"),
        swap_s=0.0,
        grade_s=statistics.median([g.timings.get("grade_s", 0.0) for g in groups] or [0.0]),
    )
    return Measured(shape, numbers)


def _settled(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those after the start-up: what actors say of themselves looks back over some seconds, in
    which they had nothing to do, and a run of few steps is soon over."""
    since = itertools.accumulate((float(line["step_s"]) for line in lines[1:]), initial=0.0)
    both = list(zip(lines, since, strict=True))[FIRST:]
    return [line for line, passed_s in both if passed_s >= STARTUP_S]


def _groups(folder: Path) -> Sequence[Group]:
    """The last groups of the journal that were asked to be trained on."""
    codec, found = Codec(FromActor), list[Group]()
    for _, record in journal.read(RunFolder.open(folder).journal):
        if isinstance(record, Admit):
            group = codec.decode(record.frame)
            if group.kind == "main":
                found.append(group)
                del found[:-GROUPS]
    if not found:
        raise DataError(f"{folder}: no group in the journal to measure lengths by")
    return found


def _lengths(groups: Sequence[Group]) -> tuple[float, float]:
    """Mean, and standard deviation of the logarithm."""
    lengths = np.array([max(1, r.length) for group in groups for r in group.rollouts], float)
    return float(lengths.mean()), float(np.log(lengths).std())


def _sequence_speed(groups: Sequence[Group]) -> float:
    """Tokens a second of one sequence when little else ran: the 95th percentile over groups of
    longest answer / time to generate. inf where no times were sent.
    """
    speeds = [
        max(r.length for r in group.rollouts) / group.timings["generate_s"]
        for group in groups
        if group.timings.get("generate_s", 0.0) > 0
    ]
    return float(np.quantile(speeds, 0.95)) if speeds else math.inf


def _setting(section: Any, name: str) -> int:
    return int(getattr(section, name))


def _sum(lines: Sequence[dict[str, Any]], name: str) -> float:
    return sum(float(line[name]) for line in lines if line.get(name) is not None)


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    found = [float(line[name]) for line in lines if line.get(name) is not None]
    return statistics.fmean(found) if found else 0.0


def _weighted(lines: Sequence[dict[str, Any]], name: str) -> float:
    """Mean over time."""
    pairs = [(float(line["step_s"]), line.get(name)) for line in lines]
    known = [(seconds, float(value)) for seconds, value in pairs if value is not None]
    return sum(s * v for s, v in known) / max(1e-9, sum(s for s, _ in known))


def _share(lines: Sequence[dict[str, Any]], reason: str) -> float:
    """Groups dropped for `reason` among those used and dropped."""
    dropped = sum(float((line.get("dropped") or {}).get(reason, 0)) for line in lines)
    others = sum(float(sum((line.get("dropped") or {}).values())) for line in lines)
    return dropped / max(1.0, others + _sum(lines, "groups"))
