"""From tokens to a proposed problem, from a parent to the prompt that asks for one: all that knows
words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from common.errors import DeadlineError
from common.patterns import Pattern
from common.wire import Rollout
from learner.config import LearnerConfig
from learner.prompts.chat import Renderer
from learner.prompts.source import Problem
from learner.prompts.stream import Draft, Prompts
from learner.synthesis.checks import Print, asks_more, fingerprint, in_other_letters, leaks, near
from learner.synthesis.label import FAULT, is_heldout_sum, majority
from learner.synthesis.pool import Asked, Made, Seed

_REMEMBERED = 2_000  # fingerprints
_HELD_OUT = 4_096  # held-out rows of a file that a proposal is compared with
LONGEST = 8_192  # characters that a regex of the recipe is given


class Texts:
    """Raises DataError like the prompts of a run (no chat template where one is asked for)."""

    def __init__(self, config: LearnerConfig, prompts: Prompts) -> None:
        assert config.synthesis is not None, "synthesis is off"
        self._config, self._settings, self._prompts = config, config.synthesis, prompts
        plain = {"instruction": "", "prefill": "", "templates": None}
        self._render = Renderer(msgspec.structs.replace(config.prompts, **plain), prompts.tokenizer)
        stem, extract = self._settings.stem, self._settings.extract
        self._stem = Pattern("learner.synthesis.stem", stem) if stem else None
        self._extract = Pattern("learner.synthesis.extract", extract, across_lines=True)
        self._answer = Pattern("learner.synthesis.answer", self._settings.answer)
        self._prints: dict[str, Print] = {}
        self._heldout: list[Print] | None = None

    def decode(self, tokens: Sequence[int]) -> str:
        text = self._prompts.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return str(text)

    # ---- asking for a problem ----------------------------------------------------------------

    def prompt(self, seed: Seed) -> np.ndarray | None:
        """int32 [P]; None: this parent has no stem, or the prompt does not fit."""
        try:
            stem = self._stem_of(seed.text)
        except DeadlineError:
            return None
        if stem is None:
            return None
        said = self.decode(seed.response)
        text = self._settings.prompt.format(problem=seed.text, response=said, stem=stem)
        ids = self._render(text)
        return ids if self._prompts.fits(ids) else None

    def draft(self, made: Made) -> Draft | None:
        """The proposed problem as a prompt; None: it does not fit."""
        return self._prompts.made(Problem(made.id, made.text, made.gold, made.columns), made.source)

    # ---- what came of it ---------------------------------------------------------------------

    def statement(self, rollout: Rollout, asked: Asked) -> tuple[str, str]:
        """The problem in a response, or "" and why there is none."""
        try:
            proposal = (self._extract.find(self.decode(said(rollout))[:LONGEST]) or "").strip()
            stem = self._stem_of(asked.text) or ""
        except DeadlineError as error:
            return "", f"{FAULT}: {error}"
        if not proposal:
            return "", "no problem in it"
        return self._settings.statement.format(proposal=proposal, stem=stem), ""

    def objection(self, text: str, made: Made, asked: Asked, others: Iterable[str]) -> str:
        """Why nobody is asked this, "" when it passes."""
        known = self.print(text)
        if self._prompts.made(Problem(made.id, text, "", {}), made.source) is None:
            return "too long"
        if is_heldout_sum(text) or near(known, self._held_out()):
            return "held out"
        if in_other_letters(text, asked.text):
            return "another language"
        if asks_more(text, asked.text):
            return "several questions"
        if self._settings.label == "inherited" and leaks(text, asked.gold, asked.text):
            return "gives the answer away"
        return "duplicate" if near(known, map(self.print, [*others, asked.text])) else ""

    def answer(self, tokens: Sequence[int]) -> str | None:
        """What a response says, where a label is made of what responses say: at its end. Raises
        DeadlineError.
        """
        return self._answer.find(self.decode(tokens)[-LONGEST:])

    def agreed(self, made: Made) -> tuple[str, float, str]:
        """What the answers to it agree on, the share of the commonest one, and why nobody knows."""
        try:
            return (*majority([self.answer(said) for said in made.answers]), "")
        except DeadlineError as error:
            return "", 0.0, f"{FAULT}: {error}"

    def print(self, text: str) -> Print:
        if len(self._prints) >= _REMEMBERED:
            self._prints.clear()
        if text not in self._prints:
            self._prints[text] = fingerprint(text)
        return self._prints[text]

    def _held_out(self) -> list[Print]:
        if self._heldout is None:
            asked = [draft.text for draft in self._prompts.heldout(self._config.eval.problems)]
            known = dict.fromkeys([*asked, *self._prompts.held_out_words(_HELD_OUT)])
            self._heldout = [fingerprint(text) for text in known]
        return self._heldout

    def _stem_of(self, text: str) -> str | None:
        """Raises DeadlineError."""
        return "" if self._stem is None else self._stem.find(text[:LONGEST])


def said(rollout: Rollout) -> list[int]:
    """The tokens that the policy sampled."""
    return [int(t) for s in rollout.segments if s.role == "policy" for t in s.tokens]
