"""An engine that outlives engines: one that breaks is closed, and another takes its place.

To whoever asks it, it is one engine with one history: the new one is brought to the last weights
that the old one took before anybody may ask it, so what was said of its version stays true, and
counters go on. In between there is no engine (`stats().up` is False): what was in flight has raised
EngineError, what is asked raises EngineAway, `update_weights` waits.

    watch()   serving ──▶ broken ──▶ close ──▶ make, in a thread ──▶ reload the weights ┐
                 ▲                                                                      │
                 └──────────────────────────────────────────────────────────────────────┘

An engine is broken when its `watch` says so, when it fails while it takes weights (they may be half
of one version and half of another), and when `FAILURES` calls in a row fail. Every wait ends:
closing after `CLOSE_S`, starting and reloading after `start_s` each, all of it when `watch` is
cancelled; `update_weights` with the next engine, or when there will be none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import numpy as np

from actor.engine.base import Engine, EngineStats, Sample
from actor.engine.start import CLOSE_S, close, made
from common.errors import EngineAway, EngineError, IsentropeError
from common.versions import Weights
from common.wire import Sampling

log = logging.getLogger(__name__)

FAILURES = 3  # calls in a row: the engine is broken, whatever it says
WITHIN_S = 3600.0  # restarts are counted over this time
BACK_OFF_S = 0.5  # more before each restart of that time


class RestartingEngine:
    """One engine after another. `make` blocks and may take a minute; `restarts` are within
    `within_s`.

    The last weights are kept for the next engine: a copy of what is trained, in this machine's
    memory.
    """

    vocab_size: int
    max_length: int
    slots: int

    def __init__(
        self,
        make: Callable[[], Engine],
        restarts: int,
        start_s: float,
        close_s: float = CLOSE_S,
        within_s: float = WITHIN_S,
    ) -> None:
        self._make, self._budget, self._within_s = make, restarts, within_s
        self._start_s, self._close_s = start_s, close_s
        self._life: _Life | None = None
        self._weights: Weights | None = None
        self._settled = asyncio.Event()  # there is an engine, or there will be none
        self._over = ""  # why there will be none
        self._tried: deque[float] = deque()  # when engines were made again, within `WITHIN_S`
        self._restarts = 0
        self._trouble = ""  # what the last engine broke of
        self._past = _Totals()  # of the engines before this one

    async def start(self) -> None:
        """The first engine. Raises what `make` raises, and EngineError past the deadline."""
        self._serve(await made(self._make, self._start_s))

    async def generate(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        *,
        first: int = 0,
        deadline: float | None = None,
    ) -> Sequence[Sample]:
        life = self._living()
        try:
            async with life.call() as engine:
                got = await engine.generate(prefix, n, sampling, first=first, deadline=deadline)
        except EngineError as error:
            life.failures += 1
            if life.failures >= FAILURES:
                life.breaks(f"{FAILURES} calls in a row failed, the last one: {error}")
            raise
        life.failures = 0
        return got

    async def update_weights(self, weights: Weights) -> None:
        await self._settled.wait()
        life = self._living()
        try:
            async with life.call() as engine:
                await engine.update_weights(weights)
        except EngineError as error:
            life.breaks(f"it failed to take version {weights.version}: {error}")
            raise
        self._weights = weights

    def stats(self) -> EngineStats:
        life, totals, now = self._life, self._past, _NOTHING
        if life is not None:
            now = life.engine.stats()
            totals = totals.plus(now)
        if life is None or life.why:
            now = _NOTHING
        sums = totals._asdict()
        return now._replace(**sums, restarts=self._restarts, trouble=self._trouble)

    async def watch(self) -> None:
        """Keeps an engine serving, for as long as it runs. Raises EngineError, with the last cause,
        when the restarts are spent."""
        while (life := self._life) is not None:
            why = await _broken(life)
            self._trouble = why
            log.error("the engine broke: %s", why)
            await self._bury(why)
            await self._replace(why)
        raise EngineError(self._over)

    async def close(self) -> None:
        self._end("the engine is closed")
        await self._bury("the engine is closed")

    # -- from one engine to the next ---------------------------------------------------------------

    def _living(self) -> _Life:
        life = self._life
        if life is None or life.why:
            raise EngineAway(self._over or "the engine broke and is made again")
        return life

    def _serve(self, engine: Engine) -> None:
        self.vocab_size, self.max_length = engine.vocab_size, engine.max_length
        self.slots = engine.slots
        self._life = _Life(engine)
        self._settled.set()

    async def _bury(self, why: str) -> None:
        life, self._life = self._life, None
        if life is None:
            return
        if not self._over:
            self._settled.clear()
        life.breaks(why)
        self._past = self._past.plus(life.engine.stats())
        await close(life.engine, self._close_s)

    async def _replace(self, why: str) -> None:
        """Raises EngineError: the restarts are spent."""
        while True:
            self._spend(why)
            await asyncio.sleep(BACK_OFF_S * (len(self._tried) - 1))
            began = time.monotonic()
            try:
                engine = await made(self._make, self._start_s)
                await self._reload(engine)
            except IsentropeError as error:
                log.error("the engine did not start again: %s", error)
                self._trouble = why = f"it did not start again: {error}"
            else:
                self._restarts += 1
                self._serve(engine)
                said = "another engine serves after %.1f s (restart %d)"
                log.warning(said, time.monotonic() - began, self._restarts)
                return

    def _spend(self, why: str) -> None:
        """One restart of the budget; raises EngineError when there is none left."""
        now = time.monotonic()
        while self._tried and self._tried[0] < now - self._within_s:
            self._tried.popleft()
        if len(self._tried) >= self._budget:
            self._end(
                f"the engine broke for good: its restarts within an hour ({self._budget}) are "
                f"spent, see actor.engine_restarts; the last cause: {why}"
            )
            raise EngineError(self._over)
        self._tried.append(now)

    async def _reload(self, engine: Engine) -> None:
        """Bring a new engine to where the one before it was; it is closed when it cannot."""
        try:
            if self._weights is not None:
                async with asyncio.timeout(self._start_s):
                    await engine.update_weights(self._weights)
        except TimeoutError:
            await close(engine, self._close_s)
            raise EngineError(f"it did not take its weights within {self._start_s:g} s") from None
        except (IsentropeError, asyncio.CancelledError):
            await close(engine, self._close_s)
            raise

    def _end(self, why: str) -> None:
        self._over = self._over or why
        self._settled.set()


_NOTHING = EngineStats(0.0, 0, 0, 0.0, -1, 0.0, 0.0, 0, up=False)


class _Totals(NamedTuple):
    """What goes on counting over all engines."""

    pause_s: float = 0.0
    tokens: int = 0
    preemptions: int = 0

    def plus(self, stats: EngineStats) -> _Totals:
        return _Totals(
            self.pause_s + stats.pause_s,
            self.tokens + stats.tokens,
            self.preemptions + stats.preemptions,
        )


class _Life:
    """One engine, from when it serves until it breaks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failures = 0  # in a row
        self.why = ""  # it is broken
        self._calls: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[Engine]:
        """Ask the engine; what waits for it raises EngineError as soon as it is broken."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._calls.add(limit)
                yield self.engine
        except TimeoutError:
            if not limit.expired():
                raise
            raise EngineError(self.why) from None
        finally:
            self._calls.discard(limit)

    def breaks(self, why: str) -> None:
        if not self.why:
            self.why = why
            now = asyncio.get_running_loop().time()
            for limit in self._calls:
                limit.reschedule(now)


async def _broken(life: _Life) -> str:
    """Why it broke: waits for that."""
    if life.why:
        return life.why
    try:
        async with life.call() as engine:
            await engine.watch()
    except EngineError as error:
        return str(error)
    return "it watches itself no longer"
