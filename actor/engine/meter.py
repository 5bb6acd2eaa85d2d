"""What an engine did lately: tokens a second and the busy share, over a sliding window."""

from __future__ import annotations

import time
from collections import deque

WINDOW_S = 5.0


class Meter:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._recent: deque[tuple[float, int, float]] = deque()  # (end, tokens, seconds at work)

    def count(self, tokens: int, busy_s: float) -> None:
        self._recent.append((time.monotonic(), tokens, busy_s))
        self._trim()

    def rates(self) -> tuple[float, float]:
        """(tokens a second, share of time at work) over the last seconds."""
        self._trim()
        seconds = max(1e-6, min(WINDOW_S, time.monotonic() - self._started))
        busy_s = sum(busy for _, _, busy in self._recent)
        return sum(tokens for _, tokens, _ in self._recent) / seconds, min(1.0, busy_s / seconds)

    def _trim(self) -> None:
        oldest = time.monotonic() - WINDOW_S
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()
