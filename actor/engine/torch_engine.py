"""The embedded engine: continuous batching of a transformers model, on CPU or GPU.

    generate() ─▶ inbox ─▶ queue ─▶ a row of the batch ─▶ … a token a step … ─▶ sample ─▶ done
    update_weights() ─▶ staged beside the decoding ─▶ copied between two steps; rows, cache stay

The event loop owns requests and futures; everything else belongs to one worker thread, in hops of
some 20 ms. Between two hops `_drive` delivers what ended and hands over a staged swap. What is
waited for: `_drive` waits for `_wake` (generate, update_weights and close set it), generate for its
request, update_weights for its swap, watch for the end; all of them end when the engine closes or
breaks.

The same prefix under the same weights and seed samples the same tokens whatever runs beside it, as
far as matrix products of different batch sizes agree: their last bits may differ, so a draw within
about 1e-6 of the border between two tokens may come out either way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from actor.engine.base import EngineStats, Sample
from actor.engine.batch import Batch, rows_needed
from actor.engine.meter import Meter
from actor.engine.model import Model
from actor.engine.request import Request, check
from actor.engine.weights import Staged
from common.errors import EngineError
from common.versions import Weights
from common.wire import Sampling

_HOP_S = 0.02  # how long the worker decodes before the event loop hears of it


class TorchEngine:
    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        max_length: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int = 0,
        fused_decode: bool = True,
    ) -> None:
        """Load the model of `folder` (base version 0). Raises DataError when it cannot be
        served."""
        if threads:
            torch.set_num_threads(threads)
        self._model = Model(
            folder,
            rows=rows_needed(slots),
            length=max_length,
            device=torch.device(device),
            dtype=dtype,
            fused_decode=fused_decode,
        )
        self.vocab_size, self.max_length = self._model.vocab_size, self._model.length
        self.slots, self.fused_decode = slots, self._model.fused_decode
        self._batch = Batch(self._model, slots)
        self._alive: set[Request] = set()
        self._swap: tuple[Staged, asyncio.Future[None]] | None = None
        self._updating = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._broken: EngineError | None = None
        self._over = asyncio.Event()  # it is broken or closed
        self._meter = Meter()
        self._pause_s = 0.0
        self._pool = ThreadPoolExecutor(
            1, "decode", torch.set_num_threads, (torch.get_num_threads(),)
        )

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
        self._start()
        request = Request(prefix, n, sampling, first, deadline, limit)
        self._alive.add(request)
        self._batch.inbox.append(request)
        self._wake.set()
        try:
            return await request.done
        finally:
            self._alive.discard(request)
            request.cancelled = True
            self._wake.set()

    async def update_weights(self, weights: Weights) -> None:
        async with self._updating:
            self._start()
            staged = await asyncio.to_thread(
                Staged, weights, self._model.parameters, self._batch.trained
            )
            self._start()
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._swap = (staged, done)
            self._batch.interrupt = True
            self._wake.set()
            await done

    def stats(self) -> EngineStats:
        tokens_per_s, busy = self._meter.rates()
        rows = self._batch.rows
        used = int(rows.position[: rows.count].sum())
        return EngineStats(
            tokens_per_s=tokens_per_s,
            running=rows.count,
            waiting=sum(request.waiting for request in self._alive),
            kv_use=used / (self.slots * self.max_length),
            version=self._batch.version,
            busy=busy,
            pause_s=self._pause_s,
            tokens=self._batch.tokens,
        )

    async def watch(self) -> None:
        """Its worker raised, or its thread is gone: both end the drive task."""
        await self._over.wait()
        assert self._broken is not None
        raise self._broken

    async def close(self) -> None:
        self._broken = self._broken or EngineError("the engine is closed")
        self._over.set()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._fail_all(self._broken)
        self._pool.shutdown()

    @property
    def steps(self) -> int:
        """Decode steps so far, each one token for every running sequence."""
        return self._batch.steps

    def _start(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drive())
            self._task.add_done_callback(self._ended)

    async def _drive(self) -> None:
        run = asyncio.get_running_loop().run_in_executor
        while self._broken is None:
            if self._swap is not None:
                swap = staged, done = self._swap
                self._pause_s += await run(self._pool, self._batch.swap, staged)
                if self._swap is swap:  # else its caller was cancelled and another came
                    self._swap = None
                if not done.done():
                    done.set_result(None)
            elif not self._batch.idle:
                self._batch.interrupt = False
                started, before = time.monotonic(), self._batch.tokens
                ended = await run(self._pool, self._batch.hop, _HOP_S)
                self._meter.count(self._batch.tokens - before, time.monotonic() - started)
                for request in ended:
                    request.deliver()
            else:
                await self._wake.wait()
            self._wake.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The drive task is over: by close, or since the worker raised; then everyone who waits
        hears of it."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._broken = EngineError(f"the torch engine broke: {type(error).__name__}: {error}")
            self._broken.__cause__ = error
            self._over.set()
            self._fail_all(self._broken)

    def _fail_all(self, error: EngineError) -> None:
        waiters = [request.done for request in self._alive]
        if self._swap is not None:
            waiters.append(self._swap[1])  # type: ignore[arg-type]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
