"""What the parts of the desk share: the ledger, who works on what, and what is to be said. A record
is journaled and folded in here and nowhere else; what is said waits for the records before it.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from common import wire
from common.records import AnyRecord, Drop
from common.wire import Answer, Group
from learner.leases import Leases, Peer
from learner.ledger import Ledger
from learner.outbox import Outbox

log = logging.getLogger("isentrope.desk")


@dataclass(slots=True)
class Books:
    """Belongs to the desk's thread."""

    identity: dict[str, Any]  # run and incarnation, which stand in every message
    ledger: Ledger
    leases: Leases
    outbox: Outbox
    counts: Counter[str] = field(default_factory=Counter)  # refusals by reason, verdicts, actors
    version: int = -1  # newest published

    def write(self, record: AnyRecord, group: Group | None = None) -> None:
        """`group` is the decoded frame of an Admit."""
        self.ledger.apply(record, self.outbox.append(record), group)

    def answer(self, peer: Peer, ticket: int, verdict: wire.Verdict, reason: str = "") -> None:
        self.counts[f"answer_{verdict}"] += 1
        answer = Answer(ticket=ticket, verdict=verdict, reason=reason, **self.identity)
        self.outbox.send(peer, answer)

    def give_back(self, id_: int, blame: str, reason: str) -> None:
        """An attempt failed: the ticket waits for the next one, or its budget is spent."""
        self.counts[f"returned_{blame}"] += 1
        if not self.leases.give_back(id_, blame):
            log.warning(
                "ticket %d is dropped as failed: its %s budget is spent (last: %s)",
                id_,
                blame,
                reason,
            )
            self.end(id_, "failed")

    def end(self, id_: int, reason: str) -> None:
        self.leases.end(id_)
        self.write(Drop(ticket=id_, reason=reason))
