"""The prompt stream: source → curriculum → template → tokens, once, here; actors get token ids and
never tokenise a prompt again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from common.episodes import Episode
from common.errors import ConfigError, DataError
from common.grading import OPTIONS, Extraction
from common.proposals import PREFIX
from common.wire import GradePart, Grading, Kind, Sampling
from learner.prompts.chat import Renderer
from learner.prompts.config import PromptsConfig
from learner.prompts.curriculum import Curriculum
from learner.prompts.episodes import Episodes
from learner.prompts.source import Problem, Source
from learner.prompts.templates import STOP_WORDS, Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("isentrope.prompts")

MOST_UNFIT = 1_000  # problems in a row that no prompt can be made of
REMEMBERED = 10_000  # of them, so that none is said twice
NAMED = 10  # of them get a line of their own
LETTERS = 256  # no token has more: so much longer a text is not even tokenised
MOST_BYTES = 16 << 20  # of what travels with a ticket for its graders


class Draft(NamedTuple):
    """A prompt ready to become a ticket. `cursor`: its position in the stream, -1 outside of it."""

    problem: str
    prompt: np.ndarray  # int32 [P]
    grading: Grading
    template: str
    source: str
    cursor: int
    text: str = ""  # the problem's own words


class _Voice(NamedTuple):
    """How the problems of one source are asked and graded."""

    render: Renderer
    parts: tuple[GradePart, ...]


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
        episodes: Episodes | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._source = source
        alone = config.each()  # of several sources, each by itself
        self._voices = [_Voice(Renderer(one, tokenizer), parts_of(one)) for one in alone]
        self._templates = Templates(config.templates, seed) if config.templates else None
        self._stop = tuple(sorted({*stop, *self._voices[0].render.stop}))
        self.seed = seed
        self._max_prompt = max_prompt
        self._episodes = episodes
        self._unfit: set[str] = set()  # problems that were passed over lately …
        self._passed = 0  # … and how many in all
        self._heldout: dict[int, list[Draft]] = {}

    def draw(self, cursor: int, curriculum: Curriculum | None = None) -> Draft:
        """The first problem from `cursor` on of which a prompt can be made, or the one that
        `curriculum` wants next. Raises DataError when there is none for long.
        """
        if curriculum is not None:
            wanted = curriculum.choose(self._source)
        else:
            wanted = ((self._source.train(i), i) for i in range(cursor, cursor + MOST_UNFIT))
        for problem, position in islice(wanted, MOST_UNFIT):
            draft = self._draft(problem, position)
            if draft is not None:
                return draft
        raise DataError(f"{MOST_UNFIT} problems in a row do not fit; {self._room()}")

    def heldout(self, count: int) -> list[Draft]:
        """The first `count` different held-out problems, fewer when there are no more."""
        if count not in self._heldout:
            self._heldout[count] = self._find_heldout(count)
        return self._heldout[count]

    def held_out_words(self, most: int) -> Iterator[str]:
        """What the rows ask that are held out, `most` of each file; endless sources have none."""
        leaves: Sequence[Source] = getattr(self._source, "leaves", (self._source,))
        for leaf in leaves:
            for index in range(most if leaf.rows is not None else 0):
                problem = leaf.heldout(index)
                if problem is None:
                    break
                yield problem.text

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

    def made(self, problem: Problem, source: str) -> Draft | None:
        """A problem that is in no source, asked for training as those of `source` are. None: it
        does not fit.
        """
        names: tuple[str, ...] = getattr(self._source, "names", ())
        number = names.index(source) if source in names else 0
        draft = self._draft(problem._replace(number=number), 0)
        return None if draft is None else draft._replace(source=PREFIX, cursor=-1)

    def fits(self, ids: np.ndarray) -> bool:
        return 0 < len(ids) <= self._max_prompt

    def episode(self, kind: Kind, draft: Draft) -> Episode | None:
        """What comes after the first answer; None: nothing."""
        if self._episodes is None:
            return None
        return self._episodes.of(kind, draft.prompt, draft.text)

    def sampling(self, ticket: int, temperature: float, max_tokens: int) -> Sampling:
        digest = hashlib.blake2b(f"{self.seed}/{ticket}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "big") >> 1
        return Sampling(temperature=temperature, max_tokens=max_tokens, stop=self._stop, seed=seed)

    def _draft(self, problem: Problem, cursor: int) -> Draft | None:
        """None when no prompt can be made of it, which is said once a problem. `cursor` is -1 for
        a held-out one, and all of these are asked in one template.
        """
        render, parts = self._voices[problem.number]
        name, template = "chat" if render.chat else "plain", None
        if self._templates is not None:
            pick = self._templates.pick(problem.epoch, problem.id)
            name = pick if cursor >= 0 else self._templates.evaluation
            template, parts = self._templates[name], parts + self._templates.part(name)
        short = len(problem.text) <= LETTERS * self._max_prompt
        ids = render(problem.text, template) if short else np.zeros(0, np.int32)
        if why := self._misfit(problem, ids):
            self._pass_over(problem.id, why)
            return None
        grading = Grading(gold=problem.gold, parts=parts, columns=problem.columns)
        source = problem.source or self._source.name
        return Draft(problem.id, ids, grading, name, source, cursor, problem.text)

    def _misfit(self, problem: Problem, ids: np.ndarray) -> str:
        """Why no ticket can be made of it, "" when one can."""
        if not self.fits(ids):
            letters = len(problem.text)
            known = letters <= LETTERS * self._max_prompt
            size = f"{len(ids)} tokens" if known else f"{letters} characters"
            return f"a prompt of {size}; {self._room()}"
        size_bytes = len(problem.gold) + len(msgspec.msgpack.encode(problem.columns))
        if size_bytes > MOST_BYTES:
            return f"its columns have {size_bytes} bytes; {MOST_BYTES} may travel with a ticket"
        return ""

    def _pass_over(self, problem: str, why: str) -> None:
        if problem in self._unfit:
            return
        if len(self._unfit) >= REMEMBERED:  # an endless source has no end of them
            self._unfit.clear()
        self._unfit.add(problem)
        self._passed = count = self._passed + 1
        if count <= NAMED or count % 1_000 == 0:
            log.warning("problem %s passed over (%d so far): %s", problem, count, why)

    def _room(self) -> str:
        return (
            f"the model's context leaves room for 1 to {self._max_prompt} tokens beside "
            "learner.max_tokens"
        )


def room_for_prompts(context: int, max_tokens: int) -> int:
    """Tokens that a prompt may have beside an answer. Raises ConfigError when there are none."""
    if context <= max_tokens:
        raise ConfigError(
            f"learner.max_tokens = {max_tokens}: the model's context is {context} tokens, prompt "
            "included; take less"
        )
    return context - max_tokens


def parts_of(config: PromptsConfig) -> tuple[GradePart, ...]:
    """The parts of the reward; `grader` alone is one, named "correct"."""
    if not config.parts:
        options = _ending(config, config.grader, config.grader_options)
        return (GradePart(name="correct", grader=config.grader, options=options),)
    return tuple(
        GradePart(
            name=p.name,
            grader=p.grader,
            weight=p.weight,
            options=_ending(config, p.grader, p.options),
            gated=p.gated,
        )
        for p in config.parts
    )


def _ending(config: PromptsConfig, grader: str, options: dict[str, Any]) -> dict[str, Any]:
    """With templates an answer ends where a template may end it, the same for all of them, unless
    the recipe says where.
    """
    known = OPTIONS.get(grader)
    if config.templates is None or known is None or not issubclass(known, Extraction):
        return options
    return {"until": list(STOP_WORDS), **options}
