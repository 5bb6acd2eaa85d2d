"""What tests of episodes share: an engine that says what it is told, a stage, tickets on sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from actor import text
from actor.config import ScriptedConfig
from actor.engine.base import Sample
from actor.engine.scripted import ScriptedEngine
from actor.grade.pool import Pool
from actor.stage import LATER, Budget, Stage
from actor.voice import Voices
from common import models
from common.episodes import Episode
from common.failpoints import Failpoint
from common.wire import Finish, GradePart, Grading, Sampling, Ticket
from tests.builders import make_ticket

TINY = models.find("tiny")
EXACT = Grading(
    gold="19", parts=(GradePart(name="correct", grader="exact", options={"after": "#"}),)
)
WORDS = text.load(TINY, 32)
EOS = 2


def tokens_of(written: str) -> list[int]:
    """Of a text without spaces; <eos> is the end."""
    answer, _, end = written.partition("<eos>")
    return [*WORDS.encode(answer).tolist(), *([EOS] if written.endswith("<eos>") else end)]


class Call(NamedTuple):
    prefix: list[int]
    n: int
    sampling: Sampling
    first: int


class Speaker(ScriptedEngine):
    """Rollout i says `answers[i]` in turn, whatever it is asked; an answer without <eos> was cut.
    Turn k comes from version 3 + k."""

    def __init__(self, answers: dict[int, list[str]], max_length: int = 128) -> None:
        super().__init__(ScriptedConfig(), slots=4, max_length=max_length)
        self.calls: list[Call] = []
        self._answers = {number: list(said) for number, said in answers.items()}
        self._turn: dict[int, int] = {}

    async def generate(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        *,
        first: int = 0,
        deadline: float | None = None,
    ) -> list[Sample]:
        self.calls.append(Call(prefix.tolist(), n, sampling, first))
        return [self._sample(number % LATER) for number in range(first, first + n)]

    def _sample(self, number: int) -> Sample:  # type: ignore[override]
        turn = self._turn.get(number, 0)
        self._turn[number] = turn + 1
        said = self._answers[number].pop(0)
        tokens = np.array(tokens_of(said), np.int32)
        finish: Finish = "stop" if said.endswith("<eos>") else "length"
        if said == "aborted":
            return Sample(tokens[:0], np.zeros(0, np.float32), ((0, 3),), "aborted")
        logps = np.linspace(-1, -0.1, tokens.size, dtype=np.float32)
        return Sample(tokens, logps, ((0, 3 + turn),), finish)


def stage(engine: Any, pool: Pool, voices: Voices | None = None) -> Stage:
    return Stage(engine, WORDS, pool, Failpoint(), voices or Voices(), Budget())


def asks(n: int, episode: Episode | None, grading: Grading = EXACT, **fields: Any) -> Ticket:
    chosen: dict[str, Any] = {"temperature": 0.7, "max_tokens": 20, "seed": 5} | fields
    sampling = Sampling(stop=(EOS,), **chosen)
    prompt = tokens_of("12+7?")
    return make_ticket(5, prompt=prompt, n=n, sampling=sampling, grading=grading, episode=episode)


Make = Callable[..., Stage]
