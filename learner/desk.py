"""The learner's counter: one thread that owns the ROUTER socket, the journal, the ledger and the
prompt stream.

One turn of `_turn`, for ever:

    receive what has come ─▶ run what the trainer posted ─▶ expire leases ─▶ issue where is credit
      ─▶ journal.commit(): one fsync for all of it ─▶ send answers and grants ─▶ hand over batches

What comes in is intake.py's, who is there roster.py's, what is asked issuer.py's; they write and
speak through books.py. Nothing leaves this thread (an acknowledgement, a ticket, a batch) before
the records behind it are durable. The trainer talks to it by `call` (run this between two turns,
answer after the commit) and `wait` (answer as soon as this is not None); who waits there is woken
by the turn that makes it true, or by the thread's own death. When the disk is full nothing is
acknowledged and nothing issued until a commit succeeds; pulses go on.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import zmq

from common.codec import MAX_FRAME_BYTES, Codec
from common.failpoints import Failpoint
from common.imports import keep
from common.journal import Journal, Position
from common.records import Drop, Finish, Step
from common.wire import FromActor, Grant
from learner.bell import Bell
from learner.books import Books
from learner.config import LearnerConfig
from learner.errands import Errands
from learner.inbox import Selection, select
from learner.intake import Intake
from learner.issuer import Issuer
from learner.leases import Leases, Peer
from learner.ledger import Ledger
from learner.limits import Limits
from learner.methods.base import Ask
from learner.outbox import Outbox
from learner.prompts.stream import Draft, Prompts
from learner.roster import Roster

T = TypeVar("T")

TURN_MS = 200  # a turn comes at least so often, for leases and pulses
STOOD_STILL_S = 2.0  # a longer gap between two turns means that this process itself was stopped


class Desk:
    def __init__(
        self,
        socket: zmq.Socket[bytes],
        *,
        run_id: str,
        incarnation: int,
        digest: str,
        vocab_size: int,
        config: LearnerConfig,
        journal: Journal,
        ledger: Ledger,
        prompts: Prompts,
        failpoint: Failpoint,
        max_bytes: int = MAX_FRAME_BYTES,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.ledger, self.incarnation = config, ledger, incarnation
        self._socket, self._journal = socket, journal
        self._bell = Bell()
        self._errands = Errands(self._bell.ring, lambda: self._thread.is_alive(), meanwhile)
        identity: dict[str, Any] = {"run": run_id, "incarnation": incarnation}
        self._outbox = Outbox(
            socket,
            journal,
            identity,
            failpoint,
            lost=lambda peer: self._roster.forget(peer, "infra"),
            wake=self._bell.ring,
        )
        self._leases = Leases(config.lease_s, config.infra_budget, config.data_budget)
        self._leases.waiting.extend(entry.ticket.id for entry in ledger.in_flight())
        self._books = Books(identity, ledger, self._leases, self._outbox)
        self._limits = Limits()
        self._roster = Roster(self._books, self._limits, config, digest)
        self._issuer = Issuer(config, ledger, prompts, self._books.write)
        self._intake = Intake(
            socket,
            Codec(FromActor, max_bytes),
            self._books,
            self._roster,
            self._limits,
            failpoint,
            vocab_size=vocab_size,
            quarantine_after=config.quarantine_after,
        )
        self.actors, self.counts = self._roster.actors, self._books.counts
        self._issuing = True
        self._last_turn = self._last_drained = time.monotonic()
        self._stop = threading.Event()
        # Modules and model stay. Groups come by thousands: whenever they made the garbage collector
        # look at everything, it would look at all of that again, in whatever thread it struck.
        keep()
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)
        self._thread.start()

    # ---- for the trainer's thread ----------------------------------------------------------------

    @property
    def version(self) -> int:
        """The newest that is published, -1 before the first."""
        return self._books.version

    @property
    def blocked(self) -> str:
        """Why nothing is acknowledged or issued just now, "" when nothing is in the way."""
        return self._outbox.blocked

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two turns; its value once everything it journaled is durable."""
        return self._errands.call(function)

    def look(self, function: Callable[[], T]) -> T:
        """Run `function`, which only reads, between two turns; also while the disk is full."""
        return self._errands.look(function)

    def wait(self, condition: Callable[[], T | None], idle: Callable[[], bool]) -> T | None:
        """The first value of `condition` that is not None. `idle` runs twice a second; when it is
        True, give up.
        """
        return self._errands.wait(condition, idle)

    def take(self, idle: Callable[[], bool]) -> Selection | None:
        """The next batch, or None when `idle` said so."""

        def determined() -> Selection | None:
            batch = select(self.ledger, self.config, self._issuer.usable())
            if batch is not None:
                self._issuer.begin(batch.t)
            return batch

        return self.wait(determined, idle)

    def record(self, record: Step | Finish | Drop) -> None:
        self.call(lambda: self._books.write(record))

    def snapshot(self) -> bytes:
        """The ledger's fold as of now, for a checkpoint."""
        return self.call(lambda: self.ledger.dump(self._journal.end()))

    def prune(self, oldest: tuple[str, int]) -> None:
        """Delete the journal's segments before `oldest`: no checkpoint needs them."""
        self.call(lambda: self._journal.prune(Position(*oldest)))

    def held(self) -> Counter[Peer]:
        """Tickets leased to each connection."""
        return self.look(self._leases.count)

    def announce(self, version: int) -> None:
        """`version` is published: tokens may come from it, tickets may ask for it."""
        self.call(lambda: setattr(self._books, "version", version))

    def want(self, ask: Ask) -> None:
        """Aux tickets issued from now on are like this, and so many a step (`n_aux` at most)."""
        wanted = msgspec.structs.replace(ask, groups=min(ask.groups, self.config.n_aux))
        if wanted != self._issuer.ask:
            self.call(lambda: setattr(self._issuer, "ask", wanted))

    def evaluate(self, label: str, problems: Sequence[Draft], min_version: int) -> None:
        """Ask those of `problems` that evaluation `label` has not asked yet, before all else."""
        self.call(lambda: self._issuer.evaluate(label, problems, min_version))

    def drain(self, final: bool, deadline_s: float = 6.0) -> None:
        """Send every actor away; with `final`, open tickets end as surplus first."""
        until = time.monotonic() + deadline_s

        def begin() -> None:
            self._issuing = False
            self._issuer.forget_evaluations()
            if final:
                for id_ in list(self.ledger.open):
                    self._books.end(id_, "surplus")
            self._roster.drain(final)

        self.call(begin)
        self.wait(lambda: True if not self.actors else None, lambda: time.monotonic() > until)

    def close(self) -> None:
        self._stop.set()
        self._bell.ring()
        self._thread.join(10.0)
        self._issuer.close()
        self._socket.close(linger=0)
        self._bell.close()

    # ---- the desk's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
            self._outbox.close()
        except BaseException as error:
            self._outbox.abandon(error)
            self._errands.abandon(error)
            if not isinstance(error, Exception):
                raise

    def _turn(self) -> None:
        if rest_ms := self._limits.rest_ms():
            self._bell.wait(None, rest_ms)
        self._bell.wait(self._socket if not self.blocked else None, TURN_MS)
        now = time.monotonic()
        gap, self._last_turn = now - self._last_turn, now
        if gap > STOOD_STILL_S:  # SIGSTOP, a laptop's lid: first hear what came in the meantime
            self._leases.postpone(gap)
        drained = not self.blocked and self._intake.receive(now)
        if drained or self.blocked or gap > STOOD_STILL_S:
            self._last_drained = now
        self._errands.run(self._outbox.resolve, lambda: self.blocked)
        flooded = now - self._last_drained > STOOD_STILL_S  # then it is never emptied
        if (drained or flooded) and gap <= STOOD_STILL_S:
            for id_ in self._leases.overdue(now):
                self._books.give_back(id_, "infra", "the lease expired")
        self._issue(now)
        self._errands.answer(self._outbox.resolve)
        self._outbox.turn()
        self._roster.pulse(now)

    def _issue(self, now: float) -> None:
        if self.blocked or not self._issuing or self.version < 0:
            return
        self._issuer.turn()
        room, slow = self._issuer.room(), self._leases.slow(now)
        if not (slow or self._leases.waiting or self._issuer.wants(room)):
            return
        free = self._roster.free()
        while free:  # whoever has most credit comes first
            lacking, peer = free[0]
            if self._leases.waiting:
                id_: int | None = self._leases.waiting.popleft()
            else:
                id_, room = self._issuer.next(room)
            if id_ is None:
                return self._share(slow, free, now)
            self._grant(id_, peer, self._leases.lease(id_, peer, now))
            if lacking < -1:
                heapq.heapreplace(free, (lacking + 1, peer))
            else:
                heapq.heappop(free)

    def _share(self, slow: Sequence[int], free: list[tuple[int, Peer]], now: float) -> None:
        """Nothing else is to be asked: those with room are asked what others are slow to answer."""
        room = {peer: -lacking for lacking, peer in free}
        for id_ in slow:
            others = (peer for peer in room if not self._leases.works_on(id_, peer))
            if (peer := next(others, None)) is None:
                continue
            self._books.counts["shared"] += 1
            self._grant(id_, peer, self._leases.share(id_, peer, now))
            room[peer] -= 1
            if not room[peer]:
                del room[peer]

    def _grant(self, id_: int, peer: Peer, attempt: int) -> None:
        ticket = self.ledger.open[id_].ticket
        self._outbox.send(peer, Grant(ticket=ticket, attempt=attempt, **self._books.identity))
