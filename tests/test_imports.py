"""What is imported for good, and what is not kept with it."""

from __future__ import annotations

import gc
import weakref

from common.imports import lasting


class Engine:
    def __init__(self) -> None:
        self.itself = self


def test_a_broken_engine_goes_although_another_one_is_made() -> None:
    gone = weakref.ref(Engine())
    with lasting():
        import json  # noqa: F401  known before
    gc.collect()
    assert gone() is None
