"""Where the answer is in a response: the one extraction that all graders share.

Pure string work, in time proportional to the text. What is asked for and not there is no answer
(None), which is a verdict; an empty answer is one too ("").
"""

from __future__ import annotations

import re

from common.grading import Extraction

# A sign belongs to a number unless something stands before it that could be subtracted from;
# commas group thousands or separate numbers; a fraction of whole numbers is one number.
_NUMBER = re.compile(
    r"(?<![\w.)])[-−+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?"
    r"|(?<![\w.)])[-−+]?\.\d+"
)
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def answer_of(text: str, where: Extraction) -> str | None:
    """The answer in `text`, spaces at both ends apart; None where there is none."""
    left: str | None = text
    for word in where.until:
        left = left.split(word, 1)[0] if left is not None else None
    if left is not None and where.tag:
        left = last_tag(left, where.tag)
    if left is not None and where.boxed:
        left = last_box(left)
    if left is not None and where.after:
        left = left.rsplit(where.after, 1)[1] if where.after in left else None
    if left is not None and where.take == "last_line":
        left = next((line for line in reversed(left.splitlines()) if line.strip()), "")
    if left is not None and where.take == "last_number":
        left = last_number(left)
    return None if left is None else left.strip()


def last_tag(text: str, tag: str) -> str | None:
    """What stands within the last complete <tag>…</tag>."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None


def last_box(text: str) -> str | None:
    r"""What stands within the last \boxed{…} that is closed; of nested ones the innermost."""
    open_at: list[int] = []  # where the content of each open brace begins; negative: not a box's
    best: tuple[int, int] | None = None
    for match in _BRACE.finditer(text):
        found = match.group()
        if found == "}":
            start = open_at.pop() if open_at else -1
            if start >= 0 and (best is None or start > best[0]):
                best = (start, match.start())
        elif found[-1] == "{" and found != "\\{":
            open_at.append(match.end() if len(found) > 1 else -1)
    return None if best is None else text[best[0] : best[1]]


def last_number(text: str) -> str | None:
    """The last number, as it is written: 1,234.5, -3, 2e-3, 3/4."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def value_of(number: str) -> float | None:
    """The value of a written number, None for anything else."""
    clean = number.strip().replace(",", "").replace("−", "-")
    above, _, below = clean.partition("/")
    try:
        return float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        return None
