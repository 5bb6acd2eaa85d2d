"""What an audit found: the sums of every kind of ticket, and what is wrong."""

from __future__ import annotations

import msgspec


class KindSums(msgspec.Struct, kw_only=True):
    """What became of the tickets of one kind; counted ticket by ticket."""

    issued: int = 0
    trained: int = 0
    evaluated: int = 0
    scored: int = 0
    dropped: dict[str, int] = {}
    buffered: int = 0
    in_flight: int = 0

    @property
    def conserved(self) -> bool:
        ended = self.trained + self.evaluated + self.scored + sum(self.dropped.values())
        return self.issued == ended + self.buffered + self.in_flight


class Audit(msgspec.Struct, kw_only=True):
    """`ok`: every promise that the journal and the checkpoints can prove was kept."""

    run: str = ""
    ok: bool = True
    violations: list[str] = []
    complete: bool = True  # False: the journal was pruned, and only what is left was checked
    sums: dict[str, KindSums] = {}
    steps: int = 0
    incarnations: int = 0
    checkpoints: int = 0  # whose weights are those of their step's record
    max_lag: int = 0  # allowed
    lag_max: int = 0  # of any rollout trained on
    lag_mean: float = 0.0
    finished: str = ""

    @property
    def holds(self) -> bool:
        return self.ok
