"""What is seen of a proposed problem before anybody answers it. Pure functions of texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEAR = 0.8  # texts whose shingles overlap by more (Jaccard) are one problem said twice
ALIKE = 0.5  # … and by more than this they are of one cluster
_SHINGLE = 3  # words
_WORD = re.compile(r"\w+|[^\w\s]")
_LEAST = 2  # characters of an answer that a statement could give away


class Print(NamedTuple):
    """A text by which it is known again."""

    normal: str
    shingles: frozenset[tuple[str, ...]]


def fingerprint(text: str) -> Print:
    """Case, width and spaces do not matter."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    last = max(1, len(words) - _SHINGLE + 1)
    shingles = frozenset(tuple(words[i : i + _SHINGLE]) for i in range(last))
    return Print(" ".join(words), shingles)


def overlap(a: Print, b: Print) -> float:
    """Jaccard index of the shingles, 0…1."""
    if a.normal == b.normal:
        return 1.0
    both = len(a.shingles & b.shingles)
    either = len(a.shingles) + len(b.shingles) - both
    return both / either if either else 0.0


def near(a: Print, others: Iterable[Print]) -> bool:
    size = len(a.shingles)
    for other in others:
        theirs = len(other.shingles)  # sets of so different sizes cannot overlap so much
        if min(size, theirs) >= NEAR * max(size, theirs) and overlap(a, other) >= NEAR:
            return True
    return False


def clusters(prints: Sequence[Print]) -> list[float]:
    """For each text the share of all that are in its cluster (joined by any likeness)."""
    of = list(range(len(prints)))
    for i, a in enumerate(prints):
        for j in range(i):
            if of[i] != of[j] and overlap(a, prints[j]) > ALIKE:
                old, joined = of[i], of[j]
                of = [joined if number == old else number for number in of]
    return [of.count(number) / len(of) for number in of]


def leaks(text: str, gold: str, parent: str) -> bool:
    """Whether the statement names the answer, as a word of its own, where the parent does not."""
    answer = gold.strip().casefold()
    if len(answer) < _LEAST:
        return False
    whole = re.compile(rf"(?<![\w.]){re.escape(answer)}(?![\w])")
    return bool(whole.search(text.casefold())) and not whole.search(parent.casefold())


def in_other_letters(text: str, parent: str) -> bool:
    """Whether most of its letters are of scripts in which the parent has none."""
    theirs = {_script(letter) for letter in parent if letter.isalpha()}
    ours = [_script(letter) for letter in text if letter.isalpha()]
    return bool(theirs) and 2 * sum(script not in theirs for script in ours) > len(ours)


def asks_more(text: str, parent: str) -> bool:
    """Several questions in one: more question marks than the parent has."""
    return text.count("?") > max(1, parent.count("?"))


def _script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK, …: the first word of its name."""
    return unicodedata.name(letter, "").partition(" ")[0]
