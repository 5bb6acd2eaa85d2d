"""Reward 1 for exactly the right answer, else 0."""

from __future__ import annotations

from common.grading import Extraction


def judge(gold: str, answer: str, options: Extraction, columns: bytes) -> float:
    """1.0 if `answer` is `gold`, letter by letter, spaces at both ends of it apart."""
    return float(answer == gold)
