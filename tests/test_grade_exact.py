"""The exact grader, on its examples."""

from __future__ import annotations

import pytest

from actor.grade.exact import exact


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
    ],
)
def test_only_the_text_after_the_last_marker_is_compared(
    text: str, gold: str, after: str, reward: float
) -> None:
    assert exact(text, gold, after) == reward


def test_an_empty_text_answers_an_empty_gold() -> None:
    assert exact("", "") == 1.0
