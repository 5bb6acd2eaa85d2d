"""What a step's line says about synthesis."""

from __future__ import annotations

from collections.abc import Mapping

from common.proposals import PREFIX
from learner.follow import Follower
from learner.inbox import Selection
from learner.synthesis.pool import Pool


def facts(followers: Mapping[str, Follower], batch: Selection) -> dict[str, float | None]:
    """By names of common.metrics.GLOSSARY; nothing where synthesis is off."""
    pool = followers.get("synthesis")
    if not isinstance(pool, Pool):
        return {}
    state, main = pool.state, [i for i in batch.items if i.ticket.kind == "main"]
    made = sum(item.ticket.problem.startswith(f"{PREFIX}/") for item in main)
    return {
        "synthesis_pool": len(pool.active()),
        "synthesis_proposals": state.proposals,
        "synthesis_accepted": state.accepted,
        "synthesis_p": state.sum_p / state.scored if state.scored else None,
        "synthesis_label_error": pool.label_error(),
        "synthesis_share": made / max(1, len(main)),
    }
