"""What tests of episodes share: an engine that says what it is told, a stage, tickets on sums, an
endpoint that answers every request alike.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np

from actor import text
from actor.config import ScriptedConfig
from actor.engine.base import Sample
from actor.engine.scripted import ScriptedEngine
from actor.grade.pool import Pool
from actor.stage import LATER, Budget, Stage
from actor.voice import Voices
from common import models
from common.episodes import Episode
from common.failpoints import Failpoint
from common.wire import Finish, GradePart, Grading, Sampling, Ticket
from tests.builders import make_ticket

TINY = models.find("tiny")
EXACT = Grading(
    gold="19", parts=(GradePart(name="correct", grader="exact", options={"after": "#"}),)
)
WORDS = text.load(TINY, 32)
EOS = 2


def tokens_of(written: str) -> list[int]:
    """Of a text without spaces; <eos> is the end."""
    answer, _, end = written.partition("<eos>")
    return [*WORDS.encode(answer).tolist(), *([EOS] if written.endswith("<eos>") else end)]


class Call(NamedTuple):
    prefix: list[int]
    n: int
    sampling: Sampling
    first: int


class Speaker(ScriptedEngine):
    """Rollout i says `answers[i]` in turn, whatever it is asked; an answer without <eos> was cut.
    Turn k comes from version 3 + k."""

    def __init__(self, answers: dict[int, list[str]], max_length: int = 128) -> None:
        super().__init__(ScriptedConfig(), slots=4, max_length=max_length)
        self.calls: list[Call] = []
        self._answers = {number: list(said) for number, said in answers.items()}
        self._turn: dict[int, int] = {}

    async def generate(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        *,
        first: int = 0,
        deadline: float | None = None,
    ) -> list[Sample]:
        self.calls.append(Call(prefix.tolist(), n, sampling, first))
        return [self._sample(number % LATER) for number in range(first, first + n)]

    def _sample(self, number: int) -> Sample:  # type: ignore[override]
        turn = self._turn.get(number, 0)
        self._turn[number] = turn + 1
        said = self._answers[number].pop(0)
        tokens = np.array(tokens_of(said), np.int32)
        finish: Finish = "stop" if said.endswith("<eos>") else "length"
        if said == "aborted":
            return Sample(tokens[:0], np.zeros(0, np.float32), ((0, 3),), "aborted")
        logps = np.linspace(-1, -0.1, tokens.size, dtype=np.float32)
        return Sample(tokens, logps, ((0, 3 + turn),), finish)


def stage(engine: Any, pool: Pool, voices: Voices | None = None) -> Stage:
    return Stage(engine, WORDS, pool, Failpoint(), voices or Voices(), Budget())


def asks(n: int, episode: Episode | None, grading: Grading = EXACT, **fields: Any) -> Ticket:
    chosen: dict[str, Any] = {"temperature": 0.7, "max_tokens": 20, "seed": 5} | fields
    sampling = Sampling(stop=(EOS,), **chosen)
    prompt = tokens_of("12+7?")
    return make_ticket(5, prompt=prompt, n=n, sampling=sampling, grading=grading, episode=episode)


Make = Callable[..., Stage]


@asynccontextmanager
async def endpoint(
    body: bytes, status: str | list[str] = "200 OK", pause_s: float = 0.0
) -> AsyncIterator[Any]:
    """A real server that answers every request alike, as the one status in a list says if it is
    one; yields its address and what it heard.
    """
    heard: list[bytes] = []
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        heard.append(head + await reader.readexactly(length))
        length_line = f"Content-Length: {len(body)}\r\n\r\n".encode()
        said = status if isinstance(status, str) else status[0]
        writer.write(f"HTTP/1.1 {said}\r\n".encode() + length_line)
        if pause_s:
            await asyncio.wait([asyncio.ensure_future(over.wait())], timeout=pause_s)
        writer.write(body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1", heard
    finally:
        over.set()
        server.close()
        await server.wait_closed()


def completion(words: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": words}}]}).encode()
