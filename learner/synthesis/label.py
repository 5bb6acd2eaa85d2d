"""Who says what the right answer to a proposed problem is.

arithmetic               sums, worked out here
python:MODULE:FUNCTION   `def label(problem: str) -> str | None`; None: it cannot tell
consensus                what most of the policy's own answers say

A function of the user's runs in a thread of its own: one that hangs costs its own verdict, and the
desk goes on. A label that nobody could give is no label.
"""

from __future__ import annotations

import importlib
import queue
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple

from common.errors import ConfigError
from common.process import import_from_here
from learner.prompts.arithmetic import split_of

DEADLINE_S = 20.0  # for one label
FAULT = "verifier_error"  # a reason that begins so says nothing of what was to be judged
MOST_HUNG = 3  # functions that never came back; then it is not asked any more
NO_MAJORITY = "no majority"
HANGS = f"{FAULT}: the labeller hangs"

_FAR = 100  # digits
_RATIO = re.compile(r"[+-]?\d{1,30}/[1-9]\d{0,29}")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SUM = re.compile(r"[0-9]{1,12}(?:\+[0-9]{1,12})+\?")
Label = Callable[[str], str | None]


class Opinion(NamedTuple):
    """`gold` is "" where there is none, and `why` says why not."""

    id: str
    gold: str
    why: str = ""


def arithmetic(problem: str) -> str | None:
    """`12+7+30?` is "49"; anything else is no sum."""
    return str(sum(_summands(problem))) if _SUM.fullmatch(problem) else None


def by_columns(problem: str) -> str | None:
    """The same, as it is done on paper: digit by digit with a carry. A second opinion."""
    if not _SUM.fullmatch(problem):
        return None
    numbers = [number[::-1] for number in problem[:-1].split("+")]
    digits, carry, place = [], 0, 0
    while carry or place < max(map(len, numbers)):
        carry += sum(ord(number[place]) - 48 for number in numbers if place < len(number))
        digits.append(str(carry % 10))
        carry, place = carry // 10, place + 1
    return "".join(reversed(digits)).lstrip("0") or "0"


def is_heldout_sum(problem: str) -> bool:
    """Whether it is, in any order, a sum that is only asked in evaluations."""
    return bool(_SUM.fullmatch(problem)) and split_of(_summands(problem)) == "heldout"


def majority(answers: Sequence[str | None]) -> tuple[str, float]:
    """The answer that more than half of all responses give ("" if there is none), and the share of
    the commonest one.
    """
    counts = Counter(answer for answer in answers if answer)
    if not counts:
        return "", 0.0
    answer, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    share = count / len(answers)
    return (answer if share > 0.5 else ""), share


def same(label: str, other: str) -> bool:
    """Whether two labels say the same: as numbers where both are, 1/2 and 1,000 too, else word by
    word.
    """
    one, two = _number(label), _number(other)
    if one is not None and two is not None:
        return one == two
    return label.split() == other.split()


def load(name: str) -> Label:
    """Raises ConfigError when there is no such function."""
    if name == "arithmetic":
        return arithmetic
    _, module, function = name.split(":")
    import_from_here()
    try:
        found: Label = getattr(importlib.import_module(module), function)
    except Exception as error:  # noqa: BLE001  a module of the user's may raise anything
        raise ConfigError(
            f"learner.synthesis: {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    return found


class Labeller:
    """Asked and heard from one thread; answers in another. `name` is "" where nobody is asked."""

    def __init__(self, name: str, deadline_s: float = DEADLINE_S) -> None:
        self._label = load(name) if name else None
        self._inline = name == "arithmetic"  # known to be quick
        self._deadline_s = deadline_s
        self._waiting: deque[tuple[str, str]] = deque()
        self._done: deque[Opinion] = deque()
        self._now: tuple[str, float] | None = None  # what the thread is asked, since when
        self._questions: queue.SimpleQueue[tuple[str, str] | None] | None = None
        self._answers: queue.SimpleQueue[Opinion] = queue.SimpleQueue()
        self._hung = 0

    def __bool__(self) -> bool:
        return self._label is not None

    def ask(self, id_: str, problem: str) -> None:
        assert self._label is not None, "nobody is asked for labels"
        if self._inline:
            self._done.append(_opinion(self._label, id_, problem))
        elif self._hung >= MOST_HUNG:
            self._done.append(Opinion(id_, "", HANGS))
        else:
            self._waiting.append((id_, problem))
            self._next()

    def hear(self) -> list[Opinion]:
        """What was answered since the last time; never waits."""
        if self._now is not None:
            self._look()
        heard, self._done = list(self._done), deque()
        return heard

    def close(self) -> None:
        if self._questions is not None:
            self._questions.put(None)

    def _look(self) -> None:
        assert self._now is not None
        try:
            self._done.append(self._answers.get_nowait())
        except queue.Empty:
            if time.monotonic() - self._now[1] < self._deadline_s:
                return
            self._done.append(
                Opinion(self._now[0], "", f"{FAULT}: no label in {self._deadline_s:g} s")
            )
            self._abandon()
        self._now = None
        self._next()

    def _abandon(self) -> None:
        """A thread cannot be killed: it is left where it is, and what it says is not heard."""
        self._hung += 1
        self._questions, self._answers = None, queue.SimpleQueue()
        if self._hung >= MOST_HUNG:
            self._done.extend(Opinion(i, "", HANGS) for i, _ in self._waiting)
            self._waiting.clear()

    def _next(self) -> None:
        if self._now is not None or not self._waiting:
            return
        if self._questions is None:
            self._questions = queue.SimpleQueue()
            ends = (self._label, self._questions, self._answers)
            threading.Thread(target=_answer, args=ends, name="labeller", daemon=True).start()
        question = self._waiting.popleft()
        self._now = question[0], time.monotonic()
        self._questions.put(question)


def _answer(
    label: Label,
    questions: queue.SimpleQueue[tuple[str, str] | None],
    answers: queue.SimpleQueue[Opinion],
) -> None:
    while (question := questions.get()) is not None:
        answers.put(_opinion(label, *question))


def _opinion(label: Label, id_: str, problem: str) -> Opinion:
    try:
        gold = label(problem)
    except Exception as error:  # noqa: BLE001  a labeller of the user's may raise anything
        why = f"{FAULT}: the labeller failed: {type(error).__name__}: {error}"
        return Opinion(id_, "", " ".join(why.split())[:300])
    if gold is None or not isinstance(gold, str) or not gold.strip():
        return Opinion(id_, "", "the labeller cannot tell")
    return Opinion(id_, gold)


def _number(label: str) -> Fraction | Decimal | None:
    """A fraction where its digits are few; what is far from 1 stays as it is written."""
    bare = label.strip()
    bare = bare.replace(",", "") if _THOUSANDS.fullmatch(bare) else bare
    if _RATIO.fullmatch(bare):
        return Fraction(bare)
    try:
        found = Decimal(bare)
    except InvalidOperation:
        return None
    if not found.is_finite():
        return None
    return Fraction(found) if abs(found.adjusted()) < _FAR else found


def _summands(problem: str) -> tuple[int, ...]:
    return tuple(int(number) for number in problem.rstrip("?").split("+"))
