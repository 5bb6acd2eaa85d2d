"""Where an answer goes wrong, without anybody to ask: places to put a hint. Pure functions.

wrong      the final answer is wrong: behind the last token, before the one that stops
all_wrong  the same, where no answer of the group is right
repeat     the same `ngram` tokens for the `times`-th time: where they came for the second time
long       more than `long` tokens: there
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from common.episodes import Intervene


class Flaw(NamedTuple):
    name: str
    at: int  # tokens of the answer that stay


def first_flaw(tokens: np.ndarray, right: bool, any_right: bool, rule: Intervene) -> Flaw | None:
    """The earliest place that a trigger of `rule` names in an answer int32 [T] (its stop token left
    out), None where none does."""
    found: list[Flaw] = []
    if "wrong" in rule.triggers and not right:
        found.append(Flaw("wrong", tokens.size))
    if "all_wrong" in rule.triggers and not any_right and not right:
        found.append(Flaw("all_wrong", tokens.size))
    if "repeat" in rule.triggers and (at := repeated(tokens, rule.ngram, rule.times)) >= 0:
        found.append(Flaw("repeat", at))
    if "long" in rule.triggers and 0 < rule.long < tokens.size:
        found.append(Flaw("long", rule.long))
    return min(found, key=lambda flaw: flaw.at, default=None)


def repeated(tokens: np.ndarray, ngram: int, times: int) -> int:
    """Where the first run of `ngram` tokens that comes `times` times comes for the second time; -1
    where none does."""
    seen: defaultdict[bytes, list[int]] = defaultdict(list)
    for start in range(tokens.size - ngram + 1):
        places = seen[tokens[start : start + ngram].tobytes()]
        places.append(start)
        if len(places) == times:
            return places[1]
    return -1
