"""Reward 1 for exactly the right answer, else 0."""

from __future__ import annotations


def exact(text: str, gold: str, after: str = "") -> float:
    """1.0 if what follows the last `after` in `text` is `gold`, spaces at both ends apart.

    Without `after` the whole text is the answer; a text that lacks `after` has no answer.

    Example: `exact("12+7=19#19", "19", after="#") == 1.0`
    """
    if after not in text:
        return 0.0
    answer = text.rsplit(after, 1)[-1] if after else text
    return float(answer.strip() == gold)
