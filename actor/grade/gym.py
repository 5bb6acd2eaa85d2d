"""The score that a reasoning-gym task's own scorer gives: from 0 to 1, fractions included.

The row's columns carry what the scorer needs: `task`, the task's name; `entry`, its question,
answer and metadata (common.plain); and, where it was made with other parameters than the default
ones, `config`.

Some scorers read an answer with `eval` or with sympy's parser, which evaluates what it reads.
Answers come from a policy that is rewarded for finding holes: such scorers get literals only from
`eval`, and an answer that reaches for Python's inside (`__`) or looks up attributes is worth 0.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from typing import Any

import msgspec
import reasoning_gym

from common.errors import DataError
from common.grading import Extraction
from common.plain import rebuilt

COLUMNS = ("task", "entry", "config")
SIZE = ("size", "seed")  # of the data, not of its scoring
_PARSES = re.compile(r"\b(?:parse_expr|sympify)\(answer")
_REACHES = re.compile(r"__|[A-Za-z_]\s*\.\s*[A-Za-z_]|\bimport\b|\blambda\b")


def judge(gold: str, answer: str, options: Extraction, columns: bytes) -> float:
    """Raises DataError when the columns are not those of a reasoning-gym row."""
    row = msgspec.msgpack.decode(columns)
    task, entry = row.get("task"), row.get("entry")
    if not isinstance(task, str) or not isinstance(entry, dict):
        raise DataError(
            "the row has no columns `task` and `entry`: grader reasoning_gym goes with the source "
            "of that name"
        )
    scorer, parses = _scorer(task, msgspec.msgpack.encode(row.get("config") or {}))
    if parses and _REACHES.search(answer):
        return 0.0
    return float(scorer.score_answer(answer=answer, entry=rebuilt(entry)))


@functools.lru_cache(maxsize=64)
def _scorer(task: str, config: bytes) -> tuple[Any, bool]:
    """The task's scorer, and whether it evaluates answers."""
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        raise DataError(f"reasoning-gym has no task {task!r}")
    chosen = {k: v for k, v in rebuilt(msgspec.msgpack.decode(config)).items() if k not in SIZE}
    scorer = reasoning_gym.create_dataset(task, size=1, seed=0, **chosen)
    source = inspect.getsource(type(scorer).score_answer)
    if "eval(answer)" in source:
        vars(sys.modules[type(scorer).__module__])["eval"] = ast.literal_eval
    return scorer, bool(_PARSES.search(source))
