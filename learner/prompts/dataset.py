"""A file of rows as a source: which rows are usable, which are held out, in what order they come.

One pass when the run starts reads the two columns that matter of every row. A row without one of
them, or with a question that another row had before it, is left out, and where rows ask the same
and name different answers all of them are: which one is right nobody knows. How many and which is
said in one line each. Of the rest a tenth, at most 1,000 rows, is held out: those whose questions'
digests are smallest, so that neither a copy of a question nor the order of the file can put it on
both sides. With a held-out file its questions are taken out of the training rows instead. Numbers,
digests and orders of rows are held in memory, 8 bytes each; the rows are not.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import xxhash

from common.errors import DataError
from common.plain import plain
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Problem

log = logging.getLogger("isentrope.prompts")

HELDOUT_SHARE = 10  # one row in so many …
HELDOUT_MOST = 1_000  # … but no more than this
NAMED = 5  # rows that a line about rows left out names


class Rows(Protocol):
    """A file of rows with named columns, read at random."""

    path: Path

    def scan(self, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, those of `columns` that it has) of every row, in order; numbers rise."""
        ...

    def row(self, number: int) -> dict[str, Any]: ...

    def columns(self) -> list[str]:
        """The names, for a message that one of them is missing."""
        ...


class Dataset:
    """Raises DataError: a file that cannot be read, a column that no row has, too few rows."""

    def __init__(self, rows: Rows, heldout: Rows | None, config: PromptsConfig, seed: int) -> None:
        self.name = rows.path.stem
        self._rows, self._config, self._seed = rows, config, seed
        self._odd: set[str] = set()  # columns of which nothing that can travel can be made
        numbers, digests = _index(rows, config)
        self._heldout_rows = rows if heldout is None else heldout
        if heldout is None:
            held = min(HELDOUT_MOST, max(1, len(numbers) // HELDOUT_SHARE))
            order = np.argsort(digests, kind="stable")
            train = np.sort(order[held:])
            self._heldout, self.heldout_digests = numbers[order[:held]], digests[order[:held]]
            self._train, self._digests = numbers[train], digests[train]
        else:
            self._heldout, self.heldout_digests = _index(heldout, config)
            self._train, self._digests = numbers, digests
            self.leave_out(self.heldout_digests, str(heldout.path))
        self._check()

    @property
    def rows(self) -> int:
        return len(self._train)

    def leave_out(self, digests: np.ndarray, holder: str) -> None:
        """Train on no row whose question's digest (uint64) is among `digests`, which `holder` holds
        out. Raises DataError when none is left.
        """
        ours = np.isin(self._digests, digests, invert=True)
        if not ours.all():
            message = "%s: %s left out: %s holds their questions out"
            log.warning(message, self._rows.path, _counted(int((~ours).sum())), holder)
        self._train, self._digests = self._train[ours], self._digests[ours]
        self._check()

    def train(self, index: int) -> Problem:
        epoch, position = divmod(index, len(self._train))
        order = _order(self._seed, epoch, len(self._train))
        problem = self._problem(self._rows, int(self._train[order[position]]))
        return problem._replace(epoch=epoch)

    def heldout(self, index: int) -> Problem | None:
        if index >= len(self._heldout):
            return None
        return self._problem(self._heldout_rows, int(self._heldout[index]))

    def _check(self) -> None:
        if not len(self._train) or not len(self._heldout):
            path = self._rows.path
            raise DataError(f"{path}: too few rows to train on some and hold out others")

    def _problem(self, rows: Rows, number: int) -> Problem:
        columns = rows.row(number)
        text = _text(_asked(_value(columns, self._config.prompt_column)))
        gold = _text(_value(columns, self._config.answer_column))
        others: dict[str, Any] = {}
        for name, value in columns.items():
            if name != self._config.prompt_column:
                self._keep(others, name, value)
        return Problem(f"{rows.path.stem}/{number}", text, gold, others)

    def _keep(self, columns: dict[str, Any], name: str, value: Any) -> None:
        """What cannot travel stays behind, which is said once a column."""
        text = _decoded(value) if isinstance(value, bytes) else None
        try:
            columns[name] = plain(value if text is None else text)
        except DataError as error:
            if name not in self._odd:
                message = "%s: column %s is left out, no grader sees it: %s"
                log.warning(message, self._rows.path, name, error)
            self._odd.add(name)


def _index(rows: Rows, config: PromptsConfig) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (int64) and questions' digests (uint64) of the usable rows, in the file's order."""
    wanted = (config.prompt_column, config.answer_column)
    numbers, digests, golds = array("q"), array("Q"), array("Q")
    lacking: dict[str, list[int]] = defaultdict(list)
    for number, columns in rows.scan(wanted):
        found = _asked(_value(columns, wanted[0])), _value(columns, wanted[1])
        missing = [name for name, value in zip(wanted, found, strict=True) if _is_missing(value)]
        if missing:
            lacking[missing[0]].append(number)
            continue
        numbers.append(number)
        digests.append(_digest(found[0]))
        golds.append(_digest(found[1]))
    for name, where in lacking.items():
        if not numbers:
            known = ", ".join(rows.columns())
            there = name.partition(".")[0] in rows.columns() or name in rows.columns()
            what = f"nothing in column {name!r}" if there else f"no column {name!r}"
            raise DataError(
                f"{rows.path}, row {where[0]}: {what} (there are: {known}); "
                "map it in [learner.prompts]"
            )
        left_out = _counted(len(where))
        log.warning("%s: %s left out: no %s in %s", rows.path, left_out, name, _few(where))
    usable = np.frombuffer(numbers, np.int64), np.frombuffer(digests, np.uint64)
    agreeing = _agreeing(rows, *usable, np.frombuffer(golds, np.uint64))
    return _first_of_each(rows, usable[0][agreeing], usable[1][agreeing])


def _agreeing(
    rows: Rows, numbers: np.ndarray, digests: np.ndarray, golds: np.ndarray
) -> np.ndarray:
    """bool [rows]: no other row asks the same and names another answer."""
    _, first, question = np.unique(digests, return_index=True, return_inverse=True)
    other = golds != golds[first][question]
    disputed: np.ndarray = np.bincount(question, other) > 0
    left_out = disputed[question]
    if left_out.any():
        message = "%s: %s left out: others ask the same and name another answer: %s"
        where = numbers[left_out].tolist()
        log.warning(message, rows.path, _counted(len(where)), _few(where))
    agreed: np.ndarray = ~left_out
    return agreed


def _first_of_each(
    rows: Rows, numbers: np.ndarray, digests: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    _, first = np.unique(digests, return_index=True)
    first.sort()
    if len(first) < len(numbers):
        again = np.delete(numbers, first)
        message = "%s: %s left out: an earlier row asks the same as %s"
        log.warning(message, rows.path, _counted(len(again)), _few(again.tolist()))
    return numbers[first], digests[first]


def _counted(rows: int) -> str:
    return f"{rows} row{'s' * (rows != 1)}"


def _few(rows: list[int]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:NAMED]))}{more}"


def _value(columns: dict[str, Any], name: str) -> Any:
    """A column, or a field within one: `reward_model.ground_truth`. Bytes are text or nothing."""
    if name in columns or "." not in name:
        value = columns.get(name)
        return _decoded(value) if isinstance(value, bytes) else value
    column, _, field = name.partition(".")
    inner = columns.get(column)
    return _value(inner, field) if isinstance(inner, dict) else None


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _asked(value: Any) -> Any:
    """The question; of a conversation its one user turn, without what the system says. None: it has
    more turns, or something else than text.
    """
    if not (isinstance(value, list) and value and all(map(_is_turn, value))):
        return value
    said = [turn for turn in value if turn["role"] != "system"]
    if len(said) != 1 or said[0]["role"] != "user":
        return None
    content = said[0]["content"]
    parts = content if isinstance(content, list) else [{"text": content}]
    words = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [word for word in words if isinstance(word, str)]
    return "".join(texts) if len(texts) == len(words) else None


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


def _is_missing(value: Any) -> bool:
    """Nothing, or nothing but spaces; 0 and false are something."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list | dict) and not value)


def _digest(value: Any) -> int:
    return xxhash.xxh3_64_intdigest(_text(value).encode())


def _text(value: Any) -> str:
    """Text as it is; a list or a map as JSON."""
    if isinstance(value, list | dict):
        return msgspec.json.encode(plain(value)).decode()
    return str(value)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
