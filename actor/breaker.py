"""Whom not to ask for a while: a voice that is down would cost every episode its whole deadline.

    asked ─▶ FAILURES in a row ─▶ paused ─▶ one question ─▶ answered: asked as before
                                    ▲             └───────▶ not: twice as long, MOST_S at most
                                    └────────────────────────────┘

Times are `time.monotonic()` seconds given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

FAILURES = 3  # in a row
PAUSE_S = 1.0  # the first pause
MOST_S = 60.0


@dataclass(slots=True)
class Breaker:
    """Of one voice."""

    pause_s: float = 0.0  # of the pause there is, 0: there is none
    _failures: int = 0  # in a row
    _since: float = 0.0  # when the pause began
    _next: float = 0.0  # when somebody may ask again

    def allows(self, now: float, deadline_s: float) -> bool:
        """Whether to ask at `now`. In a pause whoever is allowed to is alone until its deadline:
        nothing has to be given back, should it be cancelled.
        """
        if not self.pause_s:
            return True
        if now < self._next:
            return False
        self._next = now + max(deadline_s, self.pause_s)
        return True

    def worked(self) -> bool:
        """There was an answer; True when that ends a pause."""
        over, self.pause_s, self._failures = self.pause_s > 0, 0.0, 0
        return over

    def failed(self, asked: float, now: float) -> bool:
        """There was none to what was asked at `asked`; True when a pause begins. Those that were
        under way when it began make it no longer.
        """
        self._failures += 1
        if self._failures < FAILURES or (self.pause_s and asked < self._since):
            return False
        self.pause_s = min(2 * self.pause_s, MOST_S) or PAUSE_S
        self._since, self._next = now, now + self.pause_s
        return True
