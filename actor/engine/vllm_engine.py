"""The production engine: vLLM, driven inside the actor.

    generate() ─▶ one vLLM request a rollout ─▶ … its processes decode … ─▶ sample
    update_weights() ─▶ checked ─▶ staged in the workers, decoding goes on
                     ─▶ paused, loaded, resumed; running sequences and their KV cache stay

New requests are salted with the version, so no prefix that old weights computed serves them. One
that has no token yet when a swap comes is asked for again under the new salt.

The event loop owns everything here. What is waited for: `_guard` waits for one of vLLM's processes
to die, or for `engine_hang_s` without a token; calls of vLLM have that deadline too. Whatever goes
wrong breaks the engine: `watch` and all who wait hear of it. `close` ends every process that vLLM
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from actor.config import ActorConfig
from actor.engine import noise, vllm_args, vllm_process
from actor.engine.base import EngineStats, Sample
from actor.engine.request import check, empty_sample
from actor.engine.vllm_host import Host
from actor.engine.vllm_model import kv_bytes, limits
from actor.engine.vllm_request import Rollout, salt
from actor.engine.vllm_stats import Statistics
from actor.engine.vllm_transfer import Transfer
from common.errors import DataError, EngineError, IsentropeError
from common.versions import Weights
from common.wire import Sampling

_LOOKS = 4  # within engine_hang_s: how often it is asked whether a token came
_EXPLAIN_S = 5.0  # for a failure's cause, after the failure has shown


class VllmEngine:
    def __init__(self, folder: Path, actor: ActorConfig) -> None:
        """Check what can be checked without vLLM, then start it: half a minute or more. Raises
        ConfigError, DataError and EngineError, and leaves nothing behind."""
        args = vllm_args.vet(actor)
        self.vocab_size, self.max_length = limits(folder, actor.max_length)
        self.slots = actor.slots
        self._hang_s = actor.engine_hang_s
        self._down = asyncio.Event()
        self._transfer = Transfer(folder, self._hang_s, self._down, args.gpu)
        cache = kv_bytes(folder, actor.slots, self.max_length, 2 if actor.dtype == "bf16" else 4)
        self._host = Host(folder, args, device=actor.device, threads=actor.threads, kv_bytes=cache)
        self._statistics = Statistics()
        self._alive: set[Rollout] = set()
        self._version, self._salt = 0, ""
        self._numbers = itertools.count()
        self._updating, self._updates = asyncio.Lock(), set[asyncio.Task[None]]()
        self._task: asyncio.Task[None] | None = None
        self._up, self._paused, self._pause_s = asyncio.Event(), False, 0.0
        self._broken: EngineError | None = None
        self._host.start(self._statistics.logger, actor.engine_start_s)

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
        seeds = noise.keys(sampling.seed, np.arange(first, first + n))
        rollouts = [Rollout(prefix, sampling, limit, int(seed)) for seed in seeds]
        left = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                await self._ready()
                await self._play(rollouts)
        except TimeoutError:
            await self._abort(rollouts)
            for rollout in rollouts:
                rollout.take_what_there_is(self._version)
        finally:
            await self._abort(rollouts)  # those of a task that was cancelled
            self._alive.difference_update(rollouts)
        return [rollout.sample or empty_sample(self._version) for rollout in rollouts]

    async def update_weights(self, weights: Weights) -> None:
        """As the protocol says; a swap that has begun is finished though its caller is
        cancelled."""
        update = asyncio.create_task(self._update(weights))
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)
        await asyncio.shield(update)

    def stats(self) -> EngineStats:
        tokens_per_s, busy = self._statistics.meter.rates()
        alive = sum(rollout.open for rollout in self._alive)
        running = self._statistics.running(alive)
        return EngineStats(
            tokens_per_s=tokens_per_s,
            running=running,
            waiting=len(self._alive) - running,
            kv_use=self._statistics.kv_use(alive),
            version=self._version,
            busy=busy,
            pause_s=self._pause_s,
            tokens=self._statistics.tokens,
            preemptions=self._statistics.preemptions,
        )

    async def watch(self) -> None:
        self._begin()
        await self._down.wait()
        assert self._broken is not None
        raise self._broken

    async def close(self) -> None:
        self._fail(EngineError("the engine is closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task, *self._updates])
        await asyncio.to_thread(self._host.close)
        await asyncio.to_thread(self._transfer.close)

    @property
    def pids(self) -> list[int]:
        """Of vLLM's processes."""
        return self._host.pids()

    # -- requests ----------------------------------------------------------------------------------

    async def _play(self, rollouts: Sequence[Rollout]) -> None:
        """Until every rollout has its sample. Raises DataError and EngineError."""
        self._alive.update(rollouts)
        try:
            await asyncio.gather(*map(self._one, rollouts))
        except (IsentropeError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001  vLLM's errors have no common root
            raise await self._explained(error) from None

    async def _one(self, rollout: Rollout) -> None:
        while rollout.sample is None:
            if self._broken is not None:
                raise self._broken
            if not any(other.open for other in self._alive):
                self._statistics.wake()
            rollout.again, rollout.id = False, str(next(self._numbers))
            prompt, sampling = rollout.ask(self._salt)
            rollout.queue = await self._host.llm.add_request(rollout.id, prompt, sampling)
            output = await rollout.queue.get()
            if not rollout.again:
                rollout.take(output, self._version)

    async def _abort(self, rollouts: Sequence[Rollout]) -> None:
        ids = [rollout.id for rollout in rollouts if rollout.open]
        if ids and self._broken is None:
            await self._host.llm.abort(ids)

    async def _renew(self) -> None:
        """Under the pause: who has no token yet begins afresh, under the salt of what comes."""
        states = self._host.llm.output_processor.request_states
        stale = []
        for rollout in self._alive:
            state = states.get(rollout.queue.request_id) if rollout.queue else None
            if rollout.open and state and state.detokenizer.num_output_tokens() == 0:
                rollout.again = True
                stale.append(rollout)
        await self._abort(stale)

    async def _explained(self, error: Exception) -> IsentropeError:
        """What was wrong when vLLM raised `error`: with the request, or with the engine."""
        from vllm.exceptions import VLLMClientError

        if isinstance(error, VLLMClientError):
            return DataError(f"vLLM refuses the request: {vllm_process.said(error)}")
        return await self._deeper(EngineError(f"vLLM failed: {vllm_process.said(error)}"))

    async def _deeper(self, error: EngineError) -> EngineError:
        """`error`, or what it is a consequence of: that a process died shows a moment later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXPLAIN_S):
                await self._down.wait()
        return self._broken or error

    # -- weights -----------------------------------------------------------------------------------

    async def _update(self, weights: Weights) -> None:
        async with self._updating:
            await self._ready()
            llm, began = self._host.llm, 0.0
            try:
                await self._transfer.stage(llm, weights)
                began, self._paused = time.monotonic(), True
                await self._transfer.load(llm, weights, partial(self._serve, weights))
            except EngineError as error:
                self._fail(await self._deeper(error))  # vLLM is still paused: no token meanwhile
                raise self._broken or error from None
            finally:
                self._paused = False
                self._statistics.wake()
                self._pause_s += time.monotonic() - began if began else 0.0

    async def _serve(self, weights: Weights) -> None:
        """Still under the pause: from here on requests are of this version."""
        self._version, self._salt = weights.version, salt(weights)
        await self._renew()

    # -- life --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._task is None and self._broken is None:
            self._task = asyncio.get_running_loop().create_task(self._guard())

    async def _ready(self) -> None:
        """Until vLLM is up. Raises EngineError when it is not, or no longer."""
        self._begin()
        await self._up.wait()
        if self._broken is not None:
            raise self._broken

    async def _guard(self) -> None:
        """As long as the engine can serve; then it is broken."""
        try:
            llm = self._host.llm
            await self._transfer.call(llm.get_supported_tasks(), "get_supported_tasks")
            await self._transfer.call(llm.collective_rpc("keep_noise"), "keep_noise")
            self._up.set()  # vLLM has asked itself once what every request needs
            await self._until_broken()
        except EngineError as error:
            self._fail(error)

    async def _until_broken(self) -> None:
        """Raises EngineError: a process of vLLM's died, or no token comes any more."""
        died = asyncio.create_task(self._host.died())
        try:
            while not died.done():
                await asyncio.wait([died], timeout=self._hang_s / _LOOKS)
                if self._stalled():
                    raise EngineError(
                        f"vLLM hangs: no token within {self._hang_s:g} s (actor.engine_hang_s)"
                    )
            raise EngineError(f"vLLM died: {self._host.cause() or died.result()}")
        finally:
            died.cancel()

    def _stalled(self) -> bool:
        if self._paused or not any(rollout.open for rollout in self._alive):
            return False
        return time.monotonic() - self._statistics.moved > self._hang_s

    def _fail(self, error: EngineError) -> None:
        """All who wait, and who come later, hear of `error`."""
        if self._broken is None:
            self._broken = error
            self._up.set()
            self._down.set()
            for rollout in self._alive:
                if rollout.queue is not None:
                    rollout.queue.put(error)
