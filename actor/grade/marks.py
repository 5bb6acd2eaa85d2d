"""How well an answer keeps to its form: the share of the marks that stand in it exactly once.

Marks are counted one by one, so that they may overlap; without any the score is 1 (arXiv
2602.03190). What the prompt already began the answer with is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence


def score(text: str, marks: Sequence[str]) -> float:
    """From 0 to 1."""
    if not marks:
        return 1.0
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)
