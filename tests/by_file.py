"""The whole suite on several processes (pytest-xdist): which of them runs which tests.

A file stays in one process, so that its tests share what they have set up. Files with tests that
were given more time than others (they start whole runs) are handed out first, so that short ones
fill the end. Whatever is about vLLM comes last and stays in one process: an engine wants the cores
and the memory for itself.
"""

from __future__ import annotations

import os
from pathlib import PurePath

import pytest
from xdist.scheduler import LoadScopeScheduling

AT_MOST = 4  # processes: each holds a torch, and so do two of every run that it starts


class ByFile(LoadScopeScheduling):
    """Hands files out in the order of collection."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "vllm" if is_of_vllm(path) else path


def is_of_vllm(path: str) -> bool:
    return PurePath(path).name.startswith("test_vllm")


def long_first(items: list[pytest.Item]) -> None:
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    items.sort(key=lambda item: (is_of_vllm(item.path.name), item.path not in long))


def processes(config: pytest.Config) -> int:
    """One for each core when the whole suite is asked for. None besides this one (0) for a file, a
    test or a word: there it takes longer to start them than they save.
    """
    named = any(".py" in asked for asked in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    few = named or config.option.keyword or config.getoption("lf", False) or (cores or 1) < 2
    return 0 if few else min(cores or 1, AT_MOST)
