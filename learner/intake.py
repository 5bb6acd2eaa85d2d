"""What comes in at the desk: messages read, judged and answered. Groups are admitted here.

    frame ─▶ muted? ─▶ decode ─▶ too much? ─▶ Hello │ Heartbeat │ Group │ Failure │ Bye
                                                               └▶ ours and true? ─▶ admit record

Whatever cannot be read or cannot be true is refused, counted and answered with the reason; the
connection and the run live.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import zmq

from common import wire
from common.codec import Codec
from common.errors import WireError
from common.failpoints import Failpoint
from common.group_check import check_group
from common.records import Admit
from common.wire import Bye, Failure, Group, Heartbeat, Hello
from learner.books import Books
from learner.leases import Peer
from learner.limits import STRANGERS, Limits
from learner.roster import Actor, Roster

log = logging.getLogger("isentrope.desk")

DRAIN_MESSAGES = 64  # at most so many messages a turn, so that commits stay frequent
COPIED_BYTES = 8192  # ZeroMQ reads so many at once; a view of a smaller message would hold them all
LONGEST_REASON = 300  # letters of what an actor says about a failure
MOST_STAT = 2.0**53  # of a number in a heartbeat; what is none, or beyond, is left out


class Intake:
    """Belongs to the desk's thread."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        codec: Codec,
        books: Books,
        roster: Roster,
        limits: Limits,
        failpoint: Failpoint,
        *,
        vocab_size: int,
        quarantine_after: int,
    ) -> None:
        self._socket, self._codec = socket, codec
        self._books, self._roster, self._limits = books, roster, limits
        self._fail = failpoint
        self._vocab_size, self._quarantine_after = vocab_size, quarantine_after

    def receive(self, now: float) -> bool:
        """What has come, so much a turn; True when the socket was emptied."""
        for _ in range(DRAIN_MESSAGES):
            if self._limits.flooded:
                return False
            try:
                peer = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            frame = self._socket.recv(copy=False)
            try:
                if frame.more:
                    raise WireError("malformed", f"{1 + self._skip_rest()} more frames than one")
                if self._limits.is_muted(peer, now):
                    self._books.counts["refused_muted"] += 1
                    continue
                data = frame.buffer if len(frame) > COPIED_BYTES else frame.bytes
                message = self._codec.decode(data)
                known = peer in self._roster.actors
                self._limits.check(peer if known else STRANGERS, message, now, len(frame))
                self._hear(peer, message, data, now)
            except WireError as error:
                self._refuse(peer, error, now)
        return False

    def _skip_rest(self) -> int:
        rest: list[Any] = self._socket.recv_multipart()
        return len(rest) - 1

    def _hear(self, peer: Peer, message: Any, frame: bytes | memoryview, now: float) -> None:
        books, actor = self._books, self._roster.actors.get(peer)
        if isinstance(message, Hello):
            self._roster.welcome(peer, message, now)
            return
        if actor is None:
            self._limits.waste()
            books.outbox.send(peer, wire.Refused(reason="hello", **books.identity))
            return
        actor.seen = now
        match message:
            case Heartbeat():
                actor.capacity, actor.version = message.capacity, message.version
                actor.stats = {k: v for k, v in message.stats.items() if abs(v) < MOST_STAT}
                actor.notes = message.notes
                books.leases.renew(message.held, peer, now)
            case Group():
                self._result(peer, actor, message, frame)
            case Failure(ticket=id_, attempt=attempt, blame=blame, reason=reason):
                ours = message.incarnation == books.identity["incarnation"]
                if ours and books.leases.is_held(id_, peer, attempt):
                    books.give_back(id_, blame, " ".join(reason.split())[:LONGEST_REASON])
            case Bye():
                self._roster.forget(peer, "none")

    def _result(self, peer: Peer, actor: Actor, group: Group, frame: bytes | memoryview) -> None:
        self._fail("after_receive")
        books, ledger = self._books, self._books.ledger
        entry = ledger.open.get(group.ticket)
        if group.run != books.identity["run"] or (
            entry is None and not ledger.is_closed(group.ticket)
        ):
            self._limits.talk(peer, actor.seen)
            books.answer(peer, group.ticket, "unknown")
        elif entry is None or entry.group is not None:
            self._limits.talk(peer, actor.seen)
            books.answer(peer, group.ticket, "duplicate")
        else:
            try:
                check_group(group, entry.ticket, self._vocab_size, ledger.t)
            except WireError as error:
                books.answer(peer, group.ticket, "refused", str(error))
                self._invalid(peer, actor, group.ticket, error)
                return
            actor.invalid = 0
            books.leases.answered(group.ticket, peer, actor.seen)
            admit = Admit(ticket=group.ticket, frame=frame, at=time.time())  # type: ignore[arg-type]
            books.write(admit, group)
            books.counts["answer_ack"] += 1
            books.outbox.acknowledge(peer, group.ticket)

    def _invalid(self, peer: Peer, actor: Actor, ticket: int, error: WireError) -> None:
        books = self._books
        books.counts[f"invalid_{error.reason}"] += 1
        actor.invalid += 1
        log.warning("actor %s: result of ticket %d refused: %s", actor.name, ticket, error)
        if books.leases.is_held(ticket, peer):
            books.give_back(ticket, "infra", f"invalid result ({error.reason})")
        if actor.invalid >= self._quarantine_after:
            log.error(
                "actor %s is quarantined: %d invalid results in a row", actor.name, actor.invalid
            )
            self._roster.quarantine(peer)

    def _refuse(self, peer: Peer, error: WireError, now: float) -> None:
        """A message that cannot be read: counted, answered with the reason; the connection
        lives.
        """
        self._books.counts[f"refused_{error.reason}"] += 1
        actor = self._roster.actors.get(peer)
        if not self._limits.refuse(peer if actor else STRANGERS, now):
            return
        log.warning("%s sent a message that is %s", actor.name if actor else "a stranger", error)
        self._books.answer(peer, -1, "refused", str(error))
