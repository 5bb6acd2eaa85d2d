"""What lies on one actor's desk, whatever connection it speaks through: tickets in hand, results
owed.

A ticket is *held* from its grant until its result is encoded; the result is *owed* until the
learner has answered it, however many connections that takes. Both lists are in every Hello. No
sockets here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from actor import concurrency
from actor.concurrency import Window
from actor.engine.base import EngineStats
from common.errors import IsentropeError
from common.wire import Answer, Failure, FromLearner, Grant, Welcome

log = logging.getLogger(__name__)

Blame = Literal["infra", "data", "none"]


class Desk:
    """Which run this is, what is held and owed, how much fits, and whether it is time to leave."""

    def __init__(self, slots: int, prefetch: int, adaptive: bool = True) -> None:
        self.run, self.incarnation = "", 0  # of the learner; the highest incarnation seen
        self.held: dict[int, asyncio.Task[None]] = {}
        self.owed: dict[int, bytearray] = {}
        self.counts: Counter[str] = Counter()
        self.changed = asyncio.Event()  # the capacity: the learner should know at once
        self.settled = asyncio.Event()  # nothing is owed
        self.settled.set()
        self.leaving = asyncio.Event()
        self.final = False  # the run is over: nobody waits for what is held
        self.fault: IsentropeError | None = None  # why the actor leaves, if not because it was told
        self._attempts: dict[int, int] = {}
        self._slots, self._prefetch, self._last_n = slots, prefetch, slots
        self._adaptive, self._engine_up = adaptive, True
        full = concurrency.ceiling(slots, slots, prefetch)
        self._window = Window(full, full)

    @property
    def window(self) -> Window:
        """Tickets that the engine can take, of those whose rollouts fill the slots (going by the
        last one) and a few more."""
        most = concurrency.ceiling(self._slots, self._last_n, self._prefetch)
        return concurrency.resized(self._window, most)

    @property
    def capacity(self) -> int:
        """Tickets that this actor takes just now."""
        if self.leaving.is_set() or not self._engine_up:
            return 0
        return self.window.tickets

    def observe(self, engine: EngineStats) -> None:
        """A look at the engine, a heartbeat apart: the capacity follows."""
        self._engine_up = engine.up
        if self._adaptive:
            window, held = self.window, len(self.held)
            self._window = concurrency.adapted(window, engine, self._slots, held)
            if self._window.size != window.size:
                said = "window %d → %d of %d tickets: %s"
                now = self._window
                log.info(said, window.tickets, now.tickets, now.ceiling, now.why)

    def leave(self, why: str, final: bool = False, fault: IsentropeError | None = None) -> None:
        if not self.leaving.is_set():
            log.info("leaving (%s): %d held, %d owed", why, len(self.held), len(self.owed))
        self.final |= final
        self.fault = self.fault or fault
        self.leaving.set()

    # -- whom to listen to -------------------------------------------------------------------------

    def welcome(self, welcome: Welcome) -> bool:
        """Take up the run and the life of the learner that answered; False: an older life did."""
        if welcome.run == self.run and welcome.incarnation < self.incarnation:
            self.counts["zombie"] += 1
            return False
        if welcome.run != self.run:
            if self.held or self.owed:
                log.warning("run %s, not %s: all its work is dropped", welcome.run, self.run)
            self.drop([*self.held, *self.owed])
        self.run, self.incarnation = welcome.run, welcome.incarnation
        self.drop(welcome.forget)
        return True

    def heeds(self, message: FromLearner) -> bool:
        """Whether `message` is of this run and of no earlier life of its learner."""
        if message.run != self.run or message.incarnation < self.incarnation:
            self.counts["zombie"] += 1
            return False
        self.incarnation = message.incarnation
        return True

    # -- the life of a ticket ----------------------------------------------------------------------

    def hold(self, grant: Grant, task: asyncio.Task[None]) -> None:
        self.held[grant.ticket.id] = task
        self._attempts[grant.ticket.id] = grant.attempt
        self.counts["granted"] += 1
        if self._last_n != grant.ticket.n:
            self._last_n = grant.ticket.n
            self.changed.set()

    def again(self, grant: Grant) -> None:
        """A ticket in hand was granted once more: the work goes on, as the newer attempt."""
        self._attempts[grant.ticket.id] = grant.attempt
        self.counts["granted_again"] += 1

    def attempt(self, ticket: int) -> int:
        return self._attempts[ticket]

    def finish(self, ticket: int, frame: bytearray) -> None:
        """The result is there: held no more, owed from now on."""
        self._release(ticket)
        self.owed[ticket] = frame
        self.settled.clear()
        self.counts["groups"] += 1

    def give_back(self, ticket: int, blame: Blame, reason: str) -> Failure:
        """What to tell the learner about a held ticket that will have no result."""
        self.counts[f"failed_{blame}"] += 1
        attempt = self._attempts[ticket]
        self._release(ticket)
        return self.failure(ticket, attempt, blame, reason)

    def failure(self, ticket: int, attempt: int, blame: Blame, reason: str) -> Failure:
        return Failure(
            run=self.run,
            incarnation=self.incarnation,
            ticket=ticket,
            attempt=attempt,
            blame=blame,
            reason=reason,
        )

    def settle(self, answer: Answer) -> None:
        """Whatever the verdict is, these copies have done their duty."""
        for ticket in (answer.ticket, *answer.also):
            if self.owed.pop(ticket, None) is None:
                self.counts["answered_again"] += 1
                continue
            self.counts[answer.verdict] += 1
            if answer.verdict == "refused":
                log.warning("ticket %d: result refused: %s", ticket, answer.reason)
        self._tidy()

    def drop(self, tickets: Iterable[int], counter: str = "forgotten") -> None:
        """Forget these: work on them is cancelled, results are thrown away."""
        for ticket in tickets:
            task = self.held.get(ticket)
            self._release(ticket)
            if task is not None:
                task.cancel()
            self.owed.pop(ticket, None)
            self.counts[counter] += 1
        self._tidy()

    def _release(self, ticket: int) -> None:
        self.held.pop(ticket, None)
        self._attempts.pop(ticket, None)

    def _tidy(self) -> None:
        if not self.owed:
            self.settled.set()
