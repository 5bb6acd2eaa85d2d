"""Several ranks of a learner, for tests: processes forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing as standard
from collections.abc import Callable
from typing import Any

from torch import multiprocessing


def together(count: int, deed: Callable[..., None], *arguments: Any) -> None:
    """`deed(rank, *arguments)` in `count` processes; raises when one of them does."""
    standard.set_forkserver_preload(["learner.ranks", "tests.builders", "tests.conftest"])
    multiprocessing.start_processes(deed, arguments, nprocs=count, start_method="forkserver")
