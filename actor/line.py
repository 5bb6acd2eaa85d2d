"""The line to the learner: one connection after another, each a fresh socket with a Hello of its
own.

A routing id is never used twice, so a learner that lost its memory, or a message that died with a
socket, can always be told from a live conversation: reconnecting is the one cure for every doubt.
"""

from __future__ import annotations

import asyncio
import logging

import zmq
import zmq.asyncio

from common.channel import Keys, connect_dealer
from common.codec import Codec
from common.errors import ConfigError, DeadlineError, IsentropeError, WireError
from common.wire import Answer, FromActor, FromLearner, Hello, Refused, Welcome

log = logging.getLogger(__name__)

FLUSH_MS = 1_000  # what is still to be sent when the line closes for good


class Line:
    """Speaks only once welcomed: until then whatever is sent is dropped, for the next Hello says it
    all.
    """

    def __init__(
        self,
        endpoint: str,
        max_bytes: int,
        keys: Keys | None = None,
        welcome_s: float = 10.0,
        silence_s: float = 5.0,
        context: zmq.asyncio.Context | None = None,
    ) -> None:
        """`context`: one that others use too (many actors in one process), closed by its owner; its
        own otherwise."""
        self.endpoint, self.welcome_s, self.silence_s = endpoint, welcome_s, silence_s
        self.heartbeat_s, self.lease_s = 1.0, 30.0  # until the learner says otherwise
        self.malformed = 0
        self._codec, self._max_bytes, self._keys = Codec(FromLearner, max_bytes), max_bytes, keys
        self._shared = context is not None
        self._context = context or zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._up = False

    async def greet(self, hello: Hello) -> Welcome:
        """Open a fresh connection. Raises DeadlineError (nobody answered), WireError (say Hello
        again) or what ends the actor: ConfigError, IsentropeError."""
        self.hang_up()
        self._socket = connect_dealer(self._context, self.endpoint, self._keys, self._max_bytes)
        await self._socket.send(self._codec.encode(hello))
        try:
            async with asyncio.timeout(self.welcome_s):
                while not isinstance(message := await self._next(self._socket), Welcome):
                    if isinstance(message, Answer) and message.ticket < 0:
                        raise ConfigError(
                            f"the learner at {self.endpoint} cannot use this actor's Hello: "
                            f"{message.reason}; start both with the same code"
                        )
        except TimeoutError:
            raise DeadlineError(
                f"no answer from a learner at {self.endpoint} within {self.welcome_s:g} s "
                "(not up, or its keys and run.keys do not fit)"
            ) from None
        self.heartbeat_s, self.lease_s = message.heartbeat_s, message.lease_s
        self._up = True
        return message

    async def receive(self) -> FromLearner:
        """The next message; raises as `greet`, DeadlineError when the learner is silent for too
        long.
        """
        assert self._socket is not None, "receive() comes after greet()"
        patience_s = max(3 * self.heartbeat_s, self.silence_s)
        try:
            async with asyncio.timeout(patience_s):
                return await self._next(self._socket)
        except TimeoutError:
            raise DeadlineError(f"the learner was silent for {patience_s:g} s") from None

    def encode(self, message: FromActor) -> bytearray:
        """Raises WireError(`oversized`)."""
        return self._codec.encode(message)

    async def send(self, message: FromActor) -> None:
        await self.send_frame(self._codec.encode(message))

    async def send_frame(self, frame: bytearray) -> None:
        if not self._up or (socket := self._socket) is None:
            return
        try:
            await socket.send(frame)
        except asyncio.CancelledError:  # also when the socket is closed while its queue is full
            task = asyncio.current_task()
            if not socket.closed or task is None or task.cancelling():
                raise

    def hang_up(self, linger_ms: int = 0) -> None:
        self._up = False
        if self._socket is not None:
            self._socket.close(linger_ms)
            self._socket = None

    async def close(self) -> None:
        """Waits at most `FLUSH_MS` for the last words to leave; those on a shared context leave
        before its owner has closed it."""
        self.hang_up(FLUSH_MS)
        if not self._shared:
            await asyncio.to_thread(self._context.term)

    async def _next(self, socket: zmq.asyncio.Socket) -> FromLearner:
        while True:
            frame = await socket.recv()
            try:
                message: FromLearner = self._codec.decode(frame)
            except WireError as error:
                self.malformed += 1
                log.warning("a message of the learner is ignored: %s", error)
                continue
            if isinstance(message, Refused):
                raise _refusal(message, self.endpoint)
            return message


def _refusal(refused: Refused, endpoint: str) -> IsentropeError:
    """ "hello" means: introduce yourself again. Everything else is final."""
    if refused.reason == "hello":
        return WireError("hello", "the learner does not know this connection")
    both = f"it has {refused.ours!r}, this actor {refused.theirs!r}"
    said = f"the learner at {endpoint} refused this actor: {refused.reason}: {both}"
    if refused.reason == "quarantined":
        return IsentropeError(f"{said}; too many invalid results: see the learner's log")
    return ConfigError(f"{said}; start both with the same code and the same recipe")
