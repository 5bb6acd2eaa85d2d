"""Graders by name: pure functions of texts, called in worker processes. Never torch.

    exact                       what follows the last `after` in the text is the gold answer
    python:MODULE:FUNCTION      TRL's signature: (completions, **columns) -> list[float | None]

Columns are the dataset row's, repeated once a completion; `prompts` and `gold` are there too, and
the options of the reward part as they are. A function without **columns gets only what it asks for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from actor.grade.exact import exact
from common.errors import DataError

Score = float | None
Function = Callable[..., Sequence[Score]]


def resolve(name: str) -> Function:
    """The function of TRL's signature behind `name`; raises DataError when there is none."""
    if name == "exact":
        return _exact
    kind, _, place = name.partition(":")
    module, _, function = place.partition(":")
    if kind != "python" or not module or not function:
        raise DataError(f"no grader {name!r}: give exact, or python:MODULE:FUNCTION")
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
    repeated = {key: [value] * len(texts) for key, value in columns.items()}
    given = {"prompts": [prompt] * len(texts), "gold": [gold] * len(texts), **repeated, **options}
    scores = resolve(name)(completions=list(texts), **given)
    if not isinstance(scores, list | tuple) or len(scores) != len(texts):
        raise DataError(f"{name} must return a list of {len(texts)} scores, not {scores!r:.80}")
    return [None if score is None else float(score) for score in scores]


def _exact(
    completions: Sequence[str], gold: Sequence[str], after: str = "", **_columns: Any
) -> list[Score]:
    return [exact(text, answer, after) for text, answer in zip(completions, gold, strict=True)]


def _accepting(function: Function) -> Function:
    """`function`, spared the columns that it does not take."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function
    return lambda **given: function(**{k: v for k, v in given.items() if k in parameters})
