"""What an episode is played with, and one answer in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from actor.engine.base import Engine, Sample
from actor.grade.pool import Pool, Verdict
from actor.text import Decode, Text
from actor.voice import Voices
from common.episodes import SOLVED
from common.failpoints import Failpoint
from common.wire import Role, Rollout, Segment, Ticket


@dataclass(slots=True)
class Budget:
    """Hint tokens of one actor against all that its policy sampled where hints are asked for."""

    sampled: int = 0
    hints: int = 0

    def take(self, tokens: int, share: float) -> bool:
        """Whether so many hint tokens are still within the share; then they are spent."""
        fits = self.hints + tokens <= share * self.sampled
        self.hints += tokens if fits else 0
        return fits

    @property
    def share(self) -> float:
        return self.hints / max(1, self.sampled)


LATER = 1 << 32  # rollout numbers of later turns and continuations: noise of their own


class Stage(NamedTuple):
    engine: Engine
    text: Text
    pool: Pool
    fail: Failpoint
    voices: Voices
    budget: Budget


class Answer(NamedTuple):
    """One sampled answer, what it reads, and what its graders said."""

    sample: Sample
    text: str
    verdict: Verdict

    @property
    def correct(self) -> float:
        return next(iter(self.verdict.parts.values()), 0.0)

    @property
    def solved(self) -> bool:
        return not self.verdict.error and self.correct >= SOLVED


@dataclass(slots=True)
class Clock:
    """Seconds that the parts of an episode took."""

    began: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=dict)
    _mark: float = field(default_factory=time.monotonic)

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.spent[part] = self.spent.get(part, 0.0) + now - self._mark
        self._mark = now


async def judged(samples: Sequence[Sample], ticket: Ticket, stage: Stage) -> list[Answer]:
    """What was sampled, read and graded."""
    texts = [written(sample, ticket.sampling.stop, stage.text) for sample in samples]
    prompt = stage.text(ticket.prompt.tolist())
    verdicts = await stage.pool.grade(prompt, texts, ticket.grading)
    return [Answer(*made) for made in zip(samples, texts, verdicts, strict=True)]


def written(sample: Sample, stop: Sequence[int], decode: Decode) -> str:
    """What the policy wrote before its stop token."""
    tokens = sample.tokens.tolist()
    if ended(sample, stop):
        tokens.pop()
    return decode(tokens)


def ended(sample: Sample, stop: Sequence[int]) -> bool:
    """Whether its last token is the one that stopped it."""
    return sample.finish == "stop" and sample.tokens.size > 0 and int(sample.tokens[-1]) in stop


def policy(sample: Sample, temperature: float, turn: int = 0) -> Segment:
    return Segment(
        role="policy",
        tokens=sample.tokens,
        logps=sample.logps,
        spans=sample.spans,
        temperature=temperature,
        turn=turn,
    )


def given(tokens: Sequence[int] | np.ndarray, after: Segment, role: Role, turn: int) -> Segment:
    """What somebody else wrote behind a segment. It has no version of its own: it says that of the
    token before it."""
    return Segment(
        role=role,
        tokens=np.asarray(tokens, np.int32),
        logps=np.zeros(len(tokens), np.float32),
        spans=((0, after.spans[-1][1]),),
        turn=turn,
    )


def rollout(
    segments: Sequence[Segment], answers: Sequence[Answer], events: dict[str, int] | None = None
) -> Rollout:
    """The fact that travels: all segments, the last answer's end and correctness, the reward parts
    of every turn."""
    last = answers[-1]
    parts = tuple(answer.verdict.parts for answer in answers if answer.verdict.parts)
    return Rollout(
        segments=tuple(segments),
        finish=last.sample.finish,
        correct=last.correct,
        parts=parts,
        error=last.verdict.error,
        events=events or {},
    )
