"""A fair coin in place of a judgement, for the scripted engine, whose texts mean nothing.

The coin is a pure function of the text, so that a run can be graded again.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def coin(completions: Sequence[str]) -> list[float]:
    """1 or 0 a text, evenly."""
    return [float(zlib.crc32(text.encode()) & 1) for text in completions]
