"""An engine without a model: tokens and log-probs out of a hash, latencies out of a clock.

It ships: tests, chaos runs and simulations of a thousand actors use it where a model would only
cost time. What it samples is a pure function of (seed, rollout, position, version); how long a
continuation becomes, of (seed, rollout). When each token comes follows from the model of time, so
which version a token is from depends on when a swap came, as it does in a real engine. One
continuation costs one sleep, whatever its length.

It fails as engines do, when it is told to: it does not start, dies, hangs, or has a cache that is
too small for what it is asked (places.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import numpy as np

from actor.config import ScriptedConfig
from actor.engine import noise
from actor.engine.base import EngineStats, Sample
from actor.engine.meter import Meter
from actor.engine.places import Place, Places
from actor.engine.request import Spans, check, closed, empty_sample
from common.errors import EngineError
from common.versions import Weights
from common.wire import Finish, Sampling

_LENGTH = np.uint64(0xA5A5A5A5A5A5A5A5)  # lengths and log-probs come from streams of their own
_LOGP = np.uint64(0x3C3C3C3C3C3C3C3C)
_MAX_LENGTH = 1 << 16


class ScriptedEngine:
    def __init__(
        self, config: ScriptedConfig, *, slots: int, max_length: int = 0, hang_s: float = 60.0
    ) -> None:
        """Takes `startup_s`, as loading a model would. Raises EngineError when told to fail.

        An engine that hangs says so after `hang_s`.
        """
        time.sleep(config.startup_s)
        if config.fails_to_start:
            raise EngineError("the scripted engine did not start (actor.scripted.fails_to_start)")
        self.vocab_size, self.slots = config.vocab_size, slots
        self.max_length = max_length or _MAX_LENGTH
        self._config, self._hang_s = config, hang_s
        self._places = Places(slots, config.kv_tokens, config.tokens_per_s)
        self._version = 0
        self._calls: set[asyncio.Future[list[Sample]]] = set()
        self._hangs = False
        self._over = asyncio.Event()
        self._why = ""
        self._meter = Meter()
        self._tokens = 0
        self._busy_since = 0.0

    async def generate(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        *,
        first: int = 0,
        deadline: float | None = None,
    ) -> Sequence[Sample]:
        limit = check(prefix, n, sampling, self.vocab_size, self.max_length)
        await self._answering()
        loop = asyncio.get_running_loop()
        ends_at = math.inf if deadline is None else loop.time() + deadline - time.monotonic()
        keys = noise.keys(sampling.seed, np.arange(first, first + n))
        call = asyncio.gather(
            *(
                self._continue(keys[i : i + 1], prefix.size, sampling, limit, ends_at)
                for i in range(n)
            )
        )
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._over.is_set() and task is not None and not task.cancelling():
                # the engine's end cancelled the continuations, nobody cancelled the caller
                raise EngineError(self._why) from None
            raise
        finally:
            self._calls.discard(call)

    async def update_weights(self, weights: Weights) -> None:
        """Any tensors will do: only the number is served."""
        await self._answering()
        self._version = weights.version
        self._places.swap(weights.version)

    def stats(self) -> EngineStats:
        tokens_per_s, busy = self._meter.rates()
        return EngineStats(
            tokens_per_s=tokens_per_s,
            running=len(self._places.running),
            waiting=self._places.waiting,
            kv_use=self._places.use(),
            version=self._version,
            busy=busy,
            pause_s=0.0,
            tokens=self._tokens,
            preemptions=self._places.preemptions,
        )

    async def watch(self) -> None:
        await self._over.wait()
        raise EngineError(self._why)

    async def close(self) -> None:
        self._end("the engine is closed")

    def _end(self, why: str) -> None:
        self._why = self._why or why
        self._over.set()
        for call in self._calls:
            call.cancel()

    async def _answering(self) -> None:
        """Whoever asks an engine that hangs waits until somebody ends it. Raises EngineError."""
        if self._hangs:
            await self._over.wait()
        if self._over.is_set():
            raise EngineError(self._why)

    async def _continue(
        self, key: np.ndarray, prefix: int, sampling: Sampling, limit: int, ends_at: float
    ) -> Sample:
        """Hold a place for as long as the continuation takes, or until its deadline."""
        size, finish = self._outcome(key, sampling, limit)
        place, places, clock = Place(prefix), self._places, asyncio.get_running_loop().time
        try:
            while await self._take(place, ends_at):
                if await places.decode(place, size, ends_at):
                    break
            await self._answering()
            if places.falls_short(place, size, ends_at):
                size, finish = min(size, places.sampled(place, ends_at)), "aborted"
        finally:
            places.leave(place)
        if not place.spans:
            return empty_sample(self._version)
        self._count(size, clock())
        return self._sample(key, prefix, sampling, size, finish, place.spans)

    async def _take(self, place: Place, ends_at: float) -> bool:
        taken = await self._places.take(place, ends_at)
        if taken and len(self._places.running) == 1:
            self._busy_since = asyncio.get_running_loop().time()
        return taken

    def _outcome(self, key: np.ndarray, sampling: Sampling, limit: int) -> tuple[int, Finish]:
        """Log-normal length with the configured mean; without a stop token only the limit ends a
        continuation."""
        radius, angle = noise.uniform(key ^ _LENGTH, np.arange(2))
        normal = math.sqrt(-2.0 * math.log1p(-radius)) * math.cos(2.0 * math.pi * angle)
        sigma = self._config.length_sigma
        size = max(1, round(self._config.length_mean * math.exp(sigma * normal - sigma**2 / 2)))
        return (size, "stop") if sampling.stop and size <= limit else (limit, "length")

    def _sample(
        self,
        key: np.ndarray,
        prefix: int,
        sampling: Sampling,
        size: int,
        finish: Finish,
        spans: Spans,
    ) -> Sample:
        kept = closed(spans, size)
        starts = np.array([start for start, _ in kept])
        versions = np.array([version for _, version in kept], np.uint64)
        stream = noise.mix(key ^ noise.mix(versions))[
            np.searchsorted(starts, np.arange(size), side="right") - 1
        ]
        position = np.arange(prefix, prefix + size)
        words = np.setdiff1d(np.arange(self.vocab_size), sampling.stop)
        tokens = words[(noise.uniform(stream, position) * len(words)).astype(np.int64)].astype(
            np.int32
        )
        if finish == "stop":
            tokens[-1] = sampling.stop[0]
        logps = (-2.0 * noise.uniform(stream ^ _LOGP, position)).astype(np.float32)
        return Sample(tokens, logps, kept, finish)

    def _count(self, tokens: int, now: float) -> None:
        self._tokens += tokens
        self._meter.count(tokens, now - self._busy_since)
        self._busy_since = now
        config = self._config
        if 0 < config.dies_after_tokens <= self._tokens:
            self._end(f"the scripted engine died after {self._tokens} tokens, as it was told to")
        elif 0 < config.hangs_after_tokens <= self._tokens and not self._hangs:
            self._hangs = True
            why = f"the scripted engine gave no token for {self._hang_s:g} s"
            asyncio.get_running_loop().call_later(self._hang_s, self._end, why)
