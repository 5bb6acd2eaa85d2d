"""Actors that pull versions, each a process of its own: `python _weights_pull.py URL STORE LEARNER
KEYS`.

A line on stdin: pull the newest version, verify it, say how long it took. The end of stdin: go.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

RUN = "pull"


class Pullers:
    """So many actors, ready to go at once."""

    def __init__(self, count: int, *arguments: str) -> None:
        command = [sys.executable, __file__, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._actors = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
        for actor in self._actors:
            assert actor.stdout.readline() == "ready\n"

    def __enter__(self) -> Pullers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for actor in self._actors:
            actor.stdin.close()
            actor.wait(20)
            actor.stdout.close()

    def pull(self, count: int) -> float:
        """Seconds from the start until the last of `count` has verified it."""
        began = time.perf_counter()
        for actor in self._actors[:count]:
            print("pull", file=actor.stdin, flush=True)
        for actor in self._actors[:count]:
            assert actor.stdout.readline().startswith("done")
        return time.perf_counter() - began


def main(url: str, store: str, learner: str, keys: str) -> None:
    from common.config import RunConfig
    from common.pull import fetch
    from common.stores import open_source
    from common.versions import Registry

    registry = Registry(url, RUN)
    source = open_source(RunConfig(store=store, learner=learner, keys=keys), registry)
    print("ready", flush=True)
    for _ in sys.stdin:
        weights = fetch(registry, source)
        print("done", weights.version, flush=True)
        del weights
    source.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(*sys.argv[1:])
