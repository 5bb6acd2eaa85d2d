"""Tasks of reasoning-gym by name: problems made on the spot, without a file, as many as are wanted.

An item of such a task is a pure function of its number, but two seeds do not make two sets of
items (item i under seed s is item i + 1 under seed s − 1), and small tasks repeat themselves soon.
So a digest of the question decides which side a problem is on, one in eight is held out, and a
problem's name is that digest: the same question is the same problem wherever it comes up.

The whole item travels with the ticket (columns `task`, `entry` and `config`), so that an actor
can score answers without making the task.
"""

from __future__ import annotations

import hashlib
from typing import Any

from common.errors import DataError
from common.plain import plain, rebuilt
from learner.prompts.arithmetic import Split
from learner.prompts.source import Problem

try:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
except ImportError:
    raise DataError(
        "source \"reasoning_gym\" is not installed: pip install -e '.[graders]'"
    ) from None

HELDOUT_OF_256 = 32  # one question in eight is held out
NUMBERS = 1 << 30  # items are drawn from so many
MOST_TRIES = 1_000  # items looked at for one of the wanted side


class Gym:
    """Raises DataError: no such task or option, items that are not pure or cannot travel."""

    def __init__(self, task: str, options: dict[str, Any], seed: int) -> None:
        self.name, self.rows = task, None
        self._seed = seed
        self._items = _make(task, options, seed)
        self._config = plain(options)
        self._check()

    def train(self, index: int) -> Problem:
        return self._draw(index, "train")._replace(epoch=index)

    def heldout(self, index: int) -> Problem:
        return self._draw(index, "heldout")

    def _draw(self, index: int, split: Split) -> Problem:
        for attempt in range(MOST_TRIES):
            counter = f"{self._seed}/{split}/{index}/{attempt}"
            item = self._item(int.from_bytes(_digest(counter), "big") % NUMBERS)
            name = _digest(item["question"])
            if (name[0] < HELDOUT_OF_256) == (split == "heldout"):
                return self._problem(name.hex(), item)
        raise DataError(
            f"reasoning_gym task {self.name!r}: none of {MOST_TRIES} items belongs to the {split} "
            "side; it has too few different questions: widen learner.prompts.options"
        )

    def _item(self, number: int) -> dict[str, Any]:
        try:
            item: dict[str, Any] = self._items[number]
        except Exception as error:  # noqa: BLE001  a hundred generators, each with its own errors
            raise DataError(
                f"reasoning_gym task {self.name!r} cannot make item {number}: "
                f"{type(error).__name__}: {error}"
            ) from None
        return item

    def _problem(self, name: str, item: dict[str, Any]) -> Problem:
        entry = {key: item[key] for key in ("question", "answer", "metadata")}
        columns = {"task": self.name, "entry": plain(entry), "config": self._config}
        return Problem(f"{self.name}/{name}", item["question"], str(item["answer"]), columns)

    def _check(self) -> None:
        """The promises that the stream rests on, tried on the first problem."""
        first = self.train(0)
        self.train(1)
        if self.train(0) != first:
            raise DataError(
                f"reasoning_gym task {self.name!r} makes another problem at each call: a run could "
                "not be resumed; take another task, or write its problems into a JSONL file"
            )
        entry = rebuilt(first.columns["entry"])
        if self._items.score_answer(entry["answer"], entry) < 1.0:
            raise DataError(
                f"reasoning_gym task {self.name!r}: its own answer does not pass its own scorer; "
                "take another task"
            )


def _make(task: str, options: dict[str, Any], seed: int) -> Any:
    if task not in DATASETS:
        raise DataError(
            f"no reasoning_gym task {task!r}{_nearest(task)}; there are {len(DATASETS)}: "
            f"{', '.join(sorted(DATASETS)[:4])}, …"
        )
    try:
        return reasoning_gym.create_dataset(task, seed=seed, **options)
    except Exception as error:  # noqa: BLE001  each task checks its options in its own way
        raise DataError(f"learner.prompts.options of {task!r}: {error}") from None


def _nearest(task: str) -> str:
    import difflib

    near = difflib.get_close_matches(task, DATASETS, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, key=b"reasoning gym").digest()
