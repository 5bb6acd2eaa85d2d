"""Regular expressions of a recipe, on text that nobody chose: bounded in time.

Python's `re` cannot be interrupted, and a pattern with repeats inside of repeats, such as
`(a+)+$`, takes longer than anybody waits for a few dozen letters. `regex` reads the same patterns,
looks at the clock while it searches and lets go of the interpreter.
"""

from __future__ import annotations

import logging
from typing import Any

import regex

from common.errors import ConfigError, DeadlineError

log = logging.getLogger("isentrope.patterns")

DEADLINE_S = 0.1  # of the processor's time, for one text
MOST_SLOW = 3  # texts in a row that took longer; then it is not tried any more


class Pattern:
    """One pattern; `name` is the recipe's key, for messages. Raises ConfigError: no pattern."""

    def __init__(
        self, name: str, pattern: str, across_lines: bool = False, deadline_s: float = DEADLINE_S
    ) -> None:
        """`across_lines`: a dot is also the end of a line."""
        self._name, self._deadline_s = name, deadline_s
        flags = regex.DOTALL if across_lines else 0
        self._search = _compiled(name, pattern, flags).search
        self._slow = 0  # in a row

    def find(self, text: str) -> str | None:
        """Its first group where it first matches; None: it does not. Raises DeadlineError."""
        if self._slow >= MOST_SLOW:
            raise DeadlineError(f"{self._name} is given up, it took too long {MOST_SLOW} times")
        try:
            found = self._search(text, timeout=self._deadline_s, concurrent=True)
        except TimeoutError:
            self._slow += 1
            raise self._complaint(text) from None
        self._slow = 0
        return None if found is None else found.group(1)

    def _complaint(self, text: str) -> DeadlineError:
        said = f"{self._name}: no verdict on {len(text)} characters within {self._deadline_s:g} s"
        given_up = "; it is not tried any more" if self._slow >= MOST_SLOW else ""
        if self._slow in (1, MOST_SLOW):
            message = "%s%s: write the regular expression without repeats inside of repeats"
            log.warning(message, said, given_up)
        return DeadlineError(said)


def groups(name: str, pattern: str) -> int:
    """How many groups it has. Raises ConfigError: no pattern."""
    return int(_compiled(name, pattern, 0).groups)


def _compiled(name: str, pattern: str, flags: int) -> Any:
    try:
        return regex.compile(pattern, flags)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}: no regular expression ({error})") from None
