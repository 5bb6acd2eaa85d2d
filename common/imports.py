"""Imports of torch and transformers, quicker: they make a million objects that live as long as the
process, and the garbage collector would walk over all of them again and again, then and later.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """What is imported here is never looked at by the garbage collector, which rests meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        keep()
        if was_on:
            gc.enable()


def keep() -> None:
    """All there is now is never looked at again, but at the end of the process: extensions that
    count their objects would say there that some leaked.
    """
    gc.freeze()
    atexit.unregister(gc.unfreeze)
    atexit.register(gc.unfreeze)
