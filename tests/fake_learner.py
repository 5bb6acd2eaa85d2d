"""A real ROUTER in the learner's place that says what a test wants said, and an actor to hear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq
import zmq.asyncio

from actor.config import ActorConfig, ScriptedConfig
from actor.desk import Desk
from actor.engine.base import Engine
from actor.engine.scripted import ScriptedEngine
from actor.loop import serve
from common import wire
from common.channel import bind_router
from common.codec import Codec
from common.config import RunConfig
from common.errors import ConfigError
from common.versions import Registry
from common.wire import (
    Answer,
    FromActor,
    Grading,
    Grant,
    Hello,
    Sampling,
    Ticket,
    Welcome,
)
from tests.builders import make_ticket
from tests.published import put

TOP = Path(__file__).parent.parent
RUN = "run-1"
PATIENCE_S = 40.0  # of tests, with an actor on a machine that may be busy
FAST = ScriptedConfig(tokens_per_s=1e6)
M = TypeVar("M", bound=wire.Message)


class Learner:
    """Says what the test wants said. Pulses and answers nothing by itself."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.run, self.incarnation = RUN, 1
        self.codec = Codec(FromActor)
        self.context = context
        self.socket, self.endpoint = bind_router(context, "tcp://127.0.0.1:*")
        self.peer = b""

    async def receive(self, kind: type[M], within_s: float = PATIENCE_S) -> M:
        """The next message of `kind`; others are passed over."""
        async with asyncio.timeout(within_s):
            while True:
                self.peer, self.frame = await self.socket.recv_multipart()
                message = self.codec.decode(self.frame)
                if isinstance(message, kind):
                    return message

    async def silence(self, kind: type[wire.Message], for_s: float = 0.2) -> None:
        with pytest.raises(TimeoutError):
            await self.receive(kind, for_s)

    async def send(self, message: wire.Message, peer: bytes = b"", **said: Any) -> None:
        """In the name of this run and life, unless `said` is something else."""
        who = {"run": self.run, "incarnation": self.incarnation, **said}
        frame = self.codec.encode(msgspec.structs.replace(message, **who))
        await self.socket.send_multipart([peer or self.peer, frame])

    async def welcome(self, **fields: Any) -> Hello:
        hello = await self.receive(Hello)
        await self.send(Welcome(**{"heartbeat_s": 0.05, "lease_s": 30.0, "version": 0, **fields}))
        return hello

    async def grant(self, id: int = 1, attempt: int = 0, **fields: Any) -> None:
        await self.send(Grant(ticket=ticket(id, **fields), attempt=attempt))

    async def ack(self, id: int = 1, **said: Any) -> None:
        await self.send(Answer(ticket=id, verdict="ack"), **said)

    async def restart(self) -> None:
        """A new life at the same address."""
        self.socket.close(0)
        self.incarnation += 1
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    self.socket, _ = bind_router(self.context, self.endpoint)
                    return
                except ConfigError:  # ZeroMQ lets a port go a moment after close
                    await asyncio.sleep(0.01)


def ticket(id: int, n: int = 2, max_tokens: int = 8, **fields: Any) -> Ticket:
    sampling = Sampling(max_tokens=max_tokens, seed=id)
    part = wire.GradePart(name="correct", grader="exact")
    fields.setdefault("grading", Grading(gold="nothing", parts=(part,)))
    return make_ticket(id, n=n, sampling=sampling, **fields)


class Stage:
    """One actor in this process, and the learner it talks to."""

    def __init__(self, learner: Learner, redis_url: str) -> None:
        self.learner = learner
        self.run = RunConfig(redis=redis_url, learner=learner.endpoint)
        self.registry = Registry(redis_url, RUN)
        self.task: asyncio.Task[None] | None = None

    def start(self, engine: Engine | None = None, **config: Any) -> Desk:
        engine = engine or ScriptedEngine(FAST, slots=8)
        actor = ActorConfig(slots=engine.slots, poll_s=0.02, grade_timeout_s=0.5, **config)
        self.desk = Desk(actor.slots, actor.prefetch)
        self.task = asyncio.create_task(serve(self.run, actor, "bob", engine, self.desk))
        return self.desk

    async def ended(self) -> None:
        assert self.task is not None
        async with asyncio.timeout(PATIENCE_S):
            await self.task


@asynccontextmanager
async def open_stage(redis_url: str) -> AsyncIterator[Stage]:
    """Version 0 is published; the actor is yet to be started."""
    context = zmq.asyncio.Context()
    learner = Learner(context)
    stage = Stage(learner, redis_url)
    put(stage.registry, 0)
    yield stage
    if stage.task is not None and not stage.task.done():
        stage.task.cancel()
        with suppress(asyncio.CancelledError):
            await stage.task
    learner.socket.close(0)
    context.term()
    stage.registry.close()
