"""The prompt stream: source → text → tokens, once, here; actors get token ids and never tokenise a
prompt again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import DataError
from common.wire import GradePart, Grading, Sampling
from learner.config import PromptsConfig
from learner.prompts.source import Problem, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Draft(NamedTuple):
    """A prompt ready to become a ticket. `cursor`: its position in the stream, -1 outside of it."""

    problem: str
    prompt: np.ndarray  # int32 [P]
    grading: Grading
    template: str
    source: str
    cursor: int


class Prompts:
    """Pure: the same cursor gives the same draft, whenever and however often it is asked."""

    def __init__(
        self,
        source: Source,
        config: PromptsConfig,
        tokenizer: PreTrainedTokenizerFast,
        stop: tuple[int, ...],
        seed: int,
        max_prompt: int,
    ) -> None:
        self._source = source
        self._config = config
        self._tokenizer = tokenizer
        self._stop = stop
        self._seed = seed
        self._max_prompt = max_prompt
        self._parts = tuple(
            GradePart(name=p.name, grader=p.grader, weight=p.weight, options=p.options)
            for p in config.reward
        )

    def draw(self, cursor: int) -> Draft:
        return self._draft(self._source.train(cursor), cursor)

    def heldout(self, index: int) -> Draft:
        return self._draft(self._source.heldout(index), -1)

    def sampling(self, ticket: int, temperature: float, max_tokens: int) -> Sampling:
        digest = hashlib.blake2b(f"{self._seed}/{ticket}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "big") >> 1
        return Sampling(temperature=temperature, max_tokens=max_tokens, stop=self._stop, seed=seed)

    def _draft(self, problem: Problem, cursor: int) -> Draft:
        ids = self._tokenizer(problem.text, add_special_tokens=False)["input_ids"]
        if not 0 < len(ids) <= self._max_prompt:
            raise DataError(
                f"problem {problem.id}: a prompt of {len(ids)} tokens; the model's context leaves "
                f"room for 1 to {self._max_prompt} beside learner.max_tokens"
            )
        grading = Grading(gold=problem.gold, parts=self._parts, columns=problem.columns)
        return Draft(
            problem.id, np.asarray(ids, np.int32), grading, "plain", self._source.name, cursor
        )
