"""A run so far, as far as people are told of it: its lines, its held-out points, its lags, who
waited.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from common.metrics import read as read_metrics
from common.runfolder import RunFolder
from learner.config import LearnerConfig
from learner.desk import Desk
from learner.evaluation import Evaluation
from learner.fold import Sums
from learner.ledger import Ledger

T = TypeVar("T")


class Course:
    """Taken up from the lines in the run folder and from the evaluations in `ledger`."""

    def __init__(self, folder: RunFolder, config: LearnerConfig, ledger: Ledger) -> None:
        self.run_id = folder.run_id
        self.config = config
        self.lines: list[dict[str, Any]] = read_metrics(folder.path)
        self.points: dict[str, tuple[int, Evaluation]] = {}  # that were told, by label: its step
        self.lags: Counter[int] = Counter()  # rollouts trained on
        self.busy: list[float] = []  # share of the time that actors decode, a step
        self.engine_restarts: dict[str, int] = {}  # of each actor
        for line in self.lines:
            self._add_lags(line.get("lag") or {})
        for label, point in ledger.evaluations.items():
            if point.is_answered:
                goes_on = label == "after" and ledger.t < config.steps  # as the ledger will say
                name = f"step-{ledger.t}" if goes_on else label
                self.points[name] = (step_of(name, config.steps), point)
        self._before_s = float(self.last.get("seconds") or 0.0)
        self._began = self._step_began = time.monotonic()
        self._started = False
        self._wait_s = 0.0

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1] if self.lines else {}

    @property
    def seconds(self) -> float:
        """Training time, that of earlier processes included; it runs from the first wait on."""
        return self._before_s + (time.monotonic() - self._began if self._started else 0.0)

    def waiting(self, wait: Callable[[], T]) -> T:
        """Run `wait`, and count its time as the learner's idle time."""
        if not self._started:
            self._started = True
            self._began = self._step_began = time.monotonic()
        before = time.monotonic()
        try:
            return wait()
        finally:
            self._wait_s += time.monotonic() - before

    def lap(self) -> tuple[float, float]:
        """Seconds since the step before ended, and how many of them were waited."""
        now = time.monotonic()
        step_s, self._step_began = now - self._step_began, now
        wait_s, self._wait_s = self._wait_s, 0.0
        return step_s, wait_s

    def add(self, step: int, line: dict[str, Any]) -> None:
        self.lines.append({"step": step, **line})
        self._add_lags(line["lag"])

    def note_actors(self, desk: Desk) -> None:
        actors = list(desk.actors.copy().values())
        for actor in actors:
            if restarts := int(actor.stats.get("restarts", 0)):
                self.engine_restarts[actor.name] = restarts
        shares = [actor.stats.get("busy", 0.0) for actor in actors]
        if shares:
            self.busy.append(sum(shares) / len(shares))

    def rate(self, name: str, last: int = 0) -> float:
        """`name` (seconds, tokens) a second of the `last` steps, or of all; 0 before the first."""
        lines = self.lines[-last:]
        span = sum(line.get("step_s") or 0.0 for line in lines)
        return sum(line.get(name) or 0.0 for line in lines) / span if span else 0.0

    def summary(self, ending: str, t: int, main: Sums | None) -> dict[str, Any]:
        """summary.json of a run that ended at step `t` with `main` tickets."""
        return {
            "ending": ending,
            "steps": t,
            "seconds": round(self.last.get("seconds") or 0.0 if self.lines else self.seconds, 2),
            **self._held_out(),
            "groups": _main_sums(main) if main else {},
            "evaluations": {
                label: {"step": step, **point.facts()}
                for label, (step, point) in self.points.items()
            },
            "lag_mean": sum(k * v for k, v in self.lags.items()) / max(1, sum(self.lags.values())),
            "lag_max": max(self.lags, default=0),
            "max_lag": self.config.max_lag,
            "engine_restarts": self.engine_restarts,
            "learner_idle": self.rate("wait_s"),
            "actor_idle": 1.0 - sum(self.busy) / len(self.busy) if self.busy else None,
            "tokens_trained_per_s": self.rate("tokens"),
        }

    def _held_out(self) -> dict[str, float | None]:
        before, after = (self.points.get(label, (0, None))[1] for label in ("before", "after"))
        entropies = [line["entropy"] for line in self.lines if line.get("entropy") is not None]
        return {
            "heldout_before": before.accuracy if before else None,
            "heldout_after": after.accuracy if after else None,
            "length_before": before.length if before else None,
            "length_after": after.length if after else None,
            "entropy_first": entropies[0] if entropies else None,
            "entropy_last": entropies[-1] if entropies else None,
        }

    def _add_lags(self, lag: dict[str, int]) -> None:
        self.lags.update({int(k): int(v) for k, v in lag.items()})


def _main_sums(main: Sums) -> dict[str, Any]:
    return {
        "issued": main.issued,
        "trained": main.trained,
        "dropped": main.dropped,
        "buffered": main.buffered,
        "in_flight": main.in_flight,
    }


def step_of(label: str, steps: int) -> int:
    """The step at which evaluation `label` was asked for, in a run of `steps`."""
    if label.startswith("step-"):
        return int(label.removeprefix("step-"))
    return 0 if label == "before" else steps
