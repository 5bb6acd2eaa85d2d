"""What one thread wants done in another, between two of its turns. The desk's thread does them; who
asked waits, and is woken by the turn that answers or by that thread's own death.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Errand = tuple[Callable[[], Any], "Future[Any]"]
Resolve = Callable[["Future[Any]", Any], None]

LOOK_S = 1.0  # seconds between looks whether the other thread still lives
IDLE_S = 0.5  # … and between two calls of what a wait does meanwhile


class Errands:
    """`ring` wakes the thread that does them, `alive` says whether it still runs. `meanwhile` runs
    once a second in whoever waits long for a value: on a full disk that may be hours.
    """

    def __init__(
        self,
        ring: Callable[[], None],
        alive: Callable[[], bool],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self._ring, self._alive, self._meanwhile = ring, alive, meanwhile
        self._calls: deque[Errand] = deque()
        self._looks: deque[Errand] = deque()
        self._waits: deque[Errand] = deque()
        self._death: BaseException | None = None

    # ---- for who asks ------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Its value, once everything that it led to has been resolved."""
        value: T = self._value(self._post(self._calls, function))
        return value

    def look(self, function: Callable[[], T]) -> T:
        """The same of a function that only reads: also while nothing may be done."""
        value: T = self._value(self._post(self._looks, function))
        return value

    def wait(self, condition: Callable[[], T | None], idle: Callable[[], bool]) -> T | None:
        """The first value of `condition` that is not None. `idle` runs twice a second; when it is
        True, give up.
        """
        future = self._post(self._waits, condition)
        while not _done(future, IDLE_S):
            self._check_alive()
            if idle() and future.cancel():
                return None
        value: T | None = future.result()
        return value

    def _post(self, queue: deque[Errand], function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        queue.append((function, future))
        self._ring()
        return future

    def _value(self, future: Future[Any]) -> Any:
        while not _done(future, LOOK_S):
            self._check_alive()
            self._meanwhile()
        return future.result()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death
        assert self._alive(), "the thread ended without a word"

    # ---- for who does them -------------------------------------------------------------------

    def run(self, resolve: Resolve, blocked: Callable[[], object]) -> None:
        """Looks, and calls unless `blocked`; a call's value goes to `resolve`, an error back."""
        while self._looks:
            function, future = self._looks.popleft()
            future.set_result(function())
        while self._calls and not blocked():
            function, future = self._calls.popleft()
            try:
                resolve(future, function())
            except Exception as error:  # noqa: BLE001 - it belongs to the caller, who raises it
                future.set_exception(error)

    def answer(self, resolve: Resolve) -> None:
        """Those waits whose condition has come true."""
        for _ in range(len(self._waits)):  # the same deque throughout: others append meanwhile
            condition, future = self._waits.popleft()
            value = None if future.cancelled() else condition()
            if value is not None:
                resolve(future, value)
            elif not future.cancelled():
                self._waits.append((condition, future))

    def abandon(self, error: BaseException) -> None:
        """Nothing will be done any more: everybody who waits hears why."""
        self._death = error
        for _, future in [*self._calls, *self._looks, *self._waits]:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _done(future: Future[Any], timeout_s: float) -> bool:
    try:
        future.exception(timeout_s)
    except TimeoutError:
        return False
    return True
