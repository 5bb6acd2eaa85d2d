"""One ticket, from its grant to its result on the desk, or to a Failure that says why not."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NamedTuple

from actor import episode, report
from actor.desk import Blame, Desk
from actor.fetch import Fetcher
from actor.line import Line
from actor.stage import Stage
from common.errors import DataError, DeadlineError, EngineAway, EngineError, WireError
from common.wire import Grant, Group, Hello

log = logging.getLogger(__name__)

VERSION_WAIT_S = 60.0  # a ticket waits at most so long, and at most a lease, for its min_version


class Day(NamedTuple):
    """What the tasks of one actor share."""

    me: Hello
    desk: Desk
    line: Line
    fetcher: Fetcher
    stage: Stage
    tasks: asyncio.TaskGroup


async def work(day: Day, grant: Grant) -> None:
    """Ends with a result owed or a Failure sent; cancelled when nobody waits for the ticket."""
    ticket = grant.ticket
    try:
        frame = day.line.encode(await _result(day, grant))
    except DeadlineError:
        await day.line.send(day.desk.give_back(ticket.id, "none", "version"))
    except EngineAway as error:
        await _without_engine(day, ticket.id, "none", str(error))
    except EngineError as error:
        log.error("ticket %d: %s", ticket.id, error)
        await _without_engine(day, ticket.id, "infra", str(error))
    except (DataError, WireError) as error:
        log.warning("ticket %d (%s): %s", ticket.id, ticket.problem, error)
        await day.line.send(day.desk.give_back(ticket.id, "data", str(error)))
    else:
        day.desk.finish(ticket.id, frame)
        await day.line.send_frame(frame)


async def _without_engine(day: Day, ticket: int, blame: Blame, reason: str) -> None:
    """Give it back, after a heartbeat that says how many others this actor takes: with the learner
    believing that there is room here, the ticket would come back at once, and again."""
    await day.line.send(report.beat(day))
    await day.line.send(day.desk.give_back(ticket, blame, reason))


async def _result(day: Day, grant: Grant) -> Group:
    """Raises DeadlineError (its version did not come) and what the episode raises."""
    ticket, began = grant.ticket, time.monotonic()
    patience_s = min(VERSION_WAIT_S, day.line.lease_s)
    await day.fetcher.reached(max(0, ticket.min_version), patience_s)
    wait_s = time.monotonic() - began
    played = await episode.play(ticket, day.stage)
    return Group(
        run=day.desk.run,
        incarnation=day.desk.incarnation,
        ticket=ticket.id,
        attempt=day.desk.attempt(ticket.id),
        kind=ticket.kind,
        problem=ticket.problem,
        rollouts=played.rollouts,
        template=ticket.template,
        source=ticket.source,
        actor=day.me.actor,
        timings={"wait_s": wait_s, **played.timings},
        hinted=played.hinted,
    )
