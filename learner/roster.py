"""The actors at the desk: who said Hello, who is turned away, who has room, who is gone."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from common import wire
from common.wire import Drain, Hello, Pulse, Welcome
from learner.books import Books
from learner.config import LearnerConfig
from learner.leases import Peer
from learner.limits import Limits

log = logging.getLogger("isentrope.desk")

MOST_CREDIT = 4096  # of one actor: its grants and answers fit the socket's queue several times


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


class Roster:
    """Belongs to the desk's thread."""

    def __init__(self, books: Books, limits: Limits, config: LearnerConfig, digest: str) -> None:
        self.actors: dict[Peer, Actor] = {}
        self._books, self._limits, self._config, self._digest = books, limits, config, digest
        self._quarantined: set[str] = set()
        self._last_pulse = time.monotonic()

    def welcome(self, peer: Peer, hello: Hello, now: float) -> None:
        """An actor is here, again perhaps: what it holds and owes is leased to it."""
        books = self._books
        refusal = self._objection(hello)
        if refusal is not None:
            books.counts[f"refused_{refusal.reason}"] += 1
            books.outbox.send(peer, refusal)
            return
        for old, actor in list(self.actors.items()):
            if (actor.name, actor.host, actor.pid) == (hello.actor, hello.host, hello.pid):
                # the same process on a new connection: its leases move below or are freed
                del self.actors[old]
                self._limits.forget(old)
                books.leases.forget(old)
                self._release(old, keep=(*hello.held, *hello.owed))
        self.actors[peer] = Actor(
            hello.actor, hello.engine, hello.host, hello.pid, hello.capacity, now
        )
        theirs = (*hello.held, *hello.owed) if hello.run == books.identity["run"] else ()
        open_ = books.ledger.open
        wanted = {id_ for id_ in theirs if id_ in open_ and open_[id_].group is None}
        books.leases.claim(wanted, peer, now)
        forget = tuple(id_ for id_ in hello.held if id_ not in wanted)
        log.info("actor %s joined (%s, capacity %d)", hello.actor, hello.engine, hello.capacity)
        welcome = Welcome(
            heartbeat_s=self._config.heartbeat_s,
            lease_s=self._config.lease_s,
            version=books.version,
            forget=forget,
            **books.identity,
        )
        books.outbox.send(peer, welcome)

    def quarantine(self, peer: Peer) -> None:
        """It is sent away, and turned away from now on."""
        name, books = self.actors[peer].name, self._books
        books.counts["quarantined"] += 1
        self._quarantined.add(name)
        refused = wire.Refused(reason="quarantined", theirs=name, **books.identity)
        books.outbox.send(peer, refused)
        self.forget(peer, "infra")

    def forget(self, peer: Peer, blame: str) -> None:
        """The connection is gone; what it held may be leased to others at once."""
        actor = self.actors.pop(peer, None)
        if actor is None:
            return
        self._limits.forget(peer)
        self._books.leases.forget(peer)
        log.info("actor %s left", actor.name)
        self._books.counts["left" if blame == "none" else "lost"] += 1
        for id_ in self._books.leases.of(peer):
            self._books.give_back(id_, blame, "the actor is gone")

    def drain(self, final: bool) -> None:
        """Ask everybody to leave."""
        for peer, actor in self.actors.items():
            actor.draining = True
            self._books.outbox.send(peer, Drain(final=final, **self._books.identity))

    def free(self) -> list[tuple[int, Peer]]:
        """A heap of (minus its credit, connection)."""
        leased = self._books.leases.count()
        free = [
            (leased[peer] - credit, peer)
            for peer, actor in self.actors.items()
            if not actor.draining and (credit := min(actor.capacity, MOST_CREDIT)) > leased[peer]
        ]
        heapq.heapify(free)
        return free

    def pulse(self, now: float) -> None:
        """Tell every actor that we live; ROUTER_MANDATORY tells us who does not."""
        if now - self._last_pulse < self._config.heartbeat_s:
            return
        self._last_pulse = now
        pulse = Pulse(version=self._books.version, **self._books.identity)
        deliver = self._books.outbox.deliver
        for peer in [peer for peer in self.actors if not deliver(peer, pulse)]:
            self.forget(peer, "infra")

    def _objection(self, hello: Hello) -> wire.Refused | None:
        if hello.protocol != wire.PROTOCOL:
            ours, theirs, reason = str(wire.PROTOCOL), str(hello.protocol), "protocol"
        elif hello.digest != self._digest:
            ours, theirs, reason = self._digest, hello.digest, "digest"
        elif hello.actor in self._quarantined:
            ours, theirs, reason = "", hello.actor, "quarantined"
        else:
            return None
        return wire.Refused(reason=reason, ours=ours, theirs=theirs, **self._books.identity)

    def _release(self, peer: Peer, keep: Iterable[int] = ()) -> None:
        for id_ in set(self._books.leases.of(peer)).difference(keep):
            self._books.give_back(id_, "none", "given back")
