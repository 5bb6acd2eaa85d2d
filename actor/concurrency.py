"""How many tickets the engine can take: a window that follows what the engine says of itself.

    room, and all of it used        one ticket more            (additive increase)
    the KV cache is too small       `SHRINK` of the window     (multiplicative decrease)

It starts fully open, at the tickets that fill the slots and a few more, for most engines can take
that. "Too small" means: sequences lost their place in the cache, or some wait although slots are
free, while the cache is nearly full or the queue does not get shorter. Sequences that wait since
every slot is taken are no sign of anything: that is what is meant to happen. After a decrease the
window rests until the tickets in hand are as few as it allows, as the engine could not show any
effect before. The rule is that of TCP's congestion window (Chiu and Jain, 1989: additive increase
and multiplicative decrease converge on what all can have).

Pure: a function of the window before and of what was seen since. Whoever calls chooses the rhythm.
"""

from __future__ import annotations

from typing import NamedTuple

from actor.engine.base import EngineStats

SHRINK = 0.7
ROOM = 0.9  # share of the KV cache above which nothing is added
NEARLY_FULL = 0.95
PATIENCE = 3  # looks in a row at a queue that does not get shorter; one less at a full cache


class Window(NamedTuple):
    """`size` of `ceiling` tickets, and what it was last judged by."""

    size: float
    ceiling: int
    why: str = ""  # it last moved
    preemptions: int = 0
    waiting: int = 0
    stuck: int = 0  # looks in a row at sequences that wait beside free slots

    @property
    def tickets(self) -> int:
        return max(1, int(self.size + 1e-9))  # 0.7 × 10 / 10 × 10 is 7


def ceiling(slots: int, n: int, prefetch: int) -> int:
    """Tickets of `n` rollouts that fill the slots, and a few more so that no slot waits for the
    learner."""
    return max(1, slots // n) + prefetch


def resized(window: Window, ceiling: int) -> Window:
    """The same share of another ceiling: tickets have another number of rollouts."""
    if ceiling == window.ceiling:
        return window
    size = max(1.0, window.size * ceiling / window.ceiling)
    return window._replace(size=size, ceiling=ceiling)


def adapted(window: Window, stats: EngineStats, slots: int, held: int) -> Window:
    """The window after a look at the engine, with `held` tickets in hand."""
    if not stats.up:
        return window._replace(waiting=0, stuck=0)
    full = stats.running >= slots
    squeezed = stats.waiting > 0 and not full
    stuck = window.stuck + 1 if squeezed and stats.waiting >= window.waiting else 0
    lost = stats.preemptions - window.preemptions
    seen = window._replace(preemptions=stats.preemptions, waiting=stats.waiting, stuck=stuck)
    why = _too_much(stats, lost, stuck)
    if why and held <= window.tickets:
        return _moved(seen._replace(stuck=0), window.size * SHRINK, f"smaller: {why}")
    room = not why and not squeezed and (full or stats.kv_use < ROOM)
    if room and held >= window.tickets and window.size < window.ceiling:
        return _moved(seen, window.size + 1, "larger: the engine has room")
    return seen


def _too_much(stats: EngineStats, lost: int, stuck: int) -> str:
    """Why the engine has too much to do; "" when it has not."""
    if lost > 0:
        return f"{lost} sequences lost their place in the KV cache"
    if stuck >= PATIENCE - 1 and stats.kv_use >= NEARLY_FULL:
        return f"KV cache at {100 * stats.kv_use:.0f} %, {stats.waiting} sequences wait"
    if stuck >= PATIENCE:
        return f"{stats.waiting} sequences wait beside free slots"
    return ""


def _moved(window: Window, size: float, why: str) -> Window:
    size = min(float(window.ceiling), max(1.0, size))
    return window._replace(size=size, why=why) if size != window.size else window
