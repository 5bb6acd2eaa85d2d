"""What one actor says about itself: numbers for the learner, a picture for people."""

from __future__ import annotations

from actor.work import Day
from common.status import ActorStatus


def stats(day: Day) -> dict[str, float]:
    """For the heartbeat: the engine's state, what is held and owed, and every counter there is."""
    engine, pool, line = day.stage.engine.stats(), day.stage.pool, day.line
    counts = {
        "held": len(day.desk.held),
        "owed": len(day.desk.owed),
        "graders_killed": pool.killed,
        "malformed": line.malformed,
        **day.fetcher.counts,
        **day.desk.counts,
    }
    both = {**engine._asdict(), "idle": 1.0 - engine.busy, **counts}
    return {name: float(value) for name, value in both.items()}


def status(day: Day) -> ActorStatus:
    engine, desk = day.stage.engine.stats(), day.desk
    return ActorStatus(
        version=day.fetcher.version,
        tokens_per_s=engine.tokens_per_s,
        busy=engine.busy,
        running=engine.running,
        waiting=engine.waiting,
        held=len(desk.held),
        capacity=desk.capacity,
        kv_use=engine.kv_use,
        pause_s=engine.pause_s,
    )
