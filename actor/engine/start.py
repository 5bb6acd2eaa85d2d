"""How an engine is made while the event loop goes on, and closed although it may not want to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

from actor.engine.base import Engine
from common.errors import EngineError, IsentropeError

log = logging.getLogger(__name__)

CLOSE_S = 10.0  # for an engine to give back what it has
MESSAGE_LENGTH = 300  # of what torch or the system says, on one line


async def made(make: Callable[[], Engine], within_s: float) -> Engine:
    """Make an engine in a thread of its own, while this loop goes on.

    The thread is nobody's hostage: it dies with the process, and closes an engine that comes too
    late. Raises what `make` raises; EngineError past the deadline, or for want of memory.
    """
    coming: Future[Engine] = Future()
    threading.Thread(target=_fulfil, args=(coming, make), name="engine", daemon=True).start()
    limit = asyncio.timeout(within_s)
    try:
        async with limit:
            return await asyncio.wrap_future(coming)
    except IsentropeError:
        raise
    except TimeoutError:
        if limit.expired():
            await _give_up(coming)
            raise EngineError(
                f"the engine was not up within {within_s:g} s (actor.engine_start_s)"
            ) from None
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())[:MESSAGE_LENGTH]
        raise EngineError(f"the engine did not start: {type(error).__name__}: {said}") from error
    except asyncio.CancelledError:
        await _give_up(coming)
        raise


def _fulfil(coming: Future[Engine], make: Callable[[], Engine]) -> None:
    try:
        engine = make()
    except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
        with contextlib.suppress(InvalidStateError):
            coming.set_exception(error)
        return
    try:
        coming.set_result(engine)
    except InvalidStateError:  # nobody waits any more
        asyncio.run(close(engine))


async def _give_up(coming: Future[Engine]) -> None:
    if not coming.cancel() and not coming.cancelled() and coming.exception() is None:
        await close(coming.result())


async def close(engine: Engine, within_s: float = CLOSE_S) -> None:
    try:
        async with asyncio.timeout(within_s):
            await engine.close()
    except TimeoutError:
        log.error("the engine did not close within %g s and is left behind", within_s)
