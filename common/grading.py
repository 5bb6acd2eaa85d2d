"""The graders by name and what each may be told. Recipes are checked against these structs before
anything is started, and graders take them.

    exact           the answer is the gold answer, letter by letter
    numeric         the answer is the gold number, within a tolerance
    math_verify     the answer equals the gold one as mathematics
    reasoning_gym   the score that the task's own scorer gives
    format          the share of given marks that stand in the response exactly once
    python:MODULE:FUNCTION   a function with TRL's signature; its options are its own

The first four share one way to find the answer in a response: `Extraction`.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import msgspec

from common.errors import ConfigError

LARGEST = 1e9  # of a reward: sums of such, and their squares, are numbers still


def is_reward(score: float) -> bool:
    """Whether it can be reckoned with. NaN cannot."""
    return abs(score) <= LARGEST


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Extraction(Options, frozen=True, kw_only=True):
    """Where in a response the answer is. Each field that is set narrows what the one before it
    left; a response without what it looks for has no answer.
    """

    until: tuple[str, ...] = ()  # the response ends before the first of these
    tag: str = ""  # within the last complete <tag>…</tag>
    boxed: bool = False  # within the last complete \boxed{…}
    after: str = ""  # behind the last of these
    take: Literal["whole", "last_line", "last_number"] = "whole"


class Exact(Extraction, frozen=True, kw_only=True):
    pass


class Numeric(Extraction, frozen=True, kw_only=True):
    take: Literal["whole", "last_line", "last_number"] = "last_number"
    relative: float = 1e-6  # of the gold number
    absolute: float = 0.0


class MathVerify(Extraction, frozen=True, kw_only=True):
    boxed: bool = True
    unboxed: Literal["refuse", "whole", "last"] = (
        "refuse"  # without a box: no answer, all of what is left, or its last expression
    )
    percent: Literal["either", "hundredth", "ignore"] = "either"  # 50% is 50 or 0.5; 0.5; 50
    units: Literal["ignore", "same"] = "ignore"  # same: where both name one
    degrees: Literal["ignore", "radians"] = "ignore"  # 90° is 90; π/2
    words: bool = True  # a gold answer of three or more letters is a word, not a product
    digits: int = 6  # after the point, where one side is a decimal number
    seconds: int = 3  # for one reading or one comparison; longer is an error, not a 0


class ReasoningGym(Extraction, frozen=True, kw_only=True):
    pass


class Format(Options, frozen=True, kw_only=True):
    marks: tuple[str, ...] = ()


OPTIONS: dict[str, type[Options]] = {
    "exact": Exact,
    "numeric": Numeric,
    "math_verify": MathVerify,
    "reasoning_gym": ReasoningGym,
    "format": Format,
}


def options_of(grader: str, options: dict[str, Any]) -> Options:
    """Raises ConfigError naming what is wrong; `grader` is a key of OPTIONS."""
    kind = OPTIONS[grader]
    unknown = sorted(set(options) - set(kind.__struct_fields__))
    if unknown:
        raise ConfigError(
            f"grader {grader!r} has no option {unknown[0]!r}"
            f"{_meant(unknown[0], kind.__struct_fields__)}"
        )
    try:
        return msgspec.convert(options, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"grader {grader!r}: {error}") from None


def check(grader: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for a grader that there is not, or an option that it does not take."""
    if grader in OPTIONS:
        options_of(grader, options)
        return
    kind, _, place = grader.partition(":")
    module, _, function = place.partition(":")
    if kind == "python" and module and function:
        return
    raise ConfigError(
        f"no grader {grader!r}{_meant(grader, tuple(OPTIONS))}: give one of "
        f"{', '.join(OPTIONS)}, or python:MODULE:FUNCTION"
    )


def _meant(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
