"""Graders by name: pure functions of texts, called in worker processes. Never torch.

    exact numeric math_verify reasoning_gym   ours (common/grading.py): extraction, then a judgement
    format                                    ours: marks in the whole text
    python:MODULE:FUNCTION                    TRL's signature: (completions, **columns)
                                              -> list[float | None]

Columns are the dataset row's, repeated once a completion; `prompts` and `gold` are there too, and
the options of the reward part as they are. A function without **columns gets only what it asks for.

Judgements of ours are kept, by (grader, gold, answer, options): a group's rollouts often agree, and
a problem comes again in the next epoch. A response without an answer scores 0; errors are not kept.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from actor.grade import marks
from actor.grade.extract import answer_of
from common.errors import DataError
from common.grading import OPTIONS, Extraction, Format, MathVerify, Options, options_of

Score = float | None
Function = Callable[..., Sequence[Score]]

KEPT = 1 << 14  # judgements
_MODULES = {
    "exact": "actor.grade.exact",
    "numeric": "actor.grade.numeric",
    "math_verify": "actor.grade.mathematics",
    "reasoning_gym": "actor.grade.gym",
    "format": "actor.grade.marks",
}


def resolve(name: str) -> Any:
    """The module of a grader of ours, or a user's function; raises DataError when it is not
    there.
    """
    if name in _MODULES:
        return _ours(name)
    kind, _, place = name.partition(":")
    module, _, function = place.partition(":")
    if kind != "python" or not module or not function:
        raise DataError(f"no grader {name!r}: give {', '.join(OPTIONS)}, or python:MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"no grader {name!r}: {error}") from None
    return _accepting(found)


def call(
    name: str,
    prompt: str,
    texts: Sequence[str],
    gold: str,
    columns: dict[str, Any],
    options: dict[str, Any],
) -> list[Score]:
    """One score a text, None where the grader does not judge; DataError for anything else."""
    if name in _MODULES:
        return _graded(name, texts, gold, columns, options)
    repeated = {key: [value] * len(texts) for key, value in columns.items()}
    given = {"prompts": [prompt] * len(texts), "gold": [gold] * len(texts), **repeated, **options}
    given["completions"] = list(texts)  # whatever a column is called
    scores = resolve(name)(**given)
    if hasattr(scores, "tolist"):
        scores = scores.tolist()  # an array
    if not isinstance(scores, list | tuple) or len(scores) != len(texts):
        raise DataError(f"{name} must return a list of {len(texts)} scores, not {scores!r:.80}")
    return [None if score is None else float(score) for score in scores]


def _graded(
    name: str, texts: Sequence[str], gold: str, columns: dict[str, Any], options: dict[str, Any]
) -> list[Score]:
    module, chosen = _ours(name), _options(name, msgspec.msgpack.encode(options))
    if isinstance(chosen, Format):
        return [marks.score(text, chosen.marks) for text in texts]
    assert isinstance(chosen, Extraction)
    wanted = getattr(module, "COLUMNS", ())
    row = msgspec.msgpack.encode({key: columns[key] for key in wanted if key in columns})
    answers = [_found(module, text, chosen) for text in texts]
    return [
        0.0 if found is None else _judged(name, gold, found, chosen, row if wanted else b"")
        for found in answers
    ]


def _found(module: Any, text: str, options: Extraction) -> tuple[str, bool] | None:
    if isinstance(options, MathVerify):
        found: tuple[str, bool] | None = module.find(text, options)
        return found
    answer = answer_of(text, options)
    return None if answer is None else (answer, False)


@functools.lru_cache(maxsize=KEPT)
def _judged(
    name: str, gold: str, found: tuple[str, bool], options: Extraction, row: bytes
) -> float:
    answer, prose = found
    judge = _ours(name).judge
    return float(
        judge(gold, answer, options, row, True) if prose else judge(gold, answer, options, row)
    )


@functools.lru_cache(maxsize=256)
def _options(name: str, packed: bytes) -> Options:
    return options_of(name, msgspec.msgpack.decode(packed))


@functools.cache
def _ours(name: str) -> Any:
    """Raises DataError, naming what to install, when the grader's library is missing."""
    try:
        return importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise DataError(
            f"grader {name!r} needs the package {error.name!r}: pip install -e '.[graders]'"
        ) from None


def _accepting(function: Function) -> Function:
    """`function`, spared the columns that it does not take."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function
    return lambda **given: function(**{k: v for k, v in given.items() if k in parameters})
