"""Where problems come from. A source is two endless, pure streams: problem number i to train on,
and held-out ones.

`train(index)` and `heldout(index)` depend on nothing but the index and what the source was made
with, so the stream is the same after a restart and for any number of actors.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from common.errors import DataError
from learner.config import PromptsConfig
from learner.prompts import arithmetic


class Problem(NamedTuple):
    """What is asked (`text`), what is right (`gold`), and the row's other columns for graders that
    read them.
    """

    id: str
    text: str
    gold: str
    columns: dict[str, Any]


class Source(Protocol):
    name: str

    def train(self, index: int) -> Problem: ...

    def heldout(self, index: int) -> Problem: ...


def open_source(config: PromptsConfig, seed: int) -> Source:
    """Raises DataError when the data is not there or lacks a column."""
    if config.source == "arithmetic":
        return Arithmetic(seed)
    return Jsonl(Path(config.path), Path(config.heldout_path or config.path), config, seed)


class Arithmetic:
    """Sums made on the spot (arithmetic.py); training and held-out ones never meet."""

    name = "arithmetic"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def train(self, index: int) -> Problem:
        return self._problem(arithmetic.draw(self._seed, index, "train"))

    def heldout(self, index: int) -> Problem:
        return self._problem(arithmetic.draw(self._seed, index, "heldout"))

    @staticmethod
    def _problem(problem: arithmetic.Problem) -> Problem:
        return Problem(problem.id, problem.text, problem.answer, {})


class Jsonl:
    """Rows of a JSON-lines file, in a new order each epoch. Only the rows' offsets are held in
    memory.

    Without a held-out file the file's first 1/10 of rows (at most 1,000) are held out, by position.
    """

    def __init__(self, path: Path, heldout: Path, config: PromptsConfig, seed: int) -> None:
        self.name = path.stem
        self._config = config
        self._seed = seed
        self._train = _Rows(path, config)
        if heldout == path:
            cut = min(1_000, max(1, len(self._train) // 10))
            self._heldout, self._train = (
                self._train.part(0, cut),
                self._train.part(cut, len(self._train)),
            )
        else:
            self._heldout = _Rows(heldout, config)
        if not len(self._train) or not len(self._heldout):
            raise DataError(f"{path}: too few rows to train on some and hold out others")

    def train(self, index: int) -> Problem:
        epoch, position = divmod(index, len(self._train))
        return self._train.row(int(_order(self._seed, epoch, len(self._train))[position]))

    def heldout(self, index: int) -> Problem:
        return self._heldout.row(index % len(self._heldout))


class _Rows:
    def __init__(
        self, path: Path, config: PromptsConfig, offsets: np.ndarray | None = None, first: int = 0
    ) -> None:
        self._path, self._config, self._first = path, config, first
        self._offsets = _line_offsets(path) if offsets is None else offsets
        if offsets is None and len(self):
            self.row(0)  # a missing column is better known before the run than in it

    def __len__(self) -> int:
        return len(self._offsets)

    def part(self, start: int, end: int) -> _Rows:
        return _Rows(self._path, self._config, self._offsets[start:end], self._first + start)

    def row(self, number: int) -> Problem:
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[number]))
            line = file.readline()
        where = f"{self._path}, row {self._first + number + 1}"
        try:
            columns = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise DataError(f"{where}: not a JSON object ({error})") from None
        wanted = (self._config.prompt_column, self._config.answer_column)
        for column in wanted:
            if columns.get(column) in (None, ""):
                known = ", ".join(sorted(columns))
                raise DataError(
                    f"{where}: no column {column!r} (there are: {known}); "
                    "map it in [learner.prompts]"
                )
        text, gold = (str(columns.pop(column)) for column in wanted)
        return Problem(f"{self._path.stem}/{self._first + number}", text, gold, columns)


def _line_offsets(path: Path) -> np.ndarray:
    """int64 [rows]: where each non-empty line begins."""
    offsets, at = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(at)
                at += len(line)
    except OSError as error:
        raise DataError(
            f"cannot read the dataset {path}: {error.strerror}; set learner.prompts.path"
        ) from None
    return np.asarray(offsets, np.int64)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
