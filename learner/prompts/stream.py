"""The prompt stream: source → text → tokens, once, here; actors get token ids and never tokenise a
prompt again.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import DataError
from common.wire import GradePart, Grading, Sampling
from learner.prompts.chat import Renderer
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Problem, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("isentrope.prompts")

MOST_UNFIT = 1_000  # problems in a row that no prompt can be made of
NAMED = 10  # of them get a line of their own


class Draft(NamedTuple):
    """A prompt ready to become a ticket. `cursor`: its position in the stream, -1 outside of it."""

    problem: str
    prompt: np.ndarray  # int32 [P]
    grading: Grading
    template: str
    source: str
    cursor: int
    text: str = ""  # the problem's own words


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
        self._render = Renderer(config, tokenizer)
        self._stop = tuple(sorted({*stop, *self._render.stop}))
        self._seed = seed
        self._max_prompt = max_prompt
        self._unfit: set[str] = set()  # problems that were passed over
        self._heldout: dict[int, list[Draft]] = {}
        self._parts = parts_of(config)

    def draw(self, cursor: int) -> Draft:
        """The first problem from `cursor` on of which a prompt can be made. Raises DataError when
        there is none for long."""
        for position in range(cursor, cursor + MOST_UNFIT):
            draft = self._draft(self._source.train(position), position)
            if draft is not None:
                return draft
        raise DataError(f"{MOST_UNFIT} problems in a row do not fit; {self._room()}")

    def heldout(self, count: int) -> list[Draft]:
        """The first `count` different held-out problems, fewer when there are no more."""
        if count not in self._heldout:
            self._heldout[count] = self._find_heldout(count)
        return self._heldout[count]

    def _find_heldout(self, count: int) -> list[Draft]:
        found: dict[str, Draft] = {}
        for index in range(count + MOST_UNFIT):
            problem = self._source.heldout(index)
            if problem is None or len(found) == count:
                break
            draft = self._draft(problem, -1)
            if draft is not None:
                found.setdefault(draft.problem, draft)
        if not found:
            raise DataError(f"no held-out problem fits; {self._room()}")
        if len(found) < count:
            log.warning("%d held-out problems: there are no %d different ones", len(found), count)
        return list(found.values())

    def sampling(self, ticket: int, temperature: float, max_tokens: int) -> Sampling:
        digest = hashlib.blake2b(f"{self._seed}/{ticket}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "big") >> 1
        return Sampling(temperature=temperature, max_tokens=max_tokens, stop=self._stop, seed=seed)

    def _draft(self, problem: Problem, cursor: int) -> Draft | None:
        """None when no prompt can be made of it, which is said once a problem."""
        ids = self._render(problem.text)
        if not 0 < len(ids) <= self._max_prompt:
            self._pass_over(problem.id, len(ids))
            return None
        grading = Grading(gold=problem.gold, parts=self._parts, columns=problem.columns)
        template = "chat" if self._render.chat else "plain"
        return Draft(problem.id, ids, grading, template, self._source.name, cursor)

    def _pass_over(self, problem: str, tokens: int) -> None:
        if problem in self._unfit:
            return
        self._unfit.add(problem)
        count = len(self._unfit)
        if count <= NAMED or count % 1_000 == 0:
            message = "problem %s passed over, a prompt of %d tokens (%d so far); %s"
            log.warning(message, problem, tokens, count, self._room())

    def _room(self) -> str:
        return (
            f"the model's context leaves room for 1 to {self._max_prompt} tokens beside "
            "learner.max_tokens"
        )


def parts_of(config: PromptsConfig) -> tuple[GradePart, ...]:
    """The parts of the reward; `grader` alone is one, named "correct"."""
    if not config.parts:
        only = GradePart(name="correct", grader=config.grader, options=config.grader_options)
        return (only,)
    return tuple(
        GradePart(name=p.name, grader=p.grader, weight=p.weight, options=p.options)
        for p in config.parts
    )
