"""One actor's day.

      learner ──Grant──▶ _listen ─▶ work: wait for the version ─▶ generate ─▶ grade ─▶ encode ┐
         ▲                  ▲                     ▲                                            │
         │                  └──Answer: freed      └── Fetcher: new weights, verified           │
         └──────────────────────── Group, kept on the desk until it is answered ◀──────────────┘
         └──Heartbeat: what is held, how the engine is doing ── _beat

One asyncio loop; every wait and who ends it:

    _started  the first engine (`engine_start_s`), or `desk.leaving`
    _listen   a message (the learner; silence ends in a fresh connection and a new Hello, for ever)
    _beat     the next heartbeat (the clock), or a changed capacity (the desk)
    work      its version (the fetcher, or 60 s), its tokens (the engine; EngineError once it is
              broken), its verdicts (the pool's deadlines); cancelled when nobody waits for the
              ticket any more
    _guard    the end of the engine; a broken one is closed (10 s), made again and brought to its
              weights (`engine_start_s` each), `engine_restarts` times an hour, then it is over
    _show     the clock; Redis calls have deadlines
    follow    a hint of a new version (the learner) or the clock; Redis calls have deadlines; an
              engine that takes weights ends it, or breaks, or is made again
    serve     `desk.leaving` (SIGTERM, SIGINT, Drain, an engine that is over), then `desk.settled`
              for 5 s, then the engine's end (10 s)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal

import msgspec
import zmq.asyncio

from actor import report, text
from actor.config import ActorConfig
from actor.desk import Blame, Desk
from actor.engine.base import Engine
from actor.engine.make import make
from actor.engine.restart import RestartingEngine
from actor.fetch import Fetcher
from actor.grade.pool import Pool
from actor.line import Line
from actor.stage import Budget, Stage
from actor.voice import Voices
from actor.work import Day, work
from common import keys, models, wire
from common.channel import demand_keys
from common.config import RunConfig
from common.errors import DeadlineError, EngineError, WireError
from common.failpoints import Failpoint
from common.log import revision
from common.recipe import digest
from common.versions import Registry
from common.wire import Answer, Drain, FromLearner, Grant, Hello, Pulse, Welcome

log = logging.getLogger(__name__)

DELIVER_S = 5.0  # for the answers that are still owed when leaving
BACK_OFF_S = 2.0
SHOW_S = 1.0


async def run(run: RunConfig, actor: ActorConfig, name: str) -> None:
    """Serve the learner of `run` until told to leave. Raises IsentropeError: it cannot go on."""
    _vet(run)
    desk = Desk(actor.slots, actor.prefetch, actor.adaptive)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, desk.leave, number.name)
    engine = RestartingEngine(lambda: make(run, actor), actor.engine_restarts, actor.engine_start_s)
    try:
        if await _started(engine, desk):
            await serve(run, actor, name, engine, desk)
    finally:
        await engine.close()


async def serve(
    run: RunConfig,
    actor: ActorConfig,
    name: str,
    engine: Engine,
    desk: Desk,
    context: zmq.asyncio.Context | None = None,
) -> None:
    """The day itself, with an engine that is up. `context`: ZeroMQ's, where many actors share a
    process."""
    words = await asyncio.to_thread(text.load, models.find(run.model), engine.vocab_size)
    me = await asyncio.to_thread(_introduction, run, actor, name)
    async with contextlib.AsyncExitStack() as stack:
        pool = Pool(actor.grade_workers, actor.grade_timeout_s)
        stack.push_async_callback(pool.close)
        max_bytes = run.max_frame_mb << 20
        line = Line(run.learner, max_bytes, keys.read(run.keys), context=context)
        stack.push_async_callback(line.close)
        fetcher = Fetcher(run, engine, actor.poll_s)
        stack.callback(fetcher.close)
        voices = Voices()
        stack.push_async_callback(voices.close)
        stage = Stage(engine, words, pool, Failpoint.parse(run.failpoint), voices, Budget())
        try:
            async with asyncio.TaskGroup() as tasks:
                day = Day(me, desk, line, fetcher, stage, tasks)
                flows = [_listen(day), _beat(day), _guard(day), _show(day), fetcher.follow()]
                endless = [tasks.create_task(flow) for flow in flows]
                await desk.leaving.wait()
                await _leave(day)
                for task in endless:
                    task.cancel()
        except BaseExceptionGroup as several:
            raise _first(several) from None
    if desk.fault is not None:
        raise desk.fault


# -- talking to the learner ------------------------------------------------------------------------


async def _listen(day: Day) -> None:
    """Connect, hear what the learner says, connect again when in doubt; ends with the actor."""
    tries = 0
    while True:
        try:
            await _greeted(day, await day.line.greet(_hello(day)))
            tries = 0
            while True:
                await _hear(day, await day.line.receive())
        except (DeadlineError, WireError) as why:
            tries += 1
            log.warning("%s: connecting afresh (try %d)", why, tries)
            day.line.hang_up()
        await asyncio.sleep(min(BACK_OFF_S, 0.05 * 2 ** min(tries, 8)))


def _hello(day: Day) -> Hello:
    desk = day.desk
    return msgspec.structs.replace(
        day.me,
        run=desk.run,
        incarnation=desk.incarnation,
        capacity=desk.capacity,
        held=tuple(desk.held),
        owed=tuple(desk.owed),
    )


async def _greeted(day: Day, welcome: Welcome) -> None:
    """Forget what nobody waits for, deliver what is owed. WireError for a zombie's welcome."""
    desk = day.desk
    if not desk.welcome(welcome):
        raise WireError("incarnation", f"welcomed by {welcome.incarnation}, an earlier life")
    day.fetcher.hint(welcome)
    said = "run %s, life %d of its learner: %d held, %d owed, %d forgotten"
    log.info(said, desk.run, desk.incarnation, len(desk.held), len(desk.owed), len(welcome.forget))
    desk.changed.set()  # a first heartbeat at once
    for frame in list(desk.owed.values()):
        await day.line.send_frame(frame)


async def _hear(day: Day, message: FromLearner) -> None:
    if not day.desk.heeds(message):
        return
    match message:
        case Grant():
            await _take(day, message)
        case Answer():
            day.stage.fail("before_ack")
            day.desk.settle(message)
        case Pulse():
            day.fetcher.hint(message)
        case Drain():
            day.desk.leave("drained by the learner", final=message.final)


async def _take(day: Day, grant: Grant) -> None:
    desk, ticket = day.desk, grant.ticket.id
    if ticket in desk.owed:
        await day.line.send_frame(desk.owed[ticket])
    elif ticket in desk.held:
        desk.again(grant)
    elif desk.leaving.is_set():
        await day.line.send(desk.failure(ticket, grant.attempt, "none", "drain"))
    else:
        desk.hold(grant, day.tasks.create_task(work(day, grant)))


async def _beat(day: Day) -> None:
    desk, line = day.desk, day.line
    while True:
        await line.send(report.beat(day))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(line.heartbeat_s):
                await desk.changed.wait()
        desk.changed.clear()


async def _show(day: Day) -> None:
    """Let people see this actor in the registry; in a task of its own, for Redis may be slow."""
    while True:
        if (registry := day.fetcher.registry) is not None:
            said = msgspec.json.encode(report.status(day))
            await asyncio.to_thread(registry.live, f"actor:{day.me.actor}", said)
        await asyncio.sleep(SHOW_S)


async def _guard(day: Day) -> None:
    """An actor without an engine, and without hope of one, leaves."""
    try:
        await day.stage.engine.watch()
    except EngineError as error:
        log.error("%s", error)
        day.desk.leave("no engine", fault=error)


# -- arriving and leaving --------------------------------------------------------------------------


async def _started(engine: RestartingEngine, desk: Desk) -> bool:
    """Whether the engine is up; False when the actor was told to leave before. Raises what its
    making raises: a first start that fails is not tried again."""
    log.info("the engine starts")
    starting = asyncio.create_task(engine.start())
    leaving = asyncio.create_task(desk.leaving.wait())
    await asyncio.wait((starting, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if desk.leaving.is_set():
        starting.cancel()
        await asyncio.wait((starting,))
        return False
    await starting
    return True


def _vet(run: RunConfig) -> None:
    """What could only be refused later, before a model is loaded. Raises ConfigError."""
    demand_keys(run.learner, keys.read(run.keys), "connect to")
    Registry(run.redis, "none").close()


def _introduction(run: RunConfig, actor: ActorConfig, name: str) -> Hello:
    return Hello(
        protocol=wire.PROTOCOL,
        digest=digest(run),
        actor=name,
        capacity=0,
        pid=os.getpid(),
        host=platform.node(),
        engine=actor.engine,
        revision=revision(),
    )


async def _leave(day: Day) -> None:
    """Hand back what is held, deliver what is owed, say good-bye."""
    desk, line = day.desk, day.line
    held = {ticket: desk.attempt(ticket) for ticket in desk.held}
    desk.drop(held, "drained")
    blame: Blame = "none" if desk.fault is None else "infra"
    if not desk.final:
        for ticket, attempt in held.items():
            await line.send(desk.failure(ticket, attempt, blame, str(desk.fault or "drain")))
    try:
        async with asyncio.timeout(DELIVER_S):
            await desk.settled.wait()
    except TimeoutError:
        log.warning("%d results were not answered within %g s", len(desk.owed), DELIVER_S)
    await line.send(wire.Bye(run=desk.run, incarnation=desk.incarnation))
    log.info("good-bye: %s", dict(desk.counts))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception that is not a group: tasks of one actor fail one at a time."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
