"""The live picture of a learner at one instant: its status.json."""

from __future__ import annotations

import time

from common import metrics
from common.status import ActorStatus, Heldout, Phase, Status
from learner.config import LearnerConfig
from learner.course import Course, step_of
from learner.desk import Desk
from learner.evaluation import Evaluation
from learner.fold import Sums
from learner.measure import idle_alarm, off_policy_alarm

RATE_WINDOW = 8  # steps over which speeds are averaged


def picture(course: Course, desk: Desk, t: int, phase: Phase, doubt: str) -> Status:
    """After step `t`. `doubt`: what is wrong between engine and learner, or ""."""
    config, last = course.config, course.last
    steps = course.lines[-RATE_WINDOW:]
    span = sum(line.get("step_s") or 0.0 for line in steps)
    sums = desk.look(desk.ledger.sums)
    points = desk.ledger.evaluations.copy()
    return Status(
        run=course.run_id,
        incarnation=desk.incarnation,
        at=time.time(),
        phase=phase,
        step=t,
        steps=config.steps,
        version=max(desk.version, 0),
        seconds=course.seconds,
        eta_s=(config.steps - t) * span / len(steps) if span else None,
        reward=last.get("reward"),
        length=last.get("length"),
        entropy=last.get("entropy"),
        entropy_target=metrics.target(last),
        heldout=[_heldout(label, point, config) for label, point in points.items()],
        lags=dict(sorted(course.lags.items())),
        max_lag=config.max_lag,
        groups={kind: _fates(of_kind) for kind, of_kind in sums.items()},
        conserved=all(of_kind.holds for of_kind in sums.values()),
        learner_idle=course.rate("wait_s", RATE_WINDOW),
        tokens_per_s=course.rate("tokens", RATE_WINDOW),
        actors=_actors(desk),
        warnings=_warnings(course, desk, doubt),
    )


def _fates(sums: Sums) -> dict[str, int]:
    return {
        "issued": sums.issued,
        "trained": sums.trained,
        "evaluated": sums.evaluated,
        **({"scored": sums.scored} if sums.scored else {}),
        **sums.dropped,
        "buffered": sums.buffered,
        "in_flight": sums.in_flight,
    }


def _heldout(label: str, point: Evaluation, config: LearnerConfig) -> Heldout:
    graded = point.rollouts > 0
    return Heldout(
        step=step_of(label, config.steps),
        accuracy=point.accuracy if graded else 0.0,
        length=point.length if graded else 0.0,
        done=point.rollouts + point.errors,
        of=config.eval.problems * config.eval.samples,
        versions=(max(point.oldest, 0), max(point.newest, 0)),
        label=label,
    )


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


def _warnings(course: Course, desk: Desk, doubt: str) -> list[str]:
    warnings = [desk.blocked] if desk.blocked else []
    warnings += off_policy_alarm(course.last) + idle_alarm(course.last)
    if doubt:
        warnings.append(doubt)
    if not desk.actors:
        warnings.append("no actor is connected; waiting for one")
    for reason, count in desk.counts.copy().items():
        if reason.startswith(("invalid_", "refused_")) or reason == "quarantined":
            warnings.append(f"{reason}: {count}")
    return warnings
