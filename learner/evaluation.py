"""Held-out evaluation: which problems were asked, how they came out, under which weight
versions.
"""

from __future__ import annotations

import math
from itertools import accumulate

import msgspec

from common.wire import Group
from learner.turns import solved_at


class Evaluation(msgspec.Struct, kw_only=True):
    """One point: a fold over its admitted eval groups. Rollouts whose grader failed are counted,
    never scored.
    """

    issued: list[str] = []  # problems asked
    groups: int = 0
    failed: int = 0  # tickets that ended without a group
    rollouts: int = 0
    errors: int = 0
    correct: float = 0.0
    graded: int = 0  # problems with at least one graded rollout
    squares: float = 0.0  # Σ over problems of (mean correctness of its rollouts)²
    solved: int = 0  # problems with at least one right rollout (pass@samples)
    tokens: int = 0
    oldest: int = -1  # weight versions seen
    newest: int = -1
    sources: dict[str, tuple[int, float]] = {}  # of each: rollouts graded, sum of correctness
    solved_at: list[int] = []  # rollouts solved at turn 0, 1, …

    def add(self, group: Group) -> None:
        graded = [r for r in group.rollouts if not r.error]
        versions = [v for r in group.rollouts for s in r.segments for _, v in s.spans]
        self.groups += 1
        self.rollouts += len(graded)
        self.errors += len(group.rollouts) - len(graded)
        self.correct += sum(r.correct for r in graded)
        self.graded += bool(graded)
        self.squares += (sum(r.correct for r in graded) / max(1, len(graded))) ** 2
        self.solved += any(r.correct >= 1.0 for r in graded)
        self.tokens += sum(r.length for r in group.rollouts)
        self.oldest = min(versions) if self.oldest < 0 else min(self.oldest, *versions)
        self.newest = max(self.newest, *versions)
        count, right = self.sources.get(group.source, (0, 0.0))
        right += sum(r.correct for r in graded)
        self.sources = {**self.sources, group.source: (count + len(graded), right)}
        for rollout in graded:
            if (turn := solved_at(rollout)) is not None:
                missing = turn + 1 - len(self.solved_at)
                self.solved_at = self.solved_at + [0] * missing
                self.solved_at[turn] += 1

    def is_complete(self, problems: int) -> bool:
        return len(self.issued) >= problems and self.is_answered

    @property
    def is_answered(self) -> bool:
        """Every ticket of it has ended."""
        return self.groups + self.failed >= len(self.issued)

    @property
    def accuracy(self) -> float:
        return self.correct / self.rollouts if self.rollouts else math.nan

    @property
    def by_turn(self) -> dict[str, float]:
        """Share of the rollouts solved at turn k or before; the last turn at which one was is the
        last one here."""
        sums = accumulate(self.solved_at)
        return {str(k): solved / max(1, self.rollouts) for k, solved in enumerate(sums)}

    @property
    def by_source(self) -> dict[str, float]:
        """Accuracy of each source's problems."""
        return {name: right / n for name, (n, right) in sorted(self.sources.items()) if n}

    @property
    def length(self) -> float:
        """Mean tokens a rollout."""
        count = self.rollouts + self.errors
        return self.tokens / count if count else math.nan

    @property
    def standard_error(self) -> float:
        """Of the accuracy over problems: the rollouts of one problem are not independent, so that
        more of them do not make more problems. With one rollout a problem it is the binomial one.
        """
        if not self.graded:
            return math.nan
        return math.sqrt(max(self.squares / self.graded - self.accuracy**2, 0.0) / self.graded)

    def facts(self) -> dict[str, float]:
        return {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "pass_any": self.solved / self.groups if self.groups else math.nan,
            "length": self.length,
            "rollouts": self.rollouts,
            "grader_errors": self.errors,
            "version_oldest": self.oldest,
            "version_newest": self.newest,
        }
