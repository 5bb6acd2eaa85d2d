"""What people see of a learner: a line of metrics a step, a live status, a summary at the end.
Nothing decides by it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from common.metrics import Metrics, Value
from common.metrics import read as read_metrics
from common.runfolder import RunFolder
from common.status import ActorStatus, Heldout, Phase, Status, StatusFile, encode
from common.versions import Registry
from common.wire import Group
from learner import turns
from learner.agreement import Doubt
from learner.config import LearnerConfig
from learner.evaluation import Evaluation
from learner.inbox import Selection
from learner.ledger import Ledger
from learner.measure import off_policy_alarm
from learner.origin import of_answers
from learner.prompts import curriculum
from learner.synthesis import facts as synthesis

if TYPE_CHECKING:
    from learner.desk import Desk
    from learner.step import StepReport

log = logging.getLogger("isentrope.report")
T = TypeVar("T")
RATE_WINDOW = 8  # steps over which speeds are averaged


class Report:
    def __init__(
        self, folder: RunFolder, registry: Registry, config: LearnerConfig, ledger: Ledger, t: int
    ) -> None:
        self.phase: Phase = "starting"
        self._folder = folder
        self._registry = registry
        self._config = config
        self._metrics = Metrics(folder.path, config.tensorboard, t or None, config.wandb)
        self._file = StatusFile(folder.path)
        self._lines: list[dict[str, Any]] = read_metrics(folder.path)
        self._status = Status(run=folder.run_id, steps=config.steps, max_lag=config.max_lag)
        self._points: dict[str, tuple[int, Evaluation]] = {}
        self._lags: Counter[int] = Counter()
        for line in self._lines:
            self._lags.update({int(k): v for k, v in (line.get("lag") or {}).items()})
        self._before_s = float(self._lines[-1].get("seconds") or 0.0) if self._lines else 0.0
        self._began = self._step_began = time.monotonic()
        self._started = False
        self._wait_s = 0.0
        self._busy: list[float] = []
        self._doubt = Doubt()
        self._engine_restarts: dict[str, int] = {}
        for label, point in ledger.evaluations.items():
            if point.is_answered:
                self._points[label] = (_step_of(label, config.steps), point)

    # ---- while it runs ---------------------------------------------------------------------------

    def waiting(self, wait: Callable[[], T]) -> T:
        """Run `wait`, and count its time as the learner's idle time."""
        if not self._started:
            self._started = True
            self._began = self._step_began = time.monotonic()
        self.phase, before = "waiting", time.monotonic()
        try:
            return wait()
        finally:
            self._wait_s += time.monotonic() - before

    def step(self, batch: Selection, report: StepReport, desk: Desk) -> None:
        """The line of the step that just ended."""
        now = time.monotonic()
        step_s, self._step_began = now - self._step_began, now
        wait_s, self._wait_s = self._wait_s, 0.0
        self._note_actors(desk)
        self._doubt.look(batch.t + 1, report.metrics)
        line: dict[str, Any] = {**report.metrics, **_batch_facts(batch), **self._pool(desk)}
        line |= desk.look(lambda: synthesis.facts(desk.ledger.followers, batch))
        for name, facts in of_answers(_seen(batch), self._config).items():
            line[name] = facts | line.get(name, {})
        line |= turns.facts(_seen(batch), self._config.feedback, self._config.intervene)
        line |= {
            "seconds": self._seconds(),
            "step_s": step_s,
            "wait_s": wait_s,
            "learner_idle": wait_s / step_s if step_s else 0.0,
            "tokens_per_s": line["tokens"] / step_s if step_s else 0.0,
            "actor_idle": 1.0 - self._busy[-1] if self._busy else None,
        }
        for label, point in desk.ledger.evaluations.items():
            if label not in self._points and point.is_complete(self._config.eval.problems):
                line |= self._note_point(label, point, _step_of(label, self._config.steps))
        self._metrics.write(batch.t + 1, line)
        self._lines.append({"step": batch.t + 1, **line})
        self._lags.update({int(k): int(v) for k, v in line["lag"].items()})
        self.live(desk, batch.t + 1)

    def heldouts(self, points: Mapping[str, Evaluation], label: str, t: int) -> None:
        """Evaluation `label` was waited for at step `t`; those asked before it are in as well."""
        for name, point in points.items():
            if name == label or name not in self._points:
                self._heldout(name, point, t if name == label else _step_of(name, t))

    def _heldout(self, label: str, point: Evaluation, t: int) -> None:
        none: dict[str, Any] = {}
        before = next((line for line in reversed(self._lines) if line["step"] == t), none)
        known = {k: v for k, v in before.items() if k not in ("step", "time")}
        self._metrics.write(t, known | self._note_point(label, point, t))
        log.info(
            "held-out %s: %.3f ± %.3f at version %d", label, point.accuracy, point.standard_error, t
        )

    def live(self, desk: Desk, t: int) -> None:
        """Twice a second at most: status.json, and the same in Redis."""
        if not self._file.due():
            return
        status = self._picture(desk, t)
        self._file.write(status)
        self._registry.live("learner", encode(status))

    def finish(self, ending: str, desk: Desk, t: int) -> None:
        self.phase = "done"
        status = self._picture(desk, t)
        self._file.write(status, force=True)
        self._registry.live("learner", encode(status))
        (self._folder.path / "summary.json").write_text(
            json.dumps(self._summary(ending, desk, t), indent=1) + "\n"
        )

    def close(self) -> None:
        self._metrics.close()

    # ---- the numbers -----------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self._before_s + (time.monotonic() - self._began if self._started else 0.0)

    def _note_actors(self, desk: Desk) -> None:
        actors = list(desk.actors.copy().values())
        for actor in actors:
            if restarts := int(actor.stats.get("restarts", 0)):
                self._engine_restarts[actor.name] = restarts
        shares = [actor.stats.get("busy", 0.0) for actor in actors]
        if shares:
            self._busy.append(sum(shares) / len(shares))

    def _note_point(self, label: str, point: Evaluation, t: int) -> dict[str, Value]:
        self._points[label] = (t, point)
        several = {"heldout_by_source": point.by_source} if self._config.prompts.sources else {}
        return several | {
            "heldout": point.accuracy,
            "heldout_length": point.length,
            "heldout_versions": {"oldest": point.oldest, "newest": point.newest},
            **({"heldout_turns": point.by_turn} if self._has_turns() else {}),
        }

    def _has_turns(self) -> bool:
        """Whether held-out problems get several turns."""
        return self._config.feedback is not None and self._config.feedback.evaluate

    def _pool(self, desk: Desk) -> dict[str, Value]:
        sums = desk.look(desk.ledger.sums)
        actors = list(desk.actors.copy().values())
        wanted = curriculum.of(desk.ledger.followers)
        told: dict[str, Value] = {"curriculum": desk.look(wanted.facts)} if wanted else {}
        return told | {
            "issued": sums["main"].issued,
            "buffered": sums["main"].buffered,
            "in_flight": sums["main"].in_flight,
            "actors": len(actors),
            "sampled_tokens_per_s": sum(actor.stats.get("tokens_per_s", 0.0) for actor in actors),
        }

    def _picture(self, desk: Desk, t: int) -> Status:
        recent = self._lines[-RATE_WINDOW:]
        last = self._lines[-1] if self._lines else {}
        span = sum(line.get("step_s") or 0.0 for line in recent)
        sums = desk.look(desk.ledger.sums)
        return Status(
            run=self._folder.run_id,
            incarnation=desk.incarnation,
            at=time.time(),
            phase=self.phase,
            step=t,
            steps=self._config.steps,
            version=max(desk.version, 0),
            seconds=self._seconds(),
            eta_s=(self._config.steps - t) * span / len(recent) if span else None,
            reward=last.get("reward"),
            length=last.get("length"),
            entropy=last.get("entropy"),
            heldout=[
                _heldout(label, step, point, self._config)
                for label, step, point in self._evaluations(desk)
            ],
            lags=dict(sorted(self._lags.items())),
            max_lag=self._config.max_lag,
            groups={
                kind: {
                    "issued": s.issued,
                    "trained": s.trained,
                    "evaluated": s.evaluated,
                    **({"scored": s.scored} if s.scored else {}),
                    **s.dropped,
                    "buffered": s.buffered,
                    "in_flight": s.in_flight,
                }
                for kind, s in sums.items()
            },
            conserved=all(s.holds for s in sums.values()),
            learner_idle=sum(line.get("wait_s") or 0.0 for line in recent) / span if span else 0.0,
            tokens_per_s=sum(line.get("tokens") or 0.0 for line in recent) / span if span else 0.0,
            actors=_actors(desk),
            warnings=self._warnings(desk),
        )

    def _evaluations(self, desk: Desk) -> list[tuple[str, int, Evaluation]]:
        return [
            (k, _step_of(k, self._config.steps), v)
            for k, v in desk.ledger.evaluations.copy().items()
        ]

    def _warnings(self, desk: Desk) -> list[str]:
        warnings = [desk.blocked] if desk.blocked else []
        warnings += off_policy_alarm(self._lines[-1] if self._lines else {})
        if self._doubt.words:
            warnings.append(self._doubt.words)
        if not desk.actors:
            warnings.append("no actor is connected; waiting for one")
        for reason, count in desk.counts.copy().items():
            if reason.startswith(("invalid_", "refused_")) or reason == "quarantined":
                warnings.append(f"{reason}: {count}")
        return warnings

    def _summary(self, ending: str, desk: Desk, t: int) -> dict[str, Any]:
        main = desk.look(desk.ledger.sums)["main"] if "main" in desk.ledger.sums() else None
        before, after = (self._points.get(label, (0, None))[1] for label in ("before", "after"))
        entropies = [line["entropy"] for line in self._lines if line.get("entropy") is not None]
        rollouts = sum(self._lags.values())
        steps_s = sum(line.get("step_s") or 0.0 for line in self._lines)
        return {
            "ending": ending,
            "steps": t,
            "seconds": round(
                self._seconds() if not self._lines else self._lines[-1].get("seconds") or 0.0, 2
            ),
            "heldout_before": before.accuracy if before else None,
            "heldout_after": after.accuracy if after else None,
            "length_before": before.length if before else None,
            "length_after": after.length if after else None,
            "entropy_first": entropies[0] if entropies else None,
            "entropy_last": entropies[-1] if entropies else None,
            "groups": {
                "issued": main.issued,
                "trained": main.trained,
                "dropped": main.dropped,
                "buffered": main.buffered,
                "in_flight": main.in_flight,
            }
            if main
            else {},
            "evaluations": {
                label: {"step": step, **point.facts()}
                for label, (step, point) in self._points.items()
            },
            "lag_mean": sum(k * v for k, v in self._lags.items()) / rollouts if rollouts else 0.0,
            "lag_max": max(self._lags, default=0),
            "max_lag": self._config.max_lag,
            "engine_restarts": self._engine_restarts,
            "learner_idle": sum(line.get("wait_s") or 0.0 for line in self._lines) / steps_s
            if steps_s
            else 0.0,
            "actor_idle": 1.0 - sum(self._busy) / len(self._busy) if self._busy else None,
            "tokens_trained_per_s": sum(line.get("tokens") or 0.0 for line in self._lines) / steps_s
            if steps_s
            else 0.0,
        }


def _seen(batch: Selection) -> list[Group]:
    """The main groups that the batch rule looked at: those trained on, then those passed over."""
    groups = [*(item.group for item in batch.items), *batch.refused]
    return [group for group in groups if group.kind == "main"]


def _batch_facts(batch: Selection) -> dict[str, Any]:
    """Of the groups looked at: those trained on, and those passed over, by reason."""
    main = [item.group for item in batch.items if item.group.kind == "main"]
    rollouts = [r for g in _seen(batch) for r in g.rollouts if not r.error]
    lags = Counter(max(0, batch.t - r.oldest_version) for g in main for r in g.rollouts)
    trained = max(1, sum(lags.values()))
    return {
        "correct": sum(r.correct for r in rollouts) / max(1, len(rollouts)),
        "length": sum(r.length for r in rollouts) / max(1, len(rollouts)),
        "truncated": sum(r.finish == "length" for r in rollouts) / max(1, len(rollouts)),
        "groups": len(main),
        "rollouts": sum(lags.values()),
        "lag": {str(k): v for k, v in sorted(lags.items())},
        "lag_mean": sum(k * v for k, v in lags.items()) / trained,
        "lag_max": max(lags, default=0),
        "dropped": dict(Counter(reason for _, reason in batch.dropped)),
        "stale_length": _stale_lengths(batch),
    }


def _stale_lengths(batch: Selection) -> dict[str, int]:
    """Stale groups by quarter of the batch's lengths: if the long ones go first, that is a bias to
    see.
    """
    every = sorted(_mean_length(g) for g in [*(i.group for i in batch.items), *batch.refused])
    pairs = zip(batch.dropped, batch.refused, strict=True)
    stale = [_mean_length(group) for (_, reason), group in pairs if reason == "stale"]
    return dict(
        Counter(f"q{1 + min(3, 4 * every.index(length) // len(every))}" for length in stale)
    )


def _mean_length(group: Group) -> float:
    return sum(r.length for r in group.rollouts) / len(group.rollouts)


def _actors(desk: Desk) -> dict[str, ActorStatus]:
    now = time.monotonic()
    held = desk.held()
    return {
        actor.name: ActorStatus.of(
            actor.version,
            actor.capacity,
            actor.stats,
            actor.notes,
            held=held.get(peer, 0),
            silent_s=now - actor.seen,
        )
        for peer, actor in desk.actors.copy().items()
    }


def _heldout(label: str, step: int, point: Evaluation, config: LearnerConfig) -> Heldout:
    graded = point.rollouts > 0
    return Heldout(
        step=step,
        accuracy=point.accuracy if graded else 0.0,
        length=point.length if graded else 0.0,
        done=point.rollouts + point.errors,
        of=config.eval.problems * config.eval.samples,
        versions=(max(point.oldest, 0), max(point.newest, 0)),
        label=label,
    )


def _step_of(label: str, steps: int) -> int:
    if label.startswith("step-"):
        return int(label.removeprefix("step-"))
    return 0 if label == "before" else steps
