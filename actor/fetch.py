"""Weight versions: notice, pull, verify, swap in. The engine serves the old ones meanwhile.

The registry in Redis is the truth and is asked every `poll_s`; a number in the learner's messages
only brings the next question forward. Bytes are pulled and checked in a thread, before the engine
is bothered. Whatever goes wrong (Redis away, a cut or foreign version, an engine that breaks) is
counted and tried again, and the version before it goes on being served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter

from actor.engine.base import Engine
from common import patch, pull, stores
from common.config import RunConfig
from common.errors import DeadlineError, EngineError, WeightsError
from common.receive import Unfinished
from common.versions import Registry, Stamp, Weights
from common.wire import Pulse, Welcome

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0  # of one question to Redis
RETRY_S = 5.0  # at most so long until what failed is tried again


class Fetcher:
    """`version` is what the engine serves and the registry has vouched for; -1 before the first."""

    def __init__(self, run: RunConfig, engine: Engine, poll_s: float) -> None:
        self.version, self.digest = -1, ""
        self.registry: Registry | None = None  # of the run that the learner named
        self.counts: Counter[str] = Counter()
        self.refused = 0  # versions, however often each was tried …
        self.refusal = ""  # … and what was wrong with the last one
        self._last_refused: Stamp | None = None
        self._run, self._engine, self._poll_s = run, engine, poll_s
        self._incarnation = 0  # highest seen, in messages and in the registry
        self._vouched = 0  # the one whose registry entry names what is served
        self._failures = 0  # in a row
        self._source: stores.Source | None = None  # of this run's blobs
        self._own: Weights | None = None  # what is served, for patches to be applied to
        self._unfinished = Unfinished()  # what came of a version before its pull broke
        self._hinted, self._last_hint = asyncio.Event(), -1
        self._served = asyncio.Condition()

    def hint(self, message: Welcome | Pulse) -> None:
        """The learner says which run and life it is, and what its newest version is."""
        if self.registry is None or self.registry.run_id != message.run:
            self.close()
            self.registry = Registry(self._run.redis, message.run, TIMEOUT_S)
            if self.registry.unguarded:
                log.warning("%s", self.registry.unguarded)
            self._source = stores.open_source(self._run, self.registry)
            self.version, self.digest, self._incarnation, self._vouched = -1, "", 0, 0
            self._own, self._unfinished = None, Unfinished()
            self._hinted.set()
        if message.incarnation > self._incarnation or message.version != self._last_hint:
            self._hinted.set()
        self._incarnation = max(self._incarnation, message.incarnation)
        self._last_hint = message.version

    async def reached(self, version: int, within_s: float) -> None:
        """Until the engine serves `version` or a newer one of the learner's present life. Raises
        DeadlineError."""
        try:
            async with asyncio.timeout(within_s), self._served:
                await self._served.wait_for(
                    lambda: self.version >= version and self._vouched >= self._incarnation
                )
        except TimeoutError:
            raise DeadlineError(
                f"waited {within_s:g} s for version {version}; the engine serves {self.version}"
            ) from None

    async def follow(self) -> None:
        """For ever: the newest version there is."""
        while True:
            pause_s = min(max(RETRY_S, self._poll_s), self._poll_s * 2 ** min(self._failures, 8))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._hinted.wait()
            self._hinted.clear()
            if self.registry is not None:
                await self._look(self.registry)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        if self.registry is not None:
            self.registry.close()

    async def _look(self, registry: Registry) -> None:
        """Ask once, and take what is new."""
        stamp: Stamp | None = None
        try:
            stamp = await asyncio.to_thread(registry.stamp)
            if stamp is not None and stamp.incarnation >= self._incarnation:
                self._incarnation = stamp.incarnation
                await self._take(registry, stamp)
        except DeadlineError as error:
            self._fail("redis_away", str(error))
        except WeightsError as error:
            self._refuse(stamp, str(error))
        except EngineError as error:
            self._fail("engine_away", str(error))
        else:
            self._failures = self.counts["weights_refused"] = 0

    async def _take(self, registry: Registry, stamp: Stamp) -> None:
        if (stamp.version, stamp.digest) != (self.version, self.digest):
            began = time.monotonic()
            assert self._source is not None, "it came with the registry"
            weights = await asyncio.to_thread(
                pull.fetch,
                registry,
                self._source,
                stamp.version,
                self._incarnation,
                own=self._own,
                unfinished=self._unfinished,
            )
            if registry is not self.registry:  # another run since
                return
            pulled = time.monotonic()
            await self._engine.update_weights(weights)
            self._own = weights if patch.fits(weights.tensors) else None
            self._count(weights, pulled - began, time.monotonic() - pulled)
        async with self._served:
            self._vouched = stamp.incarnation
            self._served.notify_all()

    def _count(self, weights: Weights, pull_s: float, swap_s: float) -> None:
        self.version, self.digest = weights.version, weights.digest
        self.counts["weights_fetched"] += 1
        said = "serving version %d (%s): pulled in %.3f s, swapped in %.3f s"
        log.info(said, weights.version, weights.digest[:8], pull_s, swap_s)

    def _refuse(self, stamp: Stamp | None, why: str) -> None:
        """Say which version it is, and what is served in its place."""
        if stamp is not None:
            name = f"version {stamp.version}"
            why = f"{name} refused: {why.removeprefix(name).lstrip(': ')}"
        if stamp is None or stamp != self._last_refused:
            self.refused, self._last_refused = self.refused + 1, stamp
        self.refusal = f"{why}; serving {self.version}"
        self._fail("weights_refused", why)

    def _fail(self, counter: str, why: str) -> None:
        self._failures += 1
        self.counts[counter] += 1
        said = "%s; version %d goes on being served (failure %d in a row)"
        log.warning(said, why, self.version, self._failures)
