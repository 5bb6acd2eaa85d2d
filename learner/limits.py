"""What one connection may cost the desk: how often it may be wrong, how fast it may talk, how much
it may say that it holds. Sizes of messages are the socket's business (common/channel.py), tickets
outstanding that of credits (learner/issuer.py, roster.MOST_CREDIT).

A peer whose messages cannot be used is told why, a few times; then they are only counted; then they
are dropped unread for a while. Those who have not introduced themselves share one account and are
always read, for the next of their messages may be somebody's Hello. And whoever floods waits: after
a turn that was mostly waste the desk looks away for a moment, and the flood stands in the flooder's
own queue, while an honest peer's few messages have queues of their own.

Times are `time.monotonic()` seconds given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import WireError
from common.wire import Group, Hello
from learner.leases import Peer

EXPLAINED = 32.0  # refusals that are answered and logged at once, and …
EXPLAINED_PER_S = 1.0  # … later on
MUTED_AFTER = 256.0  # refusals beyond these
MUTED_S = 60.0
TALK = 8_192.0  # messages that are no results at once (an actor that leaves gives much back), and …
TALK_PER_S = 512.0  # … later on
MOST_HELD = 16_384  # tickets in one message
MOST_SAID = 256 << 10  # bytes of a message that is no result: so many tickets, and some words
LONGEST_NAME = 200  # letters
WASTE = 32  # useless messages in a turn …
REST_MS = 30  # … after which the desk looks away
STRANGERS: Peer = b""


@dataclass(slots=True)
class Bucket:
    """Runs over when more is taken than flows in; may go below empty."""

    size: float
    per_s: float
    level: float = 0.0
    at: float = 0.0

    def take(self, now: float) -> float:
        """One; what is left."""
        if not self.at:
            self.level = self.size
        else:
            self.level = min(self.size, self.level + (now - self.at) * self.per_s)
        self.at = now
        self.level -= 1.0
        return self.level


def _explained() -> Bucket:
    return Bucket(EXPLAINED, EXPLAINED_PER_S)


def _talk() -> Bucket:
    return Bucket(TALK, TALK_PER_S)


@dataclass(slots=True)
class _Account:
    refusals: Bucket = field(default_factory=_explained)
    talk: Bucket = field(default_factory=_talk)
    muted_until: float = 0.0


class Limits:
    """Belongs to the desk's thread."""

    def __init__(self) -> None:
        self._accounts: dict[Peer, _Account] = {}
        self._wasted = 0  # in this turn

    def is_muted(self, peer: Peer, now: float) -> bool:
        """Whether what it sends is dropped unread."""
        account = self._accounts.get(peer)
        muted = account is not None and now < account.muted_until
        self._wasted += muted
        return muted

    def check(self, peer: Peer, message: object, now: float, nbytes: int = 0) -> None:
        """Raises WireError(`oversized` | `name` | `rate` | `outstanding`) for a readable message
        that is too much. A result may be large, and is no talk.
        """
        if isinstance(message, Group):
            return
        if nbytes > MOST_SAID:
            raise WireError("oversized", f"{nbytes} bytes; what is no result has {MOST_SAID}")
        if isinstance(message, Hello) and not _is_name(message.actor):
            raise WireError("name", f"an actor's has 1 to {LONGEST_NAME} printable letters")
        named = len(getattr(message, "held", ()))
        named += len(message.owed) if isinstance(message, Hello) else 0
        if named > MOST_HELD:
            raise WireError("outstanding", f"{named} tickets; at most {MOST_HELD} can be held")
        if peer != STRANGERS:
            self.talk(peer, now)

    def talk(self, peer: Peer, now: float) -> None:
        """A message that is no result that somebody waits for. Raises WireError(`rate`)."""
        if self._account(peer).talk.take(now) < 0:
            raise WireError("rate", f"more than {TALK_PER_S:g} messages a second")

    def refuse(self, peer: Peer, now: float) -> bool:
        """A message was refused; whether to say so, to the peer and in the log."""
        self._wasted += 1
        account = self._account(peer)
        left = account.refusals.take(now)
        if left < -MUTED_AFTER and peer != STRANGERS:
            account.muted_until = now + MUTED_S
            account.refusals = _explained()
        return left >= 0

    def waste(self) -> None:
        """A message that was good for nothing, and nobody's fault."""
        self._wasted += 1

    def forget(self, peer: Peer) -> None:
        """The connection is gone."""
        self._accounts.pop(peer, None)

    @property
    def flooded(self) -> bool:
        """This turn has read enough that was good for nothing."""
        return self._wasted >= WASTE

    def rest_ms(self) -> int:
        """At the end of a turn: how long to look away from the socket."""
        wasted, self._wasted = self._wasted, 0
        return REST_MS if wasted >= WASTE else 0

    def _account(self, peer: Peer) -> _Account:
        return self._accounts.setdefault(peer, _Account())


def _is_name(name: str) -> bool:
    """It stands in logs and tables, in one line of its own."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable()
