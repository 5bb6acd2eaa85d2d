"""`exact` and `numeric`, which are graded in place, on their examples."""

from __future__ import annotations

from typing import Any

import pytest

from actor.grade.graders import call
from common.errors import DataError


def grade(name: str, text: str, gold: str, **options: Any) -> float | None:
    (score,) = call(name, "?", [text], gold, {}, options)
    return score


@pytest.mark.parametrize(
    ("text", "gold", "after", "reward"),
    [
        ("49", "49", "", 1.0),
        (" 49\n", "49", "", 1.0),
        ("the answer is 49", "49", "", 0.0),
        ("12+7=19,19+30=49#49", "49", "#", 1.0),
        ("#12#49", "49", "#", 1.0),
        ("#49#12", "49", "#", 0.0),
        ("#49#", "49", "#", 0.0),
        ("# 49 ", "49", "#", 1.0),
        ("49", "49", "#", 0.0),
        ("", "49", "#", 0.0),
        ("#049", "49", "#", 0.0),
        ("so Answer: yes", "yes", "Answer:", 1.0),
        ("", "", "", 1.0),
    ],
)
def test_only_the_text_after_the_last_marker_is_compared(
    text: str, gold: str, after: str, reward: float
) -> None:
    assert grade("exact", text, gold, after=after) == reward


@pytest.mark.parametrize(
    ("text", "gold", "options", "reward"),
    [
        ("it is 49", "49", {}, 1.0),
        ("it is 49.0", "49", {}, 1.0),
        ("12, no: 1,049", "1049", {}, 1.0),
        ("49 or 50", "49", {}, 0.0),
        ("0.3333", "1/3", {}, 0.0),
        ("0.3333", "1/3", {"relative": 1e-3}, 1.0),
        ("1.05", "1", {"absolute": 0.1}, 1.0),
        ("-5", "5", {}, 0.0),
        ("five", "5", {}, 0.0),
        ("1e999", "5", {}, 0.0),
        ("so #### 72 and 3", "#### 72", {"after": "####", "take": "whole"}, 0.0),
        ("so #### 72", "#### 72", {"after": "####"}, 1.0),
    ],
)
def test_a_number_is_right_within_the_tolerance(
    text: str, gold: str, options: dict[str, Any], reward: float
) -> None:
    assert grade("numeric", text, gold, **options) == reward


def test_a_gold_answer_that_is_no_number_is_an_error_never_0() -> None:
    with pytest.raises(DataError, match="the gold answer 'north' is not a number"):
        grade("numeric", "3", "north")
