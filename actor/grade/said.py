"""A user's function as a voice: called in a worker process, it says something about one answer.

    function(question=…, answer=…, gold=…, **columns) -> words | {"words": …, "flaw": …, "quote": …}

It gets only those arguments that it takes. None, or no words, means that there is nothing to say.
"""

from __future__ import annotations

from typing import Any

import msgspec

from actor.grade import graders
from common.errors import DataError


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """`words`: the feedback, or the hint. `flaw` names what is wrong, `quote` is the part of the
    answer where it first goes wrong, letter by letter.
    """

    words: str = ""
    flaw: str = ""
    quote: str = ""


def say(name: str, question: str, answer: str, gold: str, columns: dict[str, Any]) -> Said:
    """Raises DataError for an answer of another kind."""
    given = {**columns, "question": question, "answer": answer, "gold": gold}
    return read(name, graders.resolve(name)(**given))


def read(name: str, found: Any) -> Said:
    if found is None or isinstance(found, str):
        return Said(words=found or "")
    try:
        return msgspec.convert(found, Said)
    except msgspec.ValidationError as error:
        raise DataError(f"{name} must return words, or words, flaw and quote: {error}") from None
