"""Where problems come from. A source is two pure streams: problem number i to train on, and
held-out ones.

`train(index)` and `heldout(index)` depend on nothing but the index and what the source was made
with, so the stream is the same after a restart and for any number of actors. No question is on both
sides: everywhere the question's text decides which side it is on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from learner.prompts import arithmetic
from learner.prompts.config import PromptsConfig


class Problem(NamedTuple):
    """What is asked (`text`), what is right (`gold`), and all columns of the row but the question
    for graders that read them.
    """

    id: str
    text: str
    gold: str
    columns: dict[str, Any]
    epoch: int = 0  # which pass over the rows asks it; in an endless source every draw is one
    source: str = ""  # of several sources the one it is from …
    number: int = 0  # … and its place among them


class Source(Protocol):
    name: str

    @property
    def rows(self) -> int | None:
        """Problems to train on, after which they come again; None: endless."""
        ...

    def train(self, index: int) -> Problem:
        """Endless."""
        ...

    def heldout(self, index: int) -> Problem | None:
        """None: there are no more."""
        ...


def open_source(config: PromptsConfig, seed: int) -> Source:
    """Raises DataError when the data is not there or lacks a column."""
    if config.sources:
        from learner.prompts.mixture import Mixture

        leaves = [_open(alone, seed) for alone in config.each()]
        return Mixture(leaves, config.sources, seed)
    return _open(config, seed)


def _open(config: PromptsConfig, seed: int) -> Source:
    if config.source == "arithmetic":
        return Arithmetic(seed)
    if config.source == "reasoning_gym":
        from learner.prompts.gym import Gym

        return Gym(config.task, config.options, seed)
    from learner.prompts.dataset import Dataset

    return Dataset(_rows(config, config.path), _heldout_rows(config), config, seed)


def _heldout_rows(config: PromptsConfig) -> Any:
    return _rows(config, config.heldout_path) if config.heldout_path else None


def _rows(config: PromptsConfig, path: str) -> Any:
    place = Path(path).expanduser()
    if config.source == "jsonl":
        from learner.prompts.jsonl import JsonLines

        return JsonLines(place)
    from learner.prompts import arrow

    return arrow.parquet(place) if config.source == "parquet" else arrow.saved(place)


class Arithmetic:
    """Sums made on the spot (arithmetic.py); training and held-out ones never meet."""

    name = "arithmetic"
    rows = None

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def train(self, index: int) -> Problem:
        problem = self._problem(arithmetic.draw(self._seed, index, "train"))
        return problem._replace(epoch=index)

    def heldout(self, index: int) -> Problem:
        return self._problem(arithmetic.draw(self._seed, index, "heldout"))

    @staticmethod
    def _problem(problem: arithmetic.Problem) -> Problem:
        return Problem(problem.id, problem.text, problem.answer, {})
