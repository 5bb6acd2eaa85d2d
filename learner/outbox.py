"""What leaves the desk: nothing does before the records behind it are durable.

    due ───────▶ promised ───────▶ out
    said since   waits for the     failpoints, acknowledgements, messages, values
    the commit   commit that is
    began        under way

The disk works in a thread of its own, so the desk hears and judges results while earlier ones are
being written. One commit is under way at a time; what is due when it ends is the next: the busier
the disk, the larger the groups. A full disk holds everything back until a commit succeeds; any
other failure of the journal is raised in the desk's thread, and final.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import zmq

from common.codec import Codec
from common.failpoints import Failpoint
from common.journal import DiskFull, Journal, Position
from common.records import Admit, AnyRecord, Issue
from common.wire import Answer, FromActor, Grant, Message
from learner.leases import Peer

log = logging.getLogger("isentrope.desk")


@dataclass(slots=True)
class Due:
    """What the same commit lets out. `acks` are result tickets by the connection that owes them."""

    records: int = 0
    issued: bool = False
    admitted: bool = False
    acks: dict[Peer, list[int]] = field(default_factory=dict)
    messages: list[tuple[Peer, Message]] = field(default_factory=list)
    values: list[tuple[Future[Any], Any]] = field(default_factory=list)


class Outbox:
    """Belongs to the desk's thread. `lost` hears of connections that take no message any more,
    `wake` ends the desk's waiting when a commit is over.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        journal: Journal,
        identity: dict[str, Any],
        failpoint: Failpoint,
        *,
        lost: Callable[[Peer], None],
        wake: Callable[[], None],
    ) -> None:
        self.blocked = ""  # why nothing is let out just now
        self._socket, self._journal, self._identity = socket, journal, identity
        self._fail, self._lost, self._wake = failpoint, lost, wake
        self._codec = Codec(FromActor)
        self._due, self._promised = Due(), Due()
        self._disk = ThreadPoolExecutor(1, "journal")
        self._writing: Future[None] | None = None

    def append(self, record: AnyRecord) -> Position:
        self._due.records += 1
        self._due.issued |= isinstance(record, Issue)
        self._due.admitted |= isinstance(record, Admit)
        return self._journal.append(record)

    def send(self, peer: Peer, message: Message) -> None:
        self._due.messages.append((peer, message))

    def acknowledge(self, peer: Peer, ticket: int) -> None:
        """One message a connection and commit says it for all its results."""
        self._due.acks.setdefault(peer, []).append(ticket)

    def resolve(self, future: Future[Any], value: Any) -> None:
        """Unless somebody cancels it before."""
        self._due.values.append((future, value))

    def turn(self) -> None:
        """Let out what has become durable, and begin to write what came since. Never waits, but
        while the disk is full it tries again itself.
        """
        if self._writing is not None and not self._writing.done():
            return
        try:
            self._end_commit()
        except DiskFull as error:
            if not self.blocked:
                log.error("%s; nothing is acknowledged or issued until there is space", error)
            self.blocked = str(error)
            return
        if self.blocked:
            log.info("there is space again; going on")
            self.blocked, self._due.records = "", 0
        self._let_out(self._promised)
        self._promised, self._due = self._due, Due()
        if self._promised.records:
            self._writing = self._disk.submit(self._journal.commit)
            self._writing.add_done_callback(lambda _: self._wake())
        else:
            self._let_out(self._promised)
            self._promised = Due()

    def deliver(self, peer: Peer, message: Message) -> bool:
        """At once: for what depends on no record. False when the connection is gone."""
        try:
            self._socket.send_multipart([peer, self._codec.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False  # gone, or so stuck that its queue is full
        return True

    def close(self) -> None:
        """Let out all that is due, unless the disk is full."""
        self.turn()
        while self._writing is not None:
            wait([self._writing])
            self.turn()
        self._disk.shutdown()

    def abandon(self, error: BaseException) -> None:
        """The desk is dead: whoever waits for a value hears why."""
        for future, _ in [*self._promised.values, *self._due.values]:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._disk.shutdown()

    def _end_commit(self) -> None:
        """Raises what the commit raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
        elif self.blocked:
            self._journal.commit()

    def _let_out(self, due: Due) -> None:
        if due.issued:
            self._fail("after_issue")
        if due.admitted:
            self._fail("after_append")
        for peer, (ticket, *also) in due.acks.items():
            answer = Answer(ticket=ticket, verdict="ack", also=tuple(also), **self._identity)
            self._say(peer, answer)
            for _ in (ticket, *also):
                self._fail("after_ack")
        for peer, message in due.messages:
            self._say(peer, message)
            if isinstance(message, Grant):
                self._fail("after_send")
        for future, value in due.values:
            if future.set_running_or_notify_cancel():
                future.set_result(value)

    def _say(self, peer: Peer, message: Message) -> None:
        if not self.deliver(peer, message):
            self._lost(peer)
