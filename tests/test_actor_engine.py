"""An actor and its engine: what it does when that breaks, cannot take so much, or refuses
weights."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import msgspec
import numpy as np
import pytest

from actor.config import ScriptedConfig
from actor.engine.base import Engine
from actor.engine.restart import RestartingEngine
from actor.engine.scripted import ScriptedEngine
from common import models, wire
from common.errors import EngineError
from common.status import ActorStatus
from common.stores import open_store
from common.versions import Manifest, Registry, Tensor
from common.wire import Bye, Failure, Group, Heartbeat
from tests.fake_learner import FAST, Stage, open_stage
from tests.published import lay_tensors, put, spoil

SLOW = ScriptedConfig(tokens_per_s=1.0)
NORM_SIZE = 128  # of the tiny model's norms


@pytest.fixture
async def stage(redis_url: str) -> AsyncIterator[Stage]:
    async with open_stage(redis_url) as stage:
        yield stage


def starting_with(*configs: ScriptedConfig) -> tuple[RestartingEngine, list[ScriptedEngine]]:
    """An engine that is restarted, and the engines it has made; the n-th as `configs` says."""
    made: list[ScriptedEngine] = []

    def make() -> Engine:
        made.append(ScriptedEngine(configs[min(len(made), len(configs) - 1)], slots=8))
        return made[-1]

    return RestartingEngine(make, restarts=2, start_s=20.0), made


async def test_tickets_of_a_broken_engine_go_back_after_word_that_there_is_no_room(
    stage: Stage,
) -> None:
    engine, made = starting_with(SLOW, ScriptedConfig(tokens_per_s=1e6, startup_s=0.5))
    await engine.start()
    desk, learner = stage.start(engine), stage.learner
    await learner.welcome(heartbeat_s=20.0)
    for id in (1, 2, 3):
        await learner.grant(id)
    while engine.stats().running < 6:
        await asyncio.sleep(0)
    await made[0].close()
    heard: list[wire.Message] = []
    while sum(isinstance(message, Failure) for message in heard) < 3:
        heard.append(await learner.receive(wire.Message))
    failures = [message for message in heard if isinstance(message, Failure)]
    assert {failure.blame for failure in failures} == {"infra"}
    beats = [m for m in heard[: heard.index(failures[0])] if isinstance(m, Heartbeat)]
    assert (beats[-1].held, beats[-1].capacity) == ((1, 2, 3), 0)
    assert (beats[-1].version, beats[-1].stats["up"]) == (-1, 0.0)
    assert not desk.held
    await learner.grant(4)
    untouched = await learner.receive(Failure)
    assert (untouched.ticket, untouched.blame) == (4, "none")


async def test_an_actor_outlives_its_engine_and_says_so(stage: Stage) -> None:
    engine, made = starting_with(ScriptedConfig(tokens_per_s=1e6, startup_s=0.1))
    await engine.start()
    stage.start(engine)
    learner = stage.learner
    put(stage.registry, 5)
    await learner.welcome(version=5)
    await learner.grant(1, min_version=5)
    await learner.receive(Group)
    await made[0].close()
    while (await learner.receive(Heartbeat)).capacity:
        pass
    while not (beat := await learner.receive(Heartbeat)).capacity:
        pass
    assert beat.stats["restarts"] == 1
    assert beat.notes["trouble"] == "the engine is closed"
    await learner.grant(2)
    group = await learner.receive(Group)
    assert {rollout.oldest_version for rollout in group.rollouts} == {5}


async def test_an_actor_leaves_when_the_restarts_of_its_engine_are_spent(stage: Stage) -> None:
    engine, _ = starting_with(ScriptedConfig(tokens_per_s=1e6, dies_after_tokens=1))
    await engine.start()
    stage.start(engine)
    learner = stage.learner
    await learner.welcome()
    async with asyncio.timeout(40):
        while True:
            message = await learner.receive(wire.Message)
            if isinstance(message, Bye):
                break
            if isinstance(message, Heartbeat) and message.capacity > len(message.held):
                await learner.grant(1)
    with pytest.raises(EngineError, match=r"restarts within an hour \(2\) are spent.*died after"):
        await stage.ended()


async def test_less_is_asked_of_an_engine_whose_cache_is_too_small(stage: Stage) -> None:
    config = ScriptedConfig(tokens_per_s=200.0, kv_tokens=40)
    desk = stage.start(ScriptedEngine(config, slots=8), prefetch=2)
    learner = stage.learner
    await learner.welcome()
    granted = 0
    async with asyncio.timeout(40):
        while not (beat := await learner.receive(Heartbeat)).notes.get("window"):
            for _ in range(beat.capacity - len(beat.held)):
                granted += 1
                await learner.grant(granted, max_tokens=30)
    assert beat.stats["window"] == beat.capacity < beat.stats["ceiling"]
    assert beat.notes["window"].startswith("smaller: ")
    assert desk.capacity >= 1


def torch_engine() -> Engine:
    from actor.engine.torch_engine import TorchEngine

    return TorchEngine(models.find("tiny"), slots=4, max_length=64, threads=1)


def whole(registry: Registry, version: int, fill: float = 1.0, size: int = 0) -> Manifest:
    """A version of the last norm of the tiny model, all of `fill`, in the store."""
    raw = np.full(size or NORM_SIZE, fill, np.float32)
    tensor = Tensor("model.norm.weight", "F32", raw.shape, memoryview(raw).cast("B"))
    return lay_tensors(registry, version, (tensor,))


def a_bad_blob(registry: Registry, version: int) -> Manifest:
    manifest = whole(registry, version)
    spoil(registry, manifest)
    return manifest


def no_blob(registry: Registry, version: int) -> Manifest:
    manifest = whole(registry, version)
    open_store("redis", registry).delete([blob.key for blob in manifest.blobs])
    return manifest


def another_digest(registry: Registry, version: int) -> Manifest:
    return msgspec.structs.replace(whole(registry, version), digest="0" * 32)


def another_shape(registry: Registry, version: int) -> Manifest:
    return whole(registry, version, size=NORM_SIZE // 2)


REFUSED = {
    a_bad_blob: "the content's digest is .*, its manifest says",
    no_blob: "blob .* is missing",
    another_digest: "the content's digest is .*, its manifest says 000",
    another_shape: r"'model.norm.weight' has shape \(64,\), the model's is \(128,\)",
}


SCRIPTED = [case for case in REFUSED if case is not another_shape]  # it takes any shape
CASES = [*(("scripted", case) for case in SCRIPTED), *(("torch", case) for case in REFUSED)]


@pytest.mark.parametrize(("kind", "spoiled"), CASES)
async def test_a_version_that_is_not_what_it_says_is_refused_shown_and_not_served(
    stage: Stage, kind: str, spoiled: Callable[[Registry, int], Manifest]
) -> None:
    registry, learner = stage.registry, stage.learner
    registry.publish(whole(registry, 1))
    stage.start(ScriptedEngine(FAST, slots=4) if kind == "scripted" else torch_engine())
    await learner.welcome(version=1)
    while (await learner.receive(Heartbeat)).version != 1:
        pass
    registry.publish(spoiled(registry, 2))
    while not (beat := await learner.receive(Heartbeat)).notes.get("refused"):
        pass
    assert re.fullmatch(
        f"version 2 refused: .*{REFUSED[spoiled]}.*; serving 1", beat.notes["refused"]
    )
    assert (beat.version, beat.stats["refused_versions"]) == (1, 1)
    await learner.grant(1, prompt=[3, 4])
    group = await learner.receive(Group)
    assert {version for r in group.rollouts for _, version in r.segments[0].spans} == {1}
    async with asyncio.timeout(40):
        shown = None
        while shown is None or not shown.refusal:
            said = (await asyncio.to_thread(registry.living)).get("actor:bob")
            shown = msgspec.json.decode(said, type=ActorStatus) if said else None
    assert shown.refusal == beat.notes["refused"]
    assert shown.version == 1
    registry.publish(whole(registry, 3))
    while (await learner.receive(Heartbeat)).version != 3:
        pass
