"""What one actor says about itself: numbers for the learner, a picture for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actor.engine.base import EngineStats
from common.status import ActorStatus
from common.wire import Heartbeat

if TYPE_CHECKING:
    from actor.work import Day

NOTE_LENGTH = 300  # of what an exception says, at most


def beat(day: Day) -> Heartbeat:
    """The heartbeat of this moment; looks at the engine first, for the capacity follows from it."""
    engine, desk = day.stage.engine.stats(), day.desk
    desk.observe(engine)
    return Heartbeat(
        run=desk.run,
        incarnation=desk.incarnation,
        capacity=desk.capacity,
        held=tuple(desk.held),
        version=day.fetcher.version if engine.up else -1,
        stats=stats(day, engine),
        notes=notes(day, engine),
    )


def stats(day: Day, engine: EngineStats) -> dict[str, float]:
    """The engine's state, what is held and owed, and every counter there is."""
    window = day.desk.window
    counts = {
        "held": len(day.desk.held),
        "owed": len(day.desk.owed),
        "window": window.tickets,
        "ceiling": window.ceiling,
        "graders_killed": day.stage.pool.killed,
        "malformed": day.line.malformed,
        "refused_versions": day.fetcher.refused,
        "hint_share": day.stage.budget.share,
        **day.stage.voices.counts,
        **day.fetcher.counts,
        **day.desk.counts,
    }
    both = {**engine._asdict(), "idle": 1.0 - engine.busy, **counts}
    return {name: float(value) for name, value in both.items() if not isinstance(value, str)}


def notes(day: Day, engine: EngineStats) -> dict[str, str]:
    """Why the numbers are what they are, where there is something to say."""
    said = {
        "window": day.desk.window.why,
        "refused": day.fetcher.refusal,
        "trouble": engine.trouble,
    }
    return {name: text[:NOTE_LENGTH] for name, text in said.items() if text}


def status(day: Day) -> ActorStatus:
    engine = day.stage.engine.stats()
    version = day.fetcher.version if engine.up else -1
    numbers = stats(day, engine)
    return ActorStatus.of(version, day.desk.capacity, numbers, notes(day, engine))
