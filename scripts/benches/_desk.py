"""A real desk without a model behind it: what benches of the transport ask for tickets."""

from __future__ import annotations

from typing import Any

from common.failpoints import Failpoint
from common.journal import Journal
from common.records import Open
from learner.config import LearnerConfig
from learner.desk import Desk
from learner.ledger import Ledger
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts

_LETTERS = 32  # all of them are words of every vocabulary here


class _Letters:
    """A tokenizer of one token a character: prompts cost what they cost, without a model."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % _LETTERS for letter in text]}


def desk(socket: Any, journal: Journal, run: str, config: LearnerConfig, words: int) -> Desk:
    """Incarnation 1 of `run`, with a vocabulary of `words`, on the built-in sums."""
    opened, ledger = Open(run=run, incarnation=1, config={}), Ledger()
    ledger.apply(opened, journal.append(opened))
    return Desk(
        socket,
        run_id=run,
        incarnation=1,
        digest="",
        vocab_size=words,
        config=config,
        journal=journal,
        ledger=ledger,
        prompts=Prompts(Arithmetic(0), config.prompts, _Letters(), (0,), 0, 512),  # type: ignore[arg-type]
        failpoint=Failpoint.parse(""),
    )
