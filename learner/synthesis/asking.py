"""What synthesis asks of the actors: proposals, answers to them, and in the place of some originals
a problem of the pool.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

from common.wire import GradePart, Grading, Kind
from learner.config import LearnerConfig
from learner.ledger import Ledger
from learner.prompts.stream import Draft
from learner.synthesis.pool import OF, Made, Pool, Seed
from learner.synthesis.texts import Texts

MOST_APART = 64  # steps between propose tickets, however long nothing comes of them
# actors grade all that they send; of proposals, and where answers make the label, it means nothing
UNJUDGED = (GradePart(name="unjudged", grader="exact"),)


class Request(NamedTuple):
    """A ticket to issue."""

    kind: Kind
    draft: Draft
    n: int
    temperature: float
    max_tokens: int
    parent: int


class Asking:
    """Pure in the journal so far; the bounds are the recipe's."""

    def __init__(
        self, config: LearnerConfig, pool: Pool, ledger: Ledger, texts: Texts, seed: int
    ) -> None:
        assert config.synthesis is not None, "synthesis is off"
        self._config, self._settings = config, config.synthesis
        self._pool, self._ledger, self._texts, self._seed = pool, ledger, texts, seed
        self._fits: dict[int, bool] = {}  # whether a prompt can be made of each parent, by ticket

    def wants(self) -> bool:
        return self._unscored() is not None or self._may_propose()

    def next(self) -> Request | None:
        """The next score or propose ticket; None: there is nothing to ask, or no room for it."""
        made = self._unscored()
        if made is not None:
            return self._score(made)
        if not self._may_propose():
            return None
        seed = self._parent()
        ids = self._texts.prompt(seed)
        assert ids is not None, "it is drawn from those that fit"
        return self._propose(seed, ids)

    def mixed(self) -> tuple[Draft, int] | None:
        """A problem of the pool in the place of the next original, and the ticket it came from.

        The k-th main prompt is one of the pool's where ⌊(k + 1) α⌋ > ⌊k α⌋, if there is one: so
        any so many prompts in a row have their share of them, within one.
        """
        state, ratio = self._pool.state, self._settings.ratio
        if state.halted or math.floor((state.fresh + 1) * ratio) == math.floor(state.fresh * ratio):
            return None
        for made in sorted(self._pool.active(), key=lambda made: (made.uses, made.born)):
            draft = self._texts.draft(made)
            if draft is not None:
                return draft, made.ticket
        return None

    # ---- score tickets -----------------------------------------------------------------------

    def _unscored(self) -> Made | None:
        state, settings = self._pool.state, self._settings
        if state.halted or self._ledger.flying["score"] >= settings.scoring or self._is_over():
            return None
        due = "extracted" if settings.label == "consensus" else "labelled"
        waiting = (m for m in state.made.values() if m.state == due and m.score < 0 and not m.lost)
        return next(waiting, None)

    def _score(self, made: Made) -> Request:
        config, draft = self._config, self._texts.draft(made)
        assert draft is not None, "what does not fit was rejected before anything is asked"
        if self._settings.label == "consensus":  # what is right comes of the answers
            draft = draft._replace(grading=Grading(parts=UNJUDGED))
        n = self._settings.rollouts
        return Request("score", draft, n, config.temperature, config.max_tokens, made.ticket)

    # ---- propose tickets ---------------------------------------------------------------------

    def _may_propose(self) -> bool:
        """Few at once; after every `patience` tickets in vain half as often."""
        state, settings = self._pool.state, self._settings
        if state.halted or self._is_over() or not self._parents():
            return False
        apart = min(MOST_APART, 2 ** (state.barren // settings.patience))
        if apart > 1 and state.t - state.last < apart:
            return False
        full = sum(made.state == "active" for made in state.made.values()) >= settings.size
        untrained = len(state.asked) + len(self._ledger.propose)
        return not full and untrained < (settings.proposing if apart == 1 else 1)

    def _parents(self) -> list[Seed]:
        """Those that a prompt can be made of, which each is asked once."""
        seeds, known = self._pool.state.seeds, self._fits
        if known.keys() != {seed.ticket for seed in seeds}:
            self._fits = {
                seed.ticket: known[seed.ticket]
                if seed.ticket in known
                else self._texts.prompt(seed) is not None
                for seed in seeds
            }
        return [seed for seed in seeds if self._fits[seed.ticket]]

    def _parent(self) -> Seed:
        """Drawn with weight p (1 − p), by a hash of how many were drawn before."""
        parents = self._parents()
        weights = np.cumsum([seed.p * (1 - seed.p) + 1e-6 for seed in parents])
        at = share(self._seed, "parent", self._pool.state.proposing) * float(weights[-1])
        return parents[min(int(np.searchsorted(weights, at, side="right")), len(parents) - 1)]

    def _propose(self, seed: Seed, ids: np.ndarray) -> Request:
        config, settings = self._config, self._settings
        grading = Grading(gold=seed.gold, parts=UNJUDGED, columns=seed.columns)
        draft = Draft(f"{OF}{seed.problem}", ids, grading, "", seed.source, -1, seed.text)
        most = min(settings.max_tokens or config.max_tokens, config.max_tokens)
        return Request(
            "propose", draft, settings.proposals, settings.temperature, most, seed.ticket
        )

    def _is_over(self) -> bool:
        return self._ledger.t >= self._config.steps


def share(seed: int, what: str, which: object) -> float:
    """A number in [0, 1) that depends on nothing but these."""
    digest = hashlib.blake2b(f"{seed}/{what}/{which}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
