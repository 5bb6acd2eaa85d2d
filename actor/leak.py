r"""The leak guard: the gold answer does not stand in what somebody says about an answer.

It goes by form: the gold answer in a box, then wherever it is a word of its own, whatever its
spaces, commas or capitals are. Another way to say the same (1/2 for 0.5) is not seen.
"""

from __future__ import annotations

import re

MASK = "***"
LONGEST = 2_000  # characters of a gold answer that a pattern is made of: that takes a while
_LONG = 4  # characters from which on the gold answer is looked for inside of words too


def guard(words: str, gold: str) -> tuple[str, bool]:
    """`words` without `gold`, and whether it stood there. What cannot be mended is ""."""
    gold = gold.strip()
    if not gold:
        return words, False
    if len(gold) > LONGEST:
        return ("", True) if _bare(gold) in _bare(words) else (words, False)
    form = _form(gold)
    flags = re.IGNORECASE if len(gold) > 1 else re.NOFLAG  # A is an answer, a is a word
    found = words
    for pattern in (rf"\\(?:boxed|fbox)\s*\{{\s*{form}\s*\}}", rf"(?<!\w){form}(?!\w)"):
        found = re.sub(pattern, MASK, found, flags=flags)
    if len(gold) >= _LONG and _bare(gold) in _bare(found):
        return "", True
    return found, found != words


def _form(gold: str) -> str:
    """A pattern of the gold answer: spaces where there are or are not, commas between digits."""
    pattern, before = "", ""
    for letter in gold:
        if letter.isspace():
            pattern += r"\s*" if not pattern.endswith(r"\s*") else ""
            continue
        if letter == "," and before.isdigit():
            pattern += ",?"
        else:
            pattern += (",?" if letter.isdigit() and before.isdigit() else "") + re.escape(letter)
        before = letter
    return pattern


def _bare(text: str) -> str:
    return re.sub(r"[\s,]", "", text).lower()
