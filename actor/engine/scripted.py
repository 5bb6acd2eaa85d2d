"""An engine without a model: tokens and log-probs out of a hash, latencies out of a clock.

It ships: tests, chaos runs and simulations of a thousand actors use it where a model would only
cost time. What it samples is a pure function of (seed, rollout, position, version); how long a
continuation becomes, of (seed, rollout). When each token comes follows from the model of time, so
which version a token is from depends on when a swap came, as it does in a real engine. One
continuation costs one sleep, whatever its length.
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
from actor.engine.request import Spans, check, closed, empty_sample, mark_swap
from common.errors import EngineError
from common.versions import Weights
from common.wire import Finish, Sampling

_LENGTH = np.uint64(0xA5A5A5A5A5A5A5A5)  # lengths and log-probs come from streams of their own
_LOGP = np.uint64(0x3C3C3C3C3C3C3C3C)
_MAX_LENGTH = 1 << 16


class _Running:
    """A continuation that has a slot: since when (loop time), and which versions its tokens come
    from."""

    def __init__(self, started: float, version: int) -> None:
        self.started = started
        self.spans: Spans = [(0, version)]


class ScriptedEngine:
    def __init__(self, config: ScriptedConfig, *, slots: int, max_length: int = 0) -> None:
        self.vocab_size, self.slots = config.vocab_size, slots
        self.max_length = max_length or _MAX_LENGTH
        self._config = config
        self._free = asyncio.Semaphore(slots)
        self._version = 0
        self._ready_at: float | None = None  # loop time; startup counts from the first call
        self._running: set[_Running] = set()
        self._waiting = 0
        self._calls: set[asyncio.Future[list[Sample]]] = set()
        self._closed: EngineError | None = None
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
        if self._closed is not None:
            raise self._closed
        loop = asyncio.get_running_loop()
        if self._ready_at is None:
            self._ready_at = loop.time() + self._config.startup_s
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
            if self._closed is not None and task is not None and not task.cancelling():
                # close() cancelled the continuations, nobody cancelled the caller
                raise self._closed from None
            raise
        finally:
            self._calls.discard(call)

    async def update_weights(self, weights: Weights) -> None:
        """Any tensors will do: only the number is served."""
        if self._closed is not None:
            raise self._closed
        self._version = weights.version
        now = asyncio.get_running_loop().time()
        for running in self._running:
            mark_swap(running.spans, self._sampled(running, now), weights.version)

    def stats(self) -> EngineStats:
        tokens_per_s, busy = self._meter.rates()
        return EngineStats(
            tokens_per_s=tokens_per_s,
            running=len(self._running),
            waiting=self._waiting,
            kv_use=len(self._running) / self.slots,
            version=self._version,
            busy=busy,
            pause_s=0.0,
            tokens=self._tokens,
        )

    async def close(self) -> None:
        self._closed = self._closed or EngineError("the engine is closed")
        for call in self._calls:
            call.cancel()

    async def _continue(
        self, key: np.ndarray, prefix: int, sampling: Sampling, limit: int, ends_at: float
    ) -> Sample:
        self._waiting += 1
        try:
            async with asyncio.timeout_at(None if ends_at == math.inf else ends_at):
                await self._free.acquire()
        except TimeoutError:
            return empty_sample(self._version)
        finally:
            self._waiting -= 1
        try:
            return await self._decode(key, prefix, sampling, limit, ends_at)
        finally:
            self._free.release()

    async def _decode(
        self, key: np.ndarray, prefix: int, sampling: Sampling, limit: int, ends_at: float
    ) -> Sample:
        """Hold a slot for as long as the continuation takes, or until its deadline."""
        clock = asyncio.get_running_loop().time
        size, finish = self._outcome(key, sampling, limit)
        running = _Running(max(clock(), self._ready_at or 0.0), self._version)
        if not self._running:
            self._busy_since = clock()
        self._running.add(running)
        try:
            finished_at = running.started + size / self._config.tokens_per_s
            await asyncio.sleep(min(finished_at, ends_at) - clock())
        finally:
            self._running.discard(running)
        if ends_at < finished_at:
            size, finish = min(size, self._sampled(running, ends_at)), "aborted"
        self._count(size, clock())
        return self._sample(key, prefix, sampling, size, finish, running.spans)

    def _outcome(self, key: np.ndarray, sampling: Sampling, limit: int) -> tuple[int, Finish]:
        """Log-normal length with the configured mean; without a stop token only the limit ends a
        continuation."""
        radius, angle = noise.uniform(key ^ _LENGTH, np.arange(2))
        normal = math.sqrt(-2.0 * math.log1p(-radius)) * math.cos(2.0 * math.pi * angle)
        sigma = self._config.length_sigma
        size = max(1, round(self._config.length_mean * math.exp(sigma * normal - sigma**2 / 2)))
        return (size, "stop") if sampling.stop and size <= limit else (limit, "length")

    def _sampled(self, running: _Running, now: float) -> int:
        return max(0, math.floor((now - running.started) * self._config.tokens_per_s))

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
