"""The counts of a batch: of the groups that its rule looked at, those trained on and those passed
over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from common.wire import Group
from learner.inbox import Selection


def seen(batch: Selection) -> list[Group]:
    """The main groups that the batch rule looked at: those trained on, then those passed over."""
    groups = [*(item.group for item in batch.items), *batch.refused]
    return [group for group in groups if group.kind == "main"]


def correct(groups: Iterable[Group]) -> float:
    """Share of their answers that are right, 0…1; of none 0. Those that no grader judged are left
    out.
    """
    rollouts = [r for group in groups for r in group.rollouts if not r.error]
    return sum(r.correct for r in rollouts) / max(1, len(rollouts))


def tally(batch: Selection) -> dict[str, Any]:
    """Correctness and lengths of all that was looked at, lags of what is trained on, drops by
    reason; in the names of common/metrics.GLOSSARY.
    """
    main = [item.group for item in batch.items if item.group.kind == "main"]
    rollouts = [r for g in seen(batch) for r in g.rollouts if not r.error]
    lags = Counter(max(0, batch.t - r.oldest_version) for g in main for r in g.rollouts)
    trained = max(1, sum(lags.values()))
    return {
        "correct": correct(seen(batch)),
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
