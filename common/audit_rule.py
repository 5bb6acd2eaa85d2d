"""The batch rule, worked out a second time for the auditor, from the words of the promise.

The main part of step t is the first `groups_per_step` usable main groups in admission order; those
before the last of them that are not usable are dropped. After `refill_limit` × `groups_per_step`
groups it is made of the usable ones there are. Then come the first `n_aux` usable aux groups that
were admitted before the last main one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.wire import Group

# estimators that learn nothing from a group whose answers are all equally right
_NEED_VARIANCE = ("grpo", "dr_grpo", "rloo")


class Facts(NamedTuple):
    """All of an admitted group that the rule may look at."""

    id: int
    kind: str
    oldest: tuple[int, ...]  # version of the oldest token, a rollout
    verifier_error: bool
    truncated: bool  # every rollout
    uniform: bool  # in raw correctness

    def lag(self, t: int) -> int:
        return max(max(0, t - version) for version in self.oldest)


class Batch(NamedTuple):
    tickets: list[int]  # in batch order
    dropped: dict[int, str]


def facts_of(group: Group) -> Facts:
    return Facts(
        id=group.ticket,
        kind=group.kind,
        oldest=tuple(min(v for s in r.segments for _, v in s.spans) for r in group.rollouts),
        verifier_error=any(rollout.error for rollout in group.rollouts),
        truncated=all(rollout.finish == "length" for rollout in group.rollouts),
        uniform=len({rollout.correct for rollout in group.rollouts}) == 1,
    )


def batch(buffer: Sequence[Facts], t: int, config: Mapping[str, Any]) -> Batch | None:
    """The batch of step t from what is buffered in admission order; None while too little is."""
    wanted = int(config.get("groups_per_step", 0))
    limit = max(1, round(float(config.get("refill_limit", 0)) * wanted))
    mains = [facts for facts in buffer if facts.kind == "main"][:limit]
    chosen, dropped = _choose(mains, wanted, t, config)
    if len(chosen) < wanted and len(mains) < limit:
        return None
    ids = [facts.id for facts in buffer]
    before = buffer[: ids.index(chosen[-1])] if chosen else []
    auxes = [facts for facts in before if facts.kind == "aux"]
    extra, dropped_aux = _choose(auxes, int(config.get("n_aux", 0)), t, config)
    return Batch(chosen + extra, dropped | dropped_aux)


def _choose(
    groups: Sequence[Facts], wanted: int, t: int, config: Mapping[str, Any]
) -> tuple[list[int], dict[int, str]]:
    """The first `wanted` usable ones, and why those before the last of them are not."""
    chosen: list[int] = []
    dropped: dict[int, str] = {}
    for facts in groups:
        if len(chosen) == wanted:
            break
        reason = _unusable(facts, t, config)
        if reason:
            dropped[facts.id] = reason
        else:
            chosen.append(facts.id)
    return chosen, dropped


def _unusable(facts: Facts, t: int, config: Mapping[str, Any]) -> str:
    if facts.verifier_error:
        return "verifier_error"
    if facts.truncated and config.get("drop_truncated"):
        return "truncated"
    if facts.uniform and facts.kind == "main" and config.get("advantage") in _NEED_VARIANCE:
        return "zero_variance"
    return "stale" if facts.lag(t) > int(config.get("max_lag", 0)) else ""
