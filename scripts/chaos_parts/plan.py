"""Which fault comes when: a pure function of a seed, the length and what can be done here.

Faults are dealt from a shuffled deck with some kinds more often than others, and a fresh deck when
it is used up, so that every kind comes soon and again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

GAP_S = 6.5  # between two faults, on average; some last longer, so they overlap
LEAST = 14  # faults, however short the run is
QUIET = 0.1  # share of the time at the end without a fresh fault

# kind: (how often in a deck, shortest, longest in seconds; 0: a moment)
KINDS = {
    "kill actor": (4, 0, 0),
    "kill learner": (2, 0, 0),
    "kill redis": (2, 0, 0),
    "kill grader": (1, 0, 0),  # an actor's
    "kill engine": (2, 0, 0),  # a process of vLLM's; others live in their actor's process
    "kill rank": (2, 0, 0),  # of a learner that has several
    "stop actor": (2, 2, 14),
    "stop learner": (1, 2, 8),
    "stop redis": (1, 2, 7),
    "stop grader": (1, 1, 4),
    "stop engine": (1, 2, 8),
    "stop rank": (1, 2, 8),
    "leave": (1, 0, 0),  # an actor says good-bye and comes back under its name
    "cut": (3, 2, 14),
    "slow": (1, 4, 12),
    "fill": (1, 3, 8),
    "corrupt blob": (2, 0, 0),
    "corrupt stamp": (1, 0, 0),
    "corrupt message": (2, 0, 0),  # what is none, from somebody with good keys and from strangers
    "corrupt result": (1, 0, 0),  # results that lie, from somebody with good keys
}


@dataclass(frozen=True)
class Fault:
    at: float  # seconds since the beginning
    kind: str
    target: str  # a host
    seconds: float
    seed: int


def plan(
    seed: int,
    minutes: float,
    actors: Sequence[str],
    kinds: Sequence[str] = tuple(KINDS),
    engines: Sequence[str] = (),
) -> list[Fault]:
    """Faults in the order of time, all within the first 90 % of it. `engines`: the actors whose
    engine has processes of its own."""
    rng = random.Random(seed)
    last = 60.0 * minutes * (1 - QUIET)
    count = max(LEAST, round(last / GAP_S))
    faults, deck = [], list[str]()
    for i in range(count):
        deck = deck or _deck(rng, kinds)
        kind = deck.pop()
        at = (i + rng.random()) * last / count
        _, shortest, longest = KINDS[kind]
        target = _target(rng, kind, (kind.endswith("engine") and engines) or actors)
        faults.append(
            Fault(at, kind, target, rng.uniform(shortest, longest), rng.randrange(1 << 30))
        )
    return faults


def _deck(rng: random.Random, kinds: Sequence[str]) -> list[str]:
    deck = [kind for kind in kinds for _ in range(KINDS[kind][0])]
    rng.shuffle(deck)
    return deck


def _target(rng: random.Random, kind: str, actors: Sequence[str]) -> str:
    actor = rng.choice(actors)
    if kind.endswith("rank"):
        return "learner"
    if kind in ("cut", "slow"):
        return rng.choice([actor, actor, "learner", "redis"])
    _, _, whom = kind.partition(" ")
    return whom if whom in ("learner", "redis") else actor
