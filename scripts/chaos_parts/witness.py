"""An actor with a memory: the real actor's loop on the scripted engine, and a file with the number
of every ticket whose result the learner acknowledged.

    python witness.py RECIPE NAME ACKED [-s section.key=value …]

At the end of a chaos run all of them have to be in the learner's journal: what was acknowledged may
not be lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from actor import loop
from actor.config import ActorConfig
from actor.desk import Desk
from actor.engine.make import make
from actor.engine.restart import RestartingEngine
from common import log
from common.config import RunConfig
from common.recipe import load
from common.wire import Answer


class RememberingDesk(Desk):
    def __init__(self, actor: ActorConfig, path: str) -> None:
        super().__init__(actor.slots, actor.prefetch, actor.adaptive)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def settle(self, answer: Answer) -> None:
        if answer.verdict == "ack":
            tickets = [t for t in (answer.ticket, *answer.also) if t in self.owed]
            os.write(self._file, "".join(f"{ticket}\n" for ticket in tickets).encode())
        super().settle(answer)


async def witness(run: RunConfig, actor: ActorConfig, name: str, path: str) -> None:
    desk = RememberingDesk(actor, path)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, desk.leave, "asked to")
    engine = RestartingEngine(lambda: make(run, actor), actor.engine_restarts, actor.engine_start_s)
    try:
        await engine.start()
        await loop.serve(run, actor, name, engine, desk)
    finally:
        await engine.close()


def main(recipe: str, name: str, path: str, *rest: str) -> None:
    overrides = [value for flag, value in zip(rest[::2], rest[1::2], strict=True) if flag == "-s"]
    sections = load(recipe, {"run": RunConfig, "actor": ActorConfig}, overrides)
    run, actor = sections["run"], sections["actor"]
    assert isinstance(run, RunConfig)
    assert isinstance(actor, ActorConfig)
    log.setup(name)
    asyncio.run(witness(run, actor, name, path))


if __name__ == "__main__":
    main(*sys.argv[1:])
