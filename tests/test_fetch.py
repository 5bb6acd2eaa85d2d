"""Versions from a real Redis into an engine: only verified ones, only of the newest life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest

from actor.config import ScriptedConfig
from actor.engine.base import Engine
from actor.engine.scripted import ScriptedEngine
from actor.fetch import Fetcher
from common.config import RunConfig
from common.errors import DeadlineError, WeightsError
from common.redis_server import RedisServer
from common.stores import RedisStore
from common.versions import Registry, Weights
from common.wire import Pulse, Sampling, Welcome
from tests.published import lay, put, spoil

RUN = "run-1"


@pytest.fixture
def registry(redis_url: str) -> Registry:
    return Registry(redis_url, RUN, 5.0)


def scripted() -> ScriptedEngine:
    return ScriptedEngine(ScriptedConfig(), slots=4)


@asynccontextmanager
async def following(
    registry_url: str, engine: Engine, incarnation: int = 1
) -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(RunConfig(redis=registry_url), engine, poll_s=0.02)
    fetcher.hint(Welcome(run=RUN, incarnation=incarnation))
    task = asyncio.create_task(fetcher.follow())
    try:
        yield fetcher
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        fetcher.close()


async def until(fetcher: Fetcher, counter: str, count: int = 1) -> None:
    """A counter has no event: ask often."""
    async with asyncio.timeout(40):
        while fetcher.counts[counter] < count:
            await asyncio.sleep(0.01)


async def test_the_newest_version_is_served_without_a_hint(
    redis_url: str, registry: Registry
) -> None:
    engine = scripted()
    async with following(redis_url, engine) as fetcher:
        put(registry, 0)
        await fetcher.reached(0, 5)
        put(registry, 1)
        put(registry, 2)
        await fetcher.reached(2, 5)
    assert engine.stats().version == fetcher.version == 2
    assert fetcher.counts["weights_fetched"] <= 3


async def test_waiting_for_a_version_that_does_not_come_says_what_is_served(
    redis_url: str, registry: Registry
) -> None:
    put(registry, 3)
    async with following(redis_url, scripted()) as fetcher:
        await fetcher.reached(3, 5)
        with pytest.raises(DeadlineError, match="for version 4; the engine serves 3"):
            await fetcher.reached(4, 0.1)


async def test_nothing_is_served_before_the_registry_has_vouched_for_it(redis_url: str) -> None:
    async with following(redis_url, scripted()) as fetcher:
        with pytest.raises(DeadlineError, match="serves -1"):
            await fetcher.reached(0, 0.2)


async def test_a_corrupt_version_is_refused_and_the_old_one_keeps_being_served(
    redis_url: str, registry: Registry
) -> None:
    engine = scripted()
    put(registry, 0)
    async with following(redis_url, engine) as fetcher:
        await fetcher.reached(0, 5)
        corrupt = lay(registry, 1)
        spoil(registry, corrupt)
        registry.publish(corrupt)
        await until(fetcher, "weights_refused")
        assert engine.stats().version == fetcher.version == 0
        put(registry, 1)  # the same blob again, whole
        await fetcher.reached(1, 5)
        assert fetcher.counts["weights_refused"] == 0


async def test_what_came_of_a_version_before_its_pull_broke_is_not_pulled_again(
    redis_url: str, registry: Registry
) -> None:
    store = RedisStore(registry)
    store.blob_bytes = 100  # three of them
    manifest = lay(registry, 1, store=store)
    last = registry.key(f"blob:{manifest.blobs[-1].key}")
    registry.client.rename(last, "aside")
    registry.publish(manifest)
    async with following(redis_url, scripted()) as fetcher:
        await until(fetcher, "weights_refused")
        spoil(registry, manifest)  # the first blob: nobody reads it a second time
        registry.client.rename("aside", last)
        await fetcher.reached(1, 5)
        assert fetcher.digest == manifest.digest


async def test_a_version_that_does_not_fit_the_model_is_refused_and_asked_for_again(
    redis_url: str, registry: Registry
) -> None:
    class Picky(ScriptedEngine):
        """Refuses version 1 twice, as an engine does whose model has other shapes."""

        refusals = 2

        async def update_weights(self, weights: Weights) -> None:
            if weights.version == 1 and self.refusals:
                self.refusals -= 1
                raise WeightsError("w: shape (64,) does not fit (32,)")
            await super().update_weights(weights)

    put(registry, 0)
    async with following(redis_url, Picky(ScriptedConfig(), slots=4)) as fetcher:
        await fetcher.reached(0, 5)
        put(registry, 1)
        await until(fetcher, "weights_refused")
        assert fetcher.version == 0
        await fetcher.reached(1, 5)


async def test_versions_of_an_earlier_life_are_left_alone(
    redis_url: str, registry: Registry
) -> None:
    put(registry, 5, incarnation=1)
    async with following(redis_url, scripted(), incarnation=2) as fetcher:
        with pytest.raises(DeadlineError):
            await fetcher.reached(0, 0.2)
        put(registry, 4, incarnation=2)
        await fetcher.reached(4, 5)
        assert fetcher.version == 4


async def test_the_same_number_with_another_digest_of_a_later_life_is_fetched_again(
    redis_url: str, registry: Registry
) -> None:
    first = put(registry, 1, incarnation=1, seed=1)
    async with following(redis_url, scripted()) as fetcher:
        await fetcher.reached(1, 5)
        assert fetcher.digest == first.digest
        fetcher.hint(Pulse(run=RUN, incarnation=2, version=1))
        again = put(registry, 1, incarnation=2, seed=2)
        await fetcher.reached(1, 5)
        assert fetcher.digest == again.digest != first.digest


async def test_the_same_pair_of_a_later_life_is_not_fetched_again(
    redis_url: str, registry: Registry
) -> None:
    put(registry, 1, incarnation=1)
    async with following(redis_url, scripted()) as fetcher:
        await fetcher.reached(1, 5)
        fetcher.hint(Pulse(run=RUN, incarnation=2, version=1))
        with pytest.raises(DeadlineError):  # the later life has not vouched for it
            await fetcher.reached(1, 0.2)
        put(registry, 1, incarnation=2)
        await fetcher.reached(1, 5)
        assert fetcher.counts["weights_fetched"] == 1


async def test_another_run_begins_anew(redis_url: str, registry: Registry) -> None:
    put(registry, 7)
    async with following(redis_url, scripted()) as fetcher:
        await fetcher.reached(7, 5)
        fetcher.hint(Welcome(run="run-2", incarnation=1))
        assert fetcher.version == -1
        put(Registry(redis_url, "run-2"), 0)
        await fetcher.reached(0, 5)
        assert fetcher.version == 0


async def test_redis_may_die_and_come_back_empty(
    redis_url: str, registry: Registry, redis_server: RedisServer
) -> None:
    engine = scripted()
    put(registry, 1)
    async with following(redis_url, engine) as fetcher:
        await fetcher.reached(1, 5)
        redis_server.stop()
        await until(fetcher, "redis_away")
        await fetcher.reached(1, 0.1)  # goes on being served
        redis_server.start()
        put(registry, 2)
        await fetcher.reached(2, 10)
    assert engine.stats().version == 2


async def test_a_version_shows_in_the_spans_of_what_was_under_way(
    redis_url: str, registry: Registry
) -> None:
    config = ScriptedConfig(tokens_per_s=200.0)
    engine = ScriptedEngine(config, slots=1)
    put(registry, 0)
    async with following(redis_url, engine) as fetcher:
        await fetcher.reached(0, 5)
        prompt = np.array([1, 2], np.int32)
        generation = asyncio.create_task(engine.generate(prompt, 1, Sampling(max_tokens=100)))
        await asyncio.sleep(0.1)  # some tokens under version 0
        put(registry, 1)
        (sample,) = await generation
    assert [version for _, version in sample.spans] == [0, 1]
