"""Who works on which open ticket just now, and how often it went wrong. Soft state: a restart
forgets it.

Times are `time.monotonic()` seconds given by the caller.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Peer = bytes  # routing id of a connection
SLOW = 4.0  # times as long as the longest of the last answers: somebody else is asked as well
LATELY = 64  # answers
LOOKS = 8  # for slow ones, in the length of a lease
ANY_ATTEMPT = -1  # claimed by an actor from an earlier life of the learner, which knew the number


@dataclass(slots=True)
class Lease:
    peer: Peer
    attempt: int
    expires: float
    since: float  # when the ticket was given to `peer`


@dataclass(slots=True)
class Leases:
    lease_s: float
    infra_budget: int
    data_budget: int
    waiting: deque[int] = field(default_factory=deque)  # open tickets that nobody holds
    held: dict[int, Lease] = field(default_factory=dict)
    expired: int = 0
    _load: Counter[Peer] = field(default_factory=Counter)  # tickets held by each connection
    _quiet_until: float = math.inf  # no lease ends before
    _attempts: Counter[int] = field(default_factory=Counter)
    _infra: Counter[int] = field(default_factory=Counter)
    _data: Counter[int] = field(default_factory=Counter)
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))  # seconds an answer
    _look_at: float = -math.inf
    # held no more, and worked on, since when
    _shared: dict[Peer, dict[int, float]] = field(default_factory=dict)

    def of(self, peer: Peer) -> list[int]:
        return [id_ for id_, lease in self.held.items() if lease.peer == peer]

    def count(self) -> Counter[Peer]:
        load = +self._load
        for peer, ids in self._shared.items():
            load[peer] += len(ids)
        return load

    def lease(self, id_: int, peer: Peer, now: float) -> int:
        """Give ticket `id_` to `peer`; the number of this attempt."""
        attempt = self._attempts[id_]
        self._attempts[id_] += 1
        self._put(id_, Lease(peer, attempt, now + self.lease_s, now))
        return attempt

    def slow(self, now: float) -> list[int]:
        """Tickets that somebody holds far longer than any of the last answers took, and longer than
        a lease; the oldest first. Looks a few times a lease and says nothing in between.
        """
        if now < self._look_at or not self._took:
            return []
        self._look_at = now + self.lease_s / LOOKS
        limit = max(self.lease_s, SLOW * max(self._took))
        found = [
            (lease.since, id_) for id_, lease in self.held.items() if now - lease.since > limit
        ]
        return [id_ for _, id_ in sorted(found)]

    def share(self, id_: int, peer: Peer, now: float) -> int:
        """Give `peer` the ticket as well, as another attempt. Whoever had it is not told, and has
        no room for another one until it has answered, dropped it or left.
        """
        before = self.held[id_]
        self._shared.setdefault(before.peer, {})[id_] = before.since
        return self.lease(id_, peer, now)

    def works_on(self, id_: int, peer: Peer) -> bool:
        """Whether `peer` has the ticket, be it its own or another's by now."""
        return self.is_held(id_, peer) or id_ in self._shared.get(peer, ())

    def forget(self, peer: Peer) -> None:
        """The connection is gone, with all that it worked on."""
        self._shared.pop(peer, None)

    def claim(self, ids: Iterable[int], peer: Peer, now: float) -> None:
        """`peer` says it has these tickets: they are its own again, at the attempt they were."""
        for id_ in ids:
            lease = self.held.get(id_)
            attempt = lease.attempt if lease else ANY_ATTEMPT
            if lease is None and id_ in self.waiting:
                self.waiting.remove(id_)
            self._put(id_, Lease(peer, attempt, now + self.lease_s, now))

    def renew(self, ids: Sequence[int], peer: Peer, now: float) -> None:
        """`peer` says what it holds."""
        shared = self._shared.pop(peer, {})
        if left := {id_: shared[id_] for id_ in ids if id_ in shared}:
            self._shared[peer] = left
        for id_ in ids:
            lease = self.held.get(id_)
            if lease is not None and lease.peer == peer:
                lease.expires = now + self.lease_s

    def postpone(self, seconds: float) -> None:
        """The learner itself stood still: nobody's lease ran in that time."""
        for lease in self.held.values():
            lease.expires += seconds
            lease.since += seconds
        for shared in self._shared.values():
            shared.update({id_: since + seconds for id_, since in shared.items()})

    def answered(self, id_: int, peer: Peer, now: float) -> None:
        """`peer` sent the group of the ticket, which is admitted. Also one that was shared says how
        long answers take: else all that take so long would be shared for ever.
        """
        lease, since = self.held.get(id_), self._shared.get(peer, {}).get(id_)
        if lease is not None and lease.peer == peer:
            since = lease.since
        if since is not None:
            self._took.append(now - since)
        self.end(id_)

    def end(self, id_: int) -> None:
        """The ticket is closed or its group admitted."""
        if not self._take(id_) and id_ in self.waiting:
            self.waiting.remove(id_)
        for counter in (self._attempts, self._infra, self._data):
            counter.pop(id_, None)

    def give_back(self, id_: int, blame: str) -> bool:
        """Attempt failed; True when the ticket may be tried again (it waits, in front), False when
        its budget is spent.
        """
        self._take(id_)
        if blame == "infra":
            self._infra[id_] += 1
        elif blame == "data":
            self._data[id_] += 1
        if self._infra[id_] >= self.infra_budget or self._data[id_] >= self.data_budget:
            return False
        self.waiting.appendleft(id_)
        return True

    def overdue(self, now: float) -> list[int]:
        if now <= self._quiet_until:
            return []
        late = [id_ for id_, lease in self.held.items() if lease.expires < now]
        self.expired += len(late)
        self._quiet_until = min((lease.expires for lease in self.held.values()), default=math.inf)
        return late

    def _put(self, id_: int, lease: Lease) -> None:
        self._take(id_)
        self._shared.get(lease.peer, {}).pop(id_, None)  # its own again: it has it once
        self.held[id_] = lease
        self._load[lease.peer] += 1
        self._quiet_until = min(self._quiet_until, lease.expires)

    def _take(self, id_: int) -> bool:
        lease = self.held.pop(id_, None)
        if lease is None:
            return False
        self._load[lease.peer] -= 1
        if not self._load[lease.peer]:
            del self._load[lease.peer]
        return True

    def is_held(self, id_: int, peer: Peer, attempt: int | None = None) -> bool:
        """Whether `peer` holds the ticket, at this attempt when one is given."""
        lease = self.held.get(id_)
        if lease is None or lease.peer != peer:
            return False
        return attempt is None or lease.attempt in (attempt, ANY_ATTEMPT)
