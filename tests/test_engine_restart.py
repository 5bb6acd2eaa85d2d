"""An engine that breaks is replaced behind the back of whoever asks, within a budget."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from actor.config import ScriptedConfig
from actor.engine import restart
from actor.engine.base import Engine, Sample
from actor.engine.restart import RestartingEngine
from actor.engine.scripted import ScriptedEngine
from actor.engine.torch_engine import TorchEngine
from common.errors import ConfigError, DataError, EngineAway, EngineError, WeightsError
from common.versions import Tensor, Weights
from common.wire import Sampling
from tests.builders import tiny_model

PREFIX = np.arange(3, 9, dtype=np.int32)
SLOW = ScriptedConfig(tokens_per_s=10.0)
FAST = ScriptedConfig(tokens_per_s=1e6)


def weights(version: int) -> Weights:
    return Weights(version, "d", (Tensor("anything", "F32", (1,), memoryview(b"abcd")),))


class Maker:
    """Makes scripted engines, the n-th as the n-th of `configs` says; the last one stays."""

    def __init__(self, *configs: ScriptedConfig | Exception) -> None:
        self.configs, self.made = configs, list[ScriptedEngine]()
        self.calls = 0

    def __call__(self) -> Engine:
        config = self.configs[min(self.calls, len(self.configs) - 1)]
        self.calls += 1
        if isinstance(config, Exception):
            raise config
        engine = ScriptedEngine(config, slots=8)
        self.made.append(engine)
        return engine


@asynccontextmanager
async def guarded(
    make: Callable[[], Engine], restarts: int = 3, **patience: float
) -> AsyncIterator[tuple[RestartingEngine, asyncio.Task[None]]]:
    """The engine, up, and the task that guards it."""
    engine = RestartingEngine(make, restarts, **{"start_s": 30.0, **patience})
    await engine.start()
    guard = asyncio.create_task(engine.watch())
    try:
        yield engine, guard
    finally:
        guard.cancel()
        with suppress(asyncio.CancelledError, EngineError):
            await guard
        await engine.close()


async def ask(engine: Engine, seed: int = 0, max_tokens: int = 5) -> Sample:
    return (await engine.generate(PREFIX, 1, Sampling(max_tokens=max_tokens, seed=seed)))[0]


async def until(engine: RestartingEngine, restarts: int) -> None:
    """Numbers have no event: ask often."""
    async with asyncio.timeout(60):
        while engine.stats().restarts < restarts or not engine.stats().up:
            await asyncio.sleep(0.005)


async def test_what_is_in_flight_fails_at_once_and_the_next_engine_serves() -> None:
    maker = Maker(SLOW, FAST)
    async with guarded(maker) as (engine, _):
        calls = [asyncio.create_task(ask(engine, seed, 1000)) for seed in range(4)]
        while engine.stats().running < 4:
            await asyncio.sleep(0)
        await maker.made[0].close()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, EngineError) for end in ends)
        await until(engine, 1)
        assert (await ask(engine)).tokens.size == 5
        assert engine.stats().trouble == "the engine is closed"


async def test_between_two_engines_there_is_none_and_the_loop_lives() -> None:
    slow_start = ScriptedConfig(tokens_per_s=1e6, startup_s=0.3)
    maker = Maker(FAST, slow_start)
    async with guarded(maker) as (engine, _):
        await engine.update_weights(weights(4))
        await maker.made[0].close()
        while engine.stats().up:
            await asyncio.sleep(0)
        assert (engine.stats().version, engine.stats().running) == (-1, 0)
        with pytest.raises(EngineAway):
            await ask(engine)
        for _ in range(3):  # while another thread makes an engine
            await asyncio.sleep(0.001)
        assert not engine.stats().up, "the loop turned meanwhile"
        await until(engine, 1)


async def test_the_next_engine_samples_nothing_before_it_has_the_last_weights() -> None:
    maker = Maker(FAST)
    async with guarded(maker) as (engine, _):
        await engine.update_weights(weights(7))
        await maker.made[0].close()
        samples = []
        async with asyncio.timeout(60):
            while engine.stats().restarts < 1 or len(samples) < 3:
                with suppress(EngineError):
                    samples.append(await ask(engine, len(samples)))
                await asyncio.sleep(0)
        assert {sample.spans for sample in samples} == {((0, 7),)}
        assert maker.made[1].stats().version == 7


async def test_weights_that_come_while_there_is_no_engine_wait_for_the_next() -> None:
    maker = Maker(FAST, ScriptedConfig(startup_s=0.2))
    async with guarded(maker) as (engine, _):
        await engine.update_weights(weights(1))
        await maker.made[0].close()
        while engine.stats().up:
            await asyncio.sleep(0)
        await engine.update_weights(weights(2))
        assert len(maker.made) == 2
        assert engine.stats().version == 2


async def test_counters_go_on_counting() -> None:
    maker = Maker(FAST)
    async with guarded(maker) as (engine, _):
        await ask(engine)
        await maker.made[0].close()
        seen = [engine.stats().tokens]
        async with asyncio.timeout(60):
            while engine.stats().restarts < 1:
                seen.append(engine.stats().tokens)
                await asyncio.sleep(0)
        await ask(engine)
        assert set(seen) == {5}
        assert engine.stats().tokens == 10


async def test_refused_weights_and_refused_prompts_break_nothing() -> None:
    class Picky(ScriptedEngine):
        """Refuses all weights, as an engine does whose model has other shapes."""

        async def update_weights(self, weights: Weights) -> None:
            raise WeightsError("it has another shape")

    async with guarded(lambda: Picky(FAST, slots=1, max_length=16)) as (engine, _):
        for _ in range(5):
            with pytest.raises(WeightsError):
                await engine.update_weights(weights(1))
            with pytest.raises(DataError, match="prefix of 20 tokens"):
                await engine.generate(np.ones(20, np.int32), 1, Sampling())
        assert (await ask(engine)).tokens.size == 5
        assert (engine.stats().restarts, engine.stats().up) == (0, True)


async def test_an_engine_that_fails_while_it_takes_weights_serves_no_more() -> None:
    class Half(ScriptedEngine):
        """Breaks in the middle of version 2, and does not know it."""

        async def update_weights(self, weights: Weights) -> None:
            await super().update_weights(weights)
            if weights.version == 2 and len(made) == 1:
                raise EngineError("a worker was lost on the way")

    made: list[Half] = []

    def make() -> Engine:
        made.append(Half(FAST, slots=1))
        return made[-1]

    async with guarded(make) as (engine, _):
        await engine.update_weights(weights(1))
        with pytest.raises(EngineError, match="lost on the way"):
            await engine.update_weights(weights(2))
        await until(engine, 1)
        assert engine.stats().version == 1
        assert "failed to take version 2" in engine.stats().trouble
        await engine.update_weights(weights(2))
        assert (await ask(engine)).spans == ((0, 2),)


async def test_an_engine_that_only_fails_and_never_says_so_is_replaced() -> None:
    class Mute(ScriptedEngine):
        async def generate(self, *_: object, **__: object) -> list[Sample]:
            raise EngineError("no")

    made: list[Engine] = []

    def make() -> Engine:
        made.append(Mute(FAST, slots=1) if not made else ScriptedEngine(FAST, slots=1))
        return made[-1]

    async with guarded(make) as (engine, _):
        for _ in range(restart.FAILURES):
            assert engine.stats().up
            with pytest.raises(EngineError, match="no"):
                await ask(engine)
        assert not engine.stats().up
        await until(engine, 1)
        assert (await ask(engine)).tokens.size == 5


async def test_when_the_restarts_are_spent_it_is_over_and_the_last_cause_is_named() -> None:
    maker = Maker(ScriptedConfig(tokens_per_s=1e6, dies_after_tokens=3))
    async with guarded(maker, restarts=2) as (engine, guard):
        async with asyncio.timeout(60):
            while not guard.done():
                with suppress(EngineError):
                    await ask(engine)
                await asyncio.sleep(0)
        with pytest.raises(
            EngineError, match=r"restarts within an hour \(2\).*spent.*died after 5 tokens"
        ):
            await guard
        assert len(maker.made) == 3
        for asked in (ask(engine), engine.update_weights(weights(1))):
            with pytest.raises(EngineError, match="for good"):
                await asked


async def test_restarts_of_long_ago_are_forgiven() -> None:
    maker = Maker(FAST)
    async with guarded(maker, restarts=1, within_s=0.0) as (engine, guard):
        for life in range(3):
            await maker.made[life].close()
            await until(engine, life + 1)
        assert not guard.done()


async def test_a_restart_that_fails_is_one_of_the_budget_and_tried_again() -> None:
    maker = Maker(FAST, ConfigError("no memory for the KV cache"), FAST)
    async with guarded(maker) as (engine, _):
        await maker.made[0].close()
        await until(engine, 1)
        assert (maker.calls, len(maker.made)) == (3, 2)
        assert engine.stats().trouble == "it did not start again: no memory for the KV cache"


@pytest.mark.parametrize("error", [ConfigError("so"), DataError("so"), EngineError("so")])
async def test_a_first_start_that_fails_is_not_tried_again(error: Exception) -> None:
    maker = Maker(error, FAST)
    with pytest.raises(type(error), match="so"):
        await RestartingEngine(maker, 3, 30.0).start()
    assert maker.calls == 1


async def test_no_memory_is_an_engine_error_in_one_line() -> None:
    maker = Maker(RuntimeError("[enforce fail] DefaultCPUAllocator:\n  can't allocate memory"))
    with pytest.raises(EngineError, match=r"did not start: RuntimeError: .*allocate memory") as it:
        await RestartingEngine(maker, 3, 30.0).start()
    assert "\n" not in str(it.value)


async def test_an_engine_that_is_not_up_in_time_is_given_up_and_closed_when_it_comes() -> None:
    may_start, closed = threading.Event(), threading.Event()

    class Late(ScriptedEngine):
        async def close(self) -> None:
            await super().close()
            closed.set()

    def make() -> Engine:
        may_start.wait(20)
        return Late(FAST, slots=1)

    with pytest.raises(EngineError, match=r"not up within 0\.05 s \(actor\.engine_start_s\)"):
        await RestartingEngine(make, 3, 0.05).start()
    may_start.set()
    assert await asyncio.to_thread(closed.wait, 10)


async def test_an_engine_that_does_not_close_is_left_behind() -> None:
    class Stuck(ScriptedEngine):
        async def close(self) -> None:
            self._end("it was killed")
            await asyncio.Event().wait()

    made: list[Stuck] = []

    def make() -> Engine:
        made.append(Stuck(FAST, slots=1))
        return made[-1]

    async with guarded(make, close_s=0.05) as (engine, _):
        made[0]._end("it was killed")
        await until(engine, 1)
        assert (await ask(engine)).tokens.size == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def filled(folder: Path, version: int, value: float) -> Weights:
    """The model's last norm, all of `value`."""
    raw = np.full(32, value, np.float32)
    return Weights(version, "d", (Tensor("model.norm.weight", "F32", (32,), memoryview(raw)),))


async def test_the_torch_engine_says_when_its_worker_broke_and_another_one_serves_its_weights(
    folder: Path,
) -> None:
    made: list[TorchEngine] = []

    def make() -> Engine:
        made.append(TorchEngine(folder, slots=4, max_length=64, threads=1))
        return made[-1]

    async with guarded(make) as (engine, _):
        await engine.update_weights(filled(folder, 3, 0.5))
        expected = await ask(engine)
        made[0]._pool.shutdown()  # its worker is gone
        with pytest.raises(EngineError, match="torch engine broke"):
            await ask(engine)
        await until(engine, 1)
        again = await ask(engine)
        np.testing.assert_array_equal(again.tokens, expected.tokens)
        torch.testing.assert_close(torch.tensor(again.logps), torch.tensor(expected.logps))
        assert again.spans == ((0, 3),)


async def test_weights_that_break_every_engine_spend_its_restarts(folder: Path) -> None:
    def make() -> Engine:
        return TorchEngine(folder, slots=4, max_length=64, threads=1)

    async with guarded(make, restarts=1) as (engine, guard):
        await engine.update_weights(filled(folder, 1, float("nan")))
        async with asyncio.timeout(30):
            while not guard.done():
                with suppress(EngineError):
                    await ask(engine)
                await asyncio.sleep(0)
        with pytest.raises(EngineError, match=r"log-probability under version 1 is not finite"):
            await guard
