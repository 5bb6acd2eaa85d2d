"""The ranks of one machine, started without torchrun, which listens on every address and unpickles
what it is told there: these find each other by a file in a folder that only their user may enter.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from common.errors import RankError
from common.process import kill_session, spawn
from learner.config import STORE_VARIABLE

PATIENCE_S = 10.0  # from the end of one rank to that of the next: they notice it themselves

_Ended = queue.SimpleQueue[int]


def launch(count: int, command: Sequence[str]) -> int:
    """`command` in `count` processes, to their end; the exit code of the first that failed, else 0.

    SIGTERM and SIGINT go to rank 0, which drains. None outlives this process. Raises RankError when
    one was killed. Call this from the main thread.
    """
    with tempfile.TemporaryDirectory(prefix="isentrope-ranks-") as private:  # mode 0700
        ranks: list[subprocess.Popen[bytes]] = []
        with _signals_to_first(ranks):
            try:
                for rank in range(count):
                    ranks.append(spawn(command, env=_environment(rank, count, Path(private))))
                return _watch(ranks)
            finally:
                for process in ranks:
                    kill_session(process)


def _environment(rank: int, count: int, private: Path) -> dict[str, str]:
    """What torchrun would say, but for where the store is."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    numbers = {name: str(value) for name, value in said.items()}
    return {**os.environ, **numbers, STORE_VARIABLE: str(private / "store")}


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    ended = _Ended()
    for rank, process in enumerate(ranks):
        threading.Thread(target=_tell, args=(rank, process, ended), daemon=True).start()
    first, patience_s = None, None
    for _ in ranks:
        try:
            rank = ended.get(timeout=patience_s)
        except queue.Empty:
            break
        patience_s = PATIENCE_S
        if first is None and ranks[rank].returncode:
            first = rank
    if first is None:
        return 0
    code = ranks[first].returncode
    if code < 0:
        raise RankError(
            f"rank {first} of the learner was killed by signal {-code}, so all {len(ranks)} ended; "
            "go on with --resume, on any number of ranks"
        )
    return code


def _tell(rank: int, process: subprocess.Popen[bytes], ended: _Ended) -> None:
    process.wait()
    ended.put(rank)


@contextmanager
def _signals_to_first(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        if ranks:
            ranks[0].send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
