"""One ticket, from its grant to its result on the desk, or to a Failure that says why not."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NamedTuple

from actor import episode
from actor.desk import Desk
from actor.fetch import Fetcher
from actor.line import Line
from common.errors import DataError, DeadlineError, EngineError, WireError
from common.wire import Grant, Group, Hello

log = logging.getLogger(__name__)

VERSION_WAIT_S = 60.0  # a ticket waits at most so long, and at most a lease, for its min_version
ENGINE_FAILURES = 3  # in a row: the engine is broken


class Day(NamedTuple):
    """What the tasks of one actor share."""

    me: Hello
    desk: Desk
    line: Line
    fetcher: Fetcher
    stage: episode.Stage
    tasks: asyncio.TaskGroup


async def work(day: Day, grant: Grant) -> None:
    """Ends with a result owed or a Failure sent; cancelled when nobody waits for the ticket."""
    desk, ticket = day.desk, grant.ticket
    try:
        frame = day.line.encode(await _result(day, grant))
    except DeadlineError:
        await day.line.send(desk.give_back(ticket.id, "none", "version"))
    except (DataError, WireError) as error:
        log.warning("ticket %d (%s): %s", ticket.id, ticket.problem, error)
        await day.line.send(desk.give_back(ticket.id, "data", str(error)))
    except EngineError as error:
        log.error("ticket %d: %s", ticket.id, error)
        await day.line.send(desk.give_back(ticket.id, "infra", str(error)))
        _count_engine_failure(desk, error)
    else:
        desk.engine_failures = 0
        desk.finish(ticket.id, frame)
        await day.line.send_frame(frame)


async def _result(day: Day, grant: Grant) -> Group:
    """Raises DeadlineError (its version did not come) and what the episode raises."""
    ticket, began = grant.ticket, time.monotonic()
    patience_s = min(VERSION_WAIT_S, day.line.lease_s)
    await day.fetcher.reached(max(0, ticket.min_version), patience_s)
    wait_s = time.monotonic() - began
    rollouts, timings = await episode.play(ticket, day.stage)
    return Group(
        run=day.desk.run,
        incarnation=day.desk.incarnation,
        ticket=ticket.id,
        attempt=day.desk.attempt(ticket.id),
        kind=ticket.kind,
        problem=ticket.problem,
        rollouts=rollouts,
        template=ticket.template,
        source=ticket.source,
        actor=day.me.actor,
        timings={"wait_s": wait_s, **timings},
    )


def _count_engine_failure(desk: Desk, error: EngineError) -> None:
    """An engine that does nothing but fail would eat every ticket's budget: leave instead."""
    desk.engine_failures += 1
    if desk.engine_failures >= ENGINE_FAILURES:
        desk.leave(f"the engine failed {ENGINE_FAILURES} times in a row", fault=error)
