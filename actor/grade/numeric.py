"""Reward 1 for the right number, within a tolerance."""

from __future__ import annotations

import math

from actor.grade.extract import last_number, value_of
from common.errors import DataError
from common.grading import Extraction, Numeric


def judge(gold: str, answer: str, options: Extraction, columns: bytes) -> float:
    """1.0 if |answer - gold| <= max(absolute, relative · |gold|).

    Raises DataError when the gold answer is not a number: no answer could be judged by it.
    """
    assert isinstance(options, Numeric)
    wanted = value_of(last_number(gold) or "")
    if wanted is None or not math.isfinite(wanted):
        raise DataError(f"the gold answer {gold!r:.60} is not a number: use grader exact")
    value = value_of(answer)
    if value is None or not math.isfinite(value):
        return 0.0
    return float(abs(value - wanted) <= max(options.absolute, options.relative * abs(wanted)))
