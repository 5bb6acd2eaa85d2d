"""The learner's counter: one thread that owns the ROUTER socket, the journal, the ledger and the
prompt stream.

One turn of `_turn`, for ever:

    receive what has come ─▶ run what the trainer posted ─▶ expire leases ─▶ issue where is credit
      ─▶ journal.commit(): one fsync for all of it ─▶ send answers and grants ─▶ hand over batches

Nothing leaves this thread (an acknowledgement, a ticket, a batch) before the records behind it are
durable. The trainer talks to it by `call` (run this between two turns, answer after the commit) and
`wait` (answer as soon as this is not None); who waits there is woken by the turn that makes it
true, or by the thread's own death. When the disk is full nothing is acknowledged and nothing issued
until a commit succeeds; pulses go on.
"""

from __future__ import annotations

import gc
import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import zmq

from common import wire
from common.codec import MAX_FRAME_BYTES, Codec
from common.errors import WireError
from common.failpoints import Failpoint
from common.group_check import check_group
from common.journal import Journal, Position
from common.records import Admit, AnyRecord, Drop, Finish, Step
from common.wire import (
    Answer,
    Bye,
    Drain,
    Failure,
    FromActor,
    Grant,
    Group,
    Heartbeat,
    Hello,
    Pulse,
    Welcome,
)
from learner.bell import Bell
from learner.config import LearnerConfig
from learner.errands import Errands
from learner.inbox import Selection, select
from learner.issuer import Issuer
from learner.leases import Leases, Peer
from learner.ledger import Ledger
from learner.limits import STRANGERS, Limits
from learner.methods.base import Ask
from learner.outbox import Outbox
from learner.prompts.stream import Draft, Prompts

log = logging.getLogger("isentrope.desk")
T = TypeVar("T")

DRAIN_MESSAGES = 64  # at most so many messages a turn, so that commits stay frequent
COPIED_BYTES = 8192  # ZeroMQ reads so many at once; a view of a smaller message would hold them all
MOST_CREDIT = 4096  # of one actor: its grants and answers fit the socket's queue several times
MOST_STAT = 2.0**53  # of a number in a heartbeat; what is none, or beyond, is left out
TURN_MS = 200  # a turn comes at least so often, for leases and pulses
STOOD_STILL_S = 2.0  # a longer gap between two turns means that this process itself was stopped


@dataclass(slots=True)
class Actor:
    """A connection that has said Hello."""

    name: str
    engine: str
    host: str
    pid: int
    capacity: int
    seen: float
    version: int = -1
    stats: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    invalid: int = 0  # invalid results in a row
    draining: bool = False


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
        self.config = config
        self.incarnation = incarnation
        self.ledger = ledger
        self.actors: dict[Peer, Actor] = {}
        self.counts: Counter[str] = Counter()  # refused messages by reason, verdicts, lost actors
        self.version = -1  # newest published
        self._identity: dict[str, Any] = {"run": run_id, "incarnation": incarnation}
        self._digest = digest
        self._vocab_size = vocab_size
        self._journal = journal
        self._issuer = Issuer(config, ledger, prompts, self._write)
        self._fail = failpoint
        self._leases = Leases(config.lease_s, config.infra_budget, config.data_budget)
        self._leases.waiting.extend(entry.ticket.id for entry in ledger.in_flight())
        self._codec = Codec(FromActor, max_bytes)
        self._socket = socket
        self._quarantined: set[str] = set()
        self._limits = Limits()
        self._issuing = True
        self._last_turn = self._last_pulse = self._last_drained = time.monotonic()
        self._bell = Bell()
        self._errands = Errands(self._bell.ring, lambda: self._thread.is_alive(), meanwhile)
        self._outbox = Outbox(
            socket,
            journal,
            self._identity,
            failpoint,
            lost=lambda peer: self._forget(peer, "infra"),
            wake=self._bell.ring,
        )
        self._stop = threading.Event()
        # Modules and model stay. Groups come by thousands: whenever they made the garbage collector
        # look at everything, it would look at all of that again, in whatever thread it struck.
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)
        self._thread.start()

    # ---- for the trainer's thread ----------------------------------------------------------------

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
            return select(self.ledger, self.config, self._issuer.usable())

        return self.wait(determined, idle)

    def record(self, record: Step | Finish | Drop) -> None:
        self.call(lambda: self._write(record))

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
        self.call(lambda: setattr(self, "version", version))

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
                    self._end(id_, "surplus")
            for peer, actor in self.actors.items():
                actor.draining = True
                self._send(peer, Drain(final=final, **self._identity))

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
        drained = not self.blocked and self._receive(now)
        if drained or self.blocked or gap > STOOD_STILL_S:
            self._last_drained = now
        self._errands.run(self._outbox.resolve, lambda: self.blocked)
        flooded = now - self._last_drained > STOOD_STILL_S  # then it is never emptied
        if (drained or flooded) and gap <= STOOD_STILL_S:
            for id_ in self._leases.overdue(now):
                self._give_back(id_, "infra", "the lease expired")
        self._issue(now)
        self._errands.answer(self._outbox.resolve)
        self._outbox.turn()
        self._pulse(now)

    def _receive(self, now: float) -> bool:
        """True when the socket was emptied."""
        for _ in range(DRAIN_MESSAGES):
            try:
                peer = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            frame = self._socket.recv(copy=False)
            try:
                if frame.more:
                    raise WireError("malformed", f"{1 + self._skip_rest()} more frames than one")
                if self._limits.is_muted(peer, now):
                    self.counts["refused_muted"] += 1
                    continue
                data = frame.buffer if len(frame) > COPIED_BYTES else frame.bytes
                self._hear(peer, self._codec.decode(data), data, now)
            except WireError as error:
                self._refuse(peer, error, now)
        return False

    def _skip_rest(self) -> int:
        rest: list[Any] = self._socket.recv_multipart()
        return len(rest) - 1

    def _hear(self, peer: Peer, message: Any, frame: bytes | memoryview, now: float) -> None:
        actor = self.actors.get(peer)
        self._limits.check(peer if actor else STRANGERS, message, now)
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return
        if actor is None:
            self._limits.waste()
            self._send(peer, wire.Refused(reason="hello", **self._identity))
            return
        actor.seen = now
        match message:
            case Heartbeat():
                actor.capacity, actor.version = message.capacity, message.version
                actor.stats = {k: v for k, v in message.stats.items() if abs(v) < MOST_STAT}
                actor.notes = message.notes
                self._leases.renew(message.held, peer, now)
            case Group():
                self._result(peer, actor, message, frame)
            case Failure(ticket=id_, attempt=attempt, blame=blame, reason=reason):
                ours = message.incarnation == self._identity["incarnation"]
                if ours and self._leases.is_held(id_, peer, attempt):
                    self._give_back(id_, blame, reason)
            case Bye():
                self._forget(peer, "none")

    def _hello(self, peer: Peer, hello: Hello, now: float) -> None:
        refusal = self._objection(hello)
        if refusal is not None:
            self.counts[f"refused_{refusal.reason}"] += 1
            self._send(peer, refusal)
            return
        for old, actor in list(self.actors.items()):
            if (actor.name, actor.host, actor.pid) == (hello.actor, hello.host, hello.pid):
                # the same process on a new connection: its leases move below or are freed
                del self.actors[old]
                self._limits.forget(old)
                self._release(old, keep=(*hello.held, *hello.owed))
        self.actors[peer] = Actor(
            hello.actor, hello.engine, hello.host, hello.pid, hello.capacity, now
        )
        theirs = (*hello.held, *hello.owed) if hello.run == self._identity["run"] else ()
        wanted = {
            id_ for id_ in theirs if id_ in self.ledger.open and self.ledger.open[id_].group is None
        }
        self._leases.claim(wanted, peer, now)
        forget = tuple(id_ for id_ in hello.held if id_ not in wanted)
        log.info("actor %s joined (%s, capacity %d)", hello.actor, hello.engine, hello.capacity)
        welcome = Welcome(
            heartbeat_s=self.config.heartbeat_s,
            lease_s=self.config.lease_s,
            version=self.version,
            forget=forget,
            **self._identity,
        )
        self._send(peer, welcome)

    def _objection(self, hello: Hello) -> wire.Refused | None:
        if hello.protocol != wire.PROTOCOL:
            ours, theirs, reason = str(wire.PROTOCOL), str(hello.protocol), "protocol"
        elif hello.digest != self._digest:
            ours, theirs, reason = self._digest, hello.digest, "digest"
        elif hello.actor in self._quarantined:
            ours, theirs, reason = "", hello.actor, "quarantined"
        else:
            return None
        return wire.Refused(reason=reason, ours=ours, theirs=theirs, **self._identity)

    def _result(self, peer: Peer, actor: Actor, group: Group, frame: bytes | memoryview) -> None:
        self._fail("after_receive")
        entry = self.ledger.open.get(group.ticket)
        if group.run != self._identity["run"] or (
            entry is None and not self.ledger.is_closed(group.ticket)
        ):
            self._answer(peer, group.ticket, "unknown")
        elif entry is None or entry.group is not None:
            self._answer(peer, group.ticket, "duplicate")
        else:
            try:
                check_group(group, entry.ticket, self._vocab_size, self.ledger.t)
            except WireError as error:
                self._answer(peer, group.ticket, "refused", str(error))
                self._invalid(peer, actor, group.ticket, error)
                return
            actor.invalid = 0
            self._leases.end(group.ticket)
            admit = Admit(ticket=group.ticket, frame=frame, at=time.time())  # type: ignore[arg-type]
            self._write(admit, group)
            self.counts["answer_ack"] += 1
            self._outbox.acknowledge(peer, group.ticket)

    def _invalid(self, peer: Peer, actor: Actor, ticket: int, error: WireError) -> None:
        self.counts[f"invalid_{error.reason}"] += 1
        actor.invalid += 1
        log.warning("actor %s: result of ticket %d refused: %s", actor.name, ticket, error)
        if self._leases.is_held(ticket, peer):
            self._give_back(ticket, "infra", f"invalid result ({error.reason})")
        if actor.invalid >= self.config.quarantine_after:
            log.error(
                "actor %s is quarantined: %d invalid results in a row", actor.name, actor.invalid
            )
            self.counts["quarantined"] += 1
            self._quarantined.add(actor.name)
            self._send(
                peer, wire.Refused(reason="quarantined", theirs=actor.name, **self._identity)
            )
            self._forget(peer, "infra")

    def _refuse(self, peer: Peer, error: WireError, now: float) -> None:
        """A message that cannot be read: counted, answered with the reason; the connection
        lives.
        """
        self.counts[f"refused_{error.reason}"] += 1
        actor = self.actors.get(peer)
        if not self._limits.refuse(peer if actor else STRANGERS, now):
            return
        log.warning("%s sent a message that is %s", actor.name if actor else "a stranger", error)
        self._answer(peer, -1, "refused", str(error))

    def _give_back(self, id_: int, blame: str, reason: str) -> None:
        self.counts[f"returned_{blame}"] += 1
        if not self._leases.give_back(id_, blame):
            log.warning(
                "ticket %d is dropped as failed: its %s budget is spent (last: %s)",
                id_,
                blame,
                reason,
            )
            self._end(id_, "failed")

    def _end(self, id_: int, reason: str) -> None:
        self._leases.end(id_)
        self._write(Drop(ticket=id_, reason=reason))

    def _release(self, peer: Peer, keep: Iterable[int] = ()) -> None:
        for id_ in set(self._leases.of(peer)).difference(keep):
            self._give_back(id_, "none", "given back")

    def _forget(self, peer: Peer, blame: str) -> None:
        """The connection is gone; what it held may be leased to others at once."""
        actor = self.actors.pop(peer, None)
        if actor is None:
            return
        self._limits.forget(peer)
        log.info("actor %s left", actor.name)
        self.counts["left" if blame == "none" else "lost"] += 1
        for id_ in self._leases.of(peer):
            self._give_back(id_, blame, "the actor is gone")

    # ---- issuing ---------------------------------------------------------------------------------

    def _issue(self, now: float) -> None:
        if self.blocked or not self._issuing or self.version < 0:
            return
        self._issuer.turn()
        room = self._issuer.room()
        if not (self._leases.waiting or self._issuer.wants(room)):
            return
        free = self._free()
        while free:  # whoever has most credit comes first
            lacking, peer = free[0]
            if self._leases.waiting:
                id_: int | None = self._leases.waiting.popleft()
            else:
                id_, room = self._issuer.next(room)
            if id_ is None:
                return
            attempt = self._leases.lease(id_, peer, now)
            self._send(
                peer, Grant(ticket=self.ledger.open[id_].ticket, attempt=attempt, **self._identity)
            )
            if lacking < -1:
                heapq.heapreplace(free, (lacking + 1, peer))
            else:
                heapq.heappop(free)

    def _free(self) -> list[tuple[int, Peer]]:
        """A heap of (minus its credit, connection)."""
        leased = self._leases.count()
        free = [
            (leased[peer] - credit, peer)
            for peer, actor in self.actors.items()
            if not actor.draining and (credit := min(actor.capacity, MOST_CREDIT)) > leased[peer]
        ]
        heapq.heapify(free)
        return free

    # ---- durability, then everything that depends on it ------------------------------------------

    def _write(self, record: AnyRecord, group: Group | None = None) -> None:
        self.ledger.apply(record, self._outbox.append(record), group)

    def _send(self, peer: Peer, message: wire.Message) -> None:
        self._outbox.send(peer, message)

    def _answer(self, peer: Peer, ticket: int, verdict: wire.Verdict, reason: str = "") -> None:
        self.counts[f"answer_{verdict}"] += 1
        self._send(peer, Answer(ticket=ticket, verdict=verdict, reason=reason, **self._identity))

    def _pulse(self, now: float) -> None:
        """Tell every actor that we live; ROUTER_MANDATORY tells us who does not."""
        if now - self._last_pulse < self.config.heartbeat_s:
            return
        self._last_pulse = now
        pulse = Pulse(version=self.version, **self._identity)
        for peer in [peer for peer in self.actors if not self._outbox.deliver(peer, pulse)]:
            self._forget(peer, "infra")
