"""What folds over the journal beside the ledger: each keeps a statistic of its own.

A follower is told of every record after the ledger has folded it, in the journal's order and in no
other way, so its state is a pure function of the journal: the same after a restart, and for any
number of actors. Checkpoints keep it as bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from common.records import AnyRecord
from learner.config import LearnerConfig
from learner.prompts import curriculum
from learner.synthesis.pool import Pool

if TYPE_CHECKING:
    from learner.ledger import Entry


class Follower(Protocol):
    def follow(self, record: AnyRecord, entry: Entry | None) -> None:
        """`entry` is the ticket of an Issue or an Admit (then with its group), else None."""
        ...

    def dump(self) -> bytes: ...

    def restore(self, data: bytes) -> None:
        """Raises JournalError when `data` is damaged."""
        ...


def followers(config: LearnerConfig, seed: int) -> dict[str, Follower]:
    """Those that `config` asks for, by name; none of them by default."""
    found: dict[str, Follower] = {}
    if config.prompts.curriculum is not None:
        found[curriculum.NAME] = curriculum.Curriculum(config.prompts.curriculum, seed)
    if config.synthesis is not None:
        found["synthesis"] = Pool(config.synthesis)
    return found
