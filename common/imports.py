"""Imports of torch and transformers, quicker: they make a million objects that live as long as the
process, and the garbage collector would walk over all of them again and again, then and later.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """What is imported here is never looked at by the garbage collector, which rests meanwhile.
    Where it was imported before, nothing is kept: an engine that broke may lie about, with its
    weights, and is to go.
    """
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
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
