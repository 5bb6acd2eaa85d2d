"""The ledger as a checkpoint keeps it, and its conservation lines."""

from __future__ import annotations

from typing import Any

import msgspec

from learner.evaluation import Evaluation


class Sums(msgspec.Struct, kw_only=True):
    """One kind's conservation line."""

    issued: int = 0
    trained: int = 0
    evaluated: int = 0
    scored: int = 0
    dropped: dict[str, int] = {}
    buffered: int = 0
    in_flight: int = 0

    @property
    def holds(self) -> bool:
        ended = self.trained + self.evaluated + self.scored + sum(self.dropped.values())
        return self.issued == ended + self.buffered + self.in_flight


class Fold(msgspec.Struct, kw_only=True):
    """The ledger as a checkpoint keeps it; groups and tickets are read again from the journal."""

    end: tuple[str, int]  # where the next record will stand
    oldest: tuple[str, int]  # first record that may still be needed
    next_id: int
    low: int
    closed: list[int]
    sums: dict[str, Sums]
    t: int
    cursor: int
    admitted: int
    main: list[int]
    aux: list[int]
    propose: list[int] = []
    again: list[int]  # tickets whose prompts are to be asked again …
    again_frames: list[bytes]  # … which are closed, so they are kept here
    open: list[tuple[int, int]]  # (id, order)
    evaluations: dict[str, Evaluation]
    learner_config: dict[str, Any] | None = None
    finished: str = ""
    halted: int | None = None
    followers: dict[str, bytes] = {}
