r"""Reward 1 for an answer that equals the gold one as mathematics (math-verify), else 0.

Only the value that was extracted is handed to math-verify, never the response: from a whole one it
would merge several boxes into a set, so that naming many answers pays. Its verdicts depend on the
order: gold first. It bounds its time by SIGALRM, which works in a main thread only; elsewhere the
asker's deadline has to do. What takes longer, and what it raises, is an error, never a 0; an answer
that cannot be read as mathematics is wrong.

What math-verify does and we do not want is undone before it sees the texts:

    "abc" equals "cba"          a gold word is compared as a word (`words`)
    "(1,2)" equals "2,1"        an answer without brackets is given the gold answer's
    "90°" cannot be read        the sign becomes ^\circ
    "10 m" equals "10 cm"       `units = "same"`
    "50%" equals both 50 and 0.5   `percent = "hundredth"` or `"ignore"`
"""

from __future__ import annotations

import functools
import re
import threading
from typing import Any

import msgspec
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from actor.grade.extract import answer_of, last_box
from common.errors import DataError, DeadlineError
from common.grading import Extraction, MathVerify

_VALUE: Any = (LatexExtractionConfig(boxed_match_priority=0),)
_PROSE: Any = (LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig())
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_][^\W\d_ '’-]{2,}(?:[ '’-][^\W\d_]+)*")
_UNIT = re.compile(r"^[\s\d.,+\-/^{}]*?[\d}]\s*(?:\\[ ,;!]|~)*\s*([A-Za-z][A-Za-z/^\d]*)$")
_INTEGER = re.compile(r"-?(?:\d{1,40}|\d{1,3}(?:,\d{3}){1,12})")
_PERCENT = re.compile(r"\s*\\?%")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\\deg\b)")


def find(text: str, options: MathVerify) -> tuple[str, bool] | None:
    """The answer in a response, and whether it is prose in which it is yet to be found."""
    found = answer_of(text, options)
    if found is not None or not options.boxed or options.unboxed == "refuse":
        return None if found is None else (found, False)
    found = answer_of(text, msgspec.structs.replace(options, boxed=False))
    return None if found is None else (found, options.unboxed == "last")


def judge(
    gold: str, answer: str, options: Extraction, columns: bytes, prose: bool = False
) -> float:
    """Raises DataError for a gold answer that is no mathematics, DeadlineError after `seconds`."""
    assert isinstance(options, MathVerify)
    wanted, given = _clean(gold, options), answer if prose else _clean(answer, options)
    if not wanted:
        raise DataError("the gold answer is empty")
    if wanted == given:
        return 1.0
    if _INTEGER.fullmatch(wanted) and _INTEGER.fullmatch(given):  # no parser needed for these
        return float(int(wanted.replace(",", "")) == int(given.replace(",", "")))
    if options.words and _word(wanted):
        return float(_word(wanted) == _word(given))
    if options.units == "same" and "" != _unit(wanted) != _unit(given) != "":
        return 0.0
    return _equal(wanted, given, options, prose)


def _equal(wanted: str, given: str, options: MathVerify, prose: bool) -> float:
    seconds = options.seconds if threading.current_thread() is threading.main_thread() else None
    try:
        right = _read(wanted, seconds)
        if not right:
            raise DataError(f"the gold answer {wanted!r:.60} is no mathematics: use grader exact")
        theirs = (
            _parsed(given, _PROSE, seconds) if prose else _read(_bracketed(given, wanted), seconds)
        )
        return float(
            verify(
                right,
                theirs,
                float_rounding=options.digits,
                timeout_seconds=seconds,
                raise_on_error=True,
            )
        )
    except TimeoutException:
        raise DeadlineError(f"no verdict on {given!r:.60} within {seconds} s") from None


@functools.lru_cache(maxsize=1024)
def _read(value: str, seconds: int | None) -> list[Any]:
    return _parsed(f"\\boxed{{{value}}}", _VALUE, seconds)


def _parsed(text: str, kinds: Any, seconds: int | None) -> list[Any]:
    """Empty where nothing in `text` can be read."""
    found: list[Any] = parse(
        text,
        extraction_config=list(kinds),
        fallback_mode="no_fallback",
        parsing_timeout=seconds,
        raise_on_error=True,
    )
    return found


@functools.lru_cache(maxsize=4096)
def _clean(value: str, options: MathVerify) -> str:
    """The value without its wrapping, and with the rules for percent and degrees applied."""
    value = value.strip()
    value = last_box(value) or value
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if value.startswith(left) and value.endswith(right) and len(value) > len(left + right):
            value = value[len(left) : -len(right)].strip()
    value = value.replace("°", "^\\circ").replace("−", "-")
    if options.percent != "either":
        value = _PERCENT.sub("/100" if options.percent == "hundredth" else "", value)
    if options.degrees == "radians":
        value = _DEGREES.sub(r"\\cdot\\pi/180", value)
    return value


def _word(value: str) -> str:
    """The value as a word, "" when it is none."""
    bare = _TEXT.sub(r"\1", value).strip().strip(".")
    return bare.casefold() if _WORD.fullmatch(bare) else ""


def _unit(value: str) -> str:
    found = _UNIT.match(_TEXT.sub(r" \1", value))
    return found.group(1).casefold() if found else ""


def _bracketed(answer: str, gold: str) -> str:
    """`1,2` as `(1,2)` where that is how the gold answer writes a pair or an interval."""
    bare = gold.replace("\\left", "").replace("\\right", "").strip()
    brackets = bare[:1] in ("(", "[") and bare[-1:] in (")", "]")
    pair = brackets and "," in bare and "," in answer
    if not pair or any(bracket in answer for bracket in "()[]{}|"):
        return answer
    return f"{bare[0]}{answer}{bare[-1]}"
