"""The batch rule, worked out a second time for the auditor, from the words of the promise.

The main part of step t is the first `groups_per_step` usable main groups in admission order; those
before the last of them that are not usable are dropped. After `refill_limit` × `groups_per_step`
groups it is made of the usable ones there are. Then come the first `n_aux` usable aux groups that
were admitted before the last main one, and the first `proposers` usable groups of proposers whose
scores were known before it. Of a step after a halt nothing is usable that was proposed, or is a
proposal.
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
    uniform: bool  # in raw correctness, discounted by turn
    made: bool = False  # it asks a proposed problem, or for proposals

    def lag(self, t: int) -> int:
        return max(max(0, t - version) for version in self.oldest)


class Batch(NamedTuple):
    tickets: list[int]  # in batch order
    dropped: dict[int, str]


def facts_of(group: Group, gamma: float = 1.0, made: bool = False) -> Facts:
    return Facts(
        id=group.ticket,
        kind=group.kind,
        oldest=tuple(min(v for s in r.segments for _, v in s.spans) for r in group.rollouts),
        verifier_error=any(rollout.error for rollout in group.rollouts),
        truncated=all(rollout.finish == "length" for rollout in group.rollouts),
        uniform=len({r.correct * gamma**r.turn for r in group.rollouts}) == 1,
        made=made,
    )


def batch(
    buffer: Sequence[Facts], t: int, config: Mapping[str, Any], halted: bool = False
) -> Batch | None:
    """The batch of step t from what is buffered, in the order in which main and aux groups were
    admitted and proposers' became ready; None while too little is. `halted`: a halt holds for it.
    """
    suspect = {facts.id: "suspect_label" for facts in buffer if halted and facts.made}
    wanted = int(config.get("groups_per_step", 0))
    limit = max(1, round(float(config.get("refill_limit", 0)) * wanted))
    mains = [facts for facts in buffer if facts.kind == "main"][:limit]
    chosen, dropped = _choose(mains, wanted, t, config, suspect)
    if len(chosen) < wanted and len(mains) < limit:
        return None
    ids = [facts.id for facts in buffer]
    before = buffer[: ids.index(chosen[-1])] if chosen else []
    for kind, most in (
        ("aux", config.get("n_aux", 0)),
        ("propose", _synthesis(config, "proposers")),
    ):
        beside = [facts for facts in before if facts.kind == kind]
        extra, gone = _choose(beside, int(most), t, config, suspect)
        chosen, dropped = chosen + extra, dropped | gone
    return Batch(chosen, dropped)


def allowed_lag(kind: str, config: Mapping[str, Any]) -> int:
    own = _synthesis(config, "max_lag", None) if kind == "propose" else None
    main = int(config.get("max_lag", 0))
    if kind == "propose":
        return 2 * main if own is None else int(own)
    return main


def _synthesis(config: Mapping[str, Any], name: str, otherwise: Any = 0) -> Any:
    return (config.get("synthesis") or {}).get(name, otherwise)


def _choose(
    groups: Sequence[Facts],
    wanted: int,
    t: int,
    config: Mapping[str, Any],
    suspect: Mapping[int, str],
) -> tuple[list[int], dict[int, str]]:
    """The first `wanted` usable ones, and why those before the last of them are not."""
    chosen: list[int] = []
    dropped: dict[int, str] = {}
    for facts in groups:
        if len(chosen) == wanted:
            break
        reason = suspect.get(facts.id) or _unusable(facts, t, config)
        if reason:
            dropped[facts.id] = reason
        else:
            chosen.append(facts.id)
    return chosen, dropped


def _unusable(facts: Facts, t: int, config: Mapping[str, Any]) -> str:
    if facts.verifier_error and facts.kind != "propose":
        return "verifier_error"
    if facts.truncated and config.get("drop_truncated"):
        return "truncated"
    if facts.uniform and facts.kind == "main" and config.get("advantage") in _NEED_VARIANCE:
        return "zero_variance"
    return "stale" if facts.lag(t) > allowed_lag(facts.kind, config) else ""
