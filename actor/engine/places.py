"""Who decodes in the scripted engine: slots, and a KV cache of so many tokens.

A continuation holds its prefix and what it has sampled. When the cache is full the one that came
last loses its place and waits in front of all others; it comes back with its tokens, which are
computed again at `REDO_SPEED` times the speed of sampling. That is what vLLM does (preemption by
recomputation). Nothing here polls: with every arrival and departure the moment at which the cache
will be full is set anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque

from actor.engine.request import Spans, mark_swap

REDO_SPEED = 10.0  # prefill speed / decode speed


class Place:
    """A continuation: since when it decodes (loop time), which versions its tokens come from."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self.started = 0.0  # such that its tokens so far are (now - started) × tokens a second
        self.done = 0  # tokens that it had when it lost its place
        self.spans: Spans = []
        self.lost = asyncio.Event()  # it has no place
        self.lost.set()


class Places:
    def __init__(self, slots: int, kv_tokens: int, tokens_per_s: float) -> None:
        self.running: dict[Place, None] = {}  # the last one came last
        self.preemptions = 0
        self._slots, self._kv_tokens, self._tokens_per_s = slots, kv_tokens, tokens_per_s
        self._queue: deque[tuple[Place, asyncio.Future[None]]] = deque()
        self._full: asyncio.TimerHandle | None = None
        self._version = 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def use(self) -> float:
        """Share of the cache, 0…1; of the slots, when the cache has no limit."""
        if not self._kv_tokens:
            return len(self.running) / self._slots
        return min(1.0, self._used() / self._kv_tokens)

    def sampled(self, place: Place, now: float) -> int:
        if place.lost.is_set():
            return place.done
        return max(place.done, math.floor((now - place.started) * self._tokens_per_s))

    def falls_short(self, place: Place, size: int, until: float) -> bool:
        """Whether `until` (loop time) comes before its token number `size`."""
        return place.lost.is_set() or until < place.started + size / self._tokens_per_s

    def swap(self, version: int) -> None:
        """Tokens come from `version` from here on, those of waiting continuations too."""
        self._version = version
        now = asyncio.get_running_loop().time()
        for place in self.running:
            mark_swap(place.spans, self.sampled(place, now), version)

    async def take(self, place: Place, until: float) -> bool:
        """Wait for a slot and room; False when `until` (loop time) came first."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (place, turn)
        if place.done:
            self._queue.appendleft(entry)
        else:
            self._queue.append(entry)
        self._admit()
        try:
            async with asyncio.timeout_at(None if until == math.inf else until):
                await turn
        except TimeoutError:
            return False
        finally:
            if turn.cancelled():
                with contextlib.suppress(ValueError):
                    self._queue.remove(entry)
                self._admit()
        return True

    async def decode(self, place: Place, size: int, until: float) -> bool:
        """Until `place` has `size` tokens, or `until` (loop time); False when it lost its place."""
        loop = asyncio.get_running_loop()
        ends_at = min(place.started + size / self._tokens_per_s, until)
        if not self._kv_tokens:
            await asyncio.sleep(ends_at - loop.time())
            return True
        try:
            async with asyncio.timeout_at(ends_at):
                await place.lost.wait()
        except TimeoutError:
            return True
        return False

    def leave(self, place: Place) -> None:
        if place in self.running:
            del self.running[place]
            self._admit()

    def _admit(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue and len(self.running) < self._slots:
            place, turn = self._queue[0]
            if not (self._fits(place) or turn.cancelled()):
                break
            self._queue.popleft()
            if not turn.cancelled():
                self._start(place, loop.time())
                turn.set_result(None)
        self._expect_full(loop)

    def _start(self, place: Place, now: float) -> None:
        redo_s = place.done / (REDO_SPEED * self._tokens_per_s)
        place.started = now + redo_s - place.done / self._tokens_per_s
        place.lost.clear()
        mark_swap(place.spans, place.done, self._version)
        self.running[place] = None

    def _fits(self, place: Place) -> bool:
        """With a token to come for each that runs; whoever is alone always fits."""
        if not self._kv_tokens or not self.running:
            return True
        need = place.prefix + place.done + len(self.running) + 1
        return self._used() + need <= self._kv_tokens

    def _used(self) -> int:
        now = asyncio.get_running_loop().time()
        return sum(place.prefix + self.sampled(place, now) for place in self.running)

    def _expect_full(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._full is not None:
            self._full.cancel()
            self._full = None
        if self._kv_tokens and len(self.running) > 1:
            room = max(1, self._kv_tokens - self._used())
            seconds = room / (len(self.running) * self._tokens_per_s)
            self._full = loop.call_later(seconds, self._preempt)

    def _preempt(self) -> None:
        """The cache is full: who came last goes."""
        loop = asyncio.get_running_loop()
        while len(self.running) > 1 and self._used() >= self._kv_tokens:
            place = next(reversed(self.running))
            place.done = self.sampled(place, loop.time())
            place.lost.set()
            del self.running[place]
            self.preemptions += 1
        self._admit()
