"""From a ticket to its rollouts: generate, read, grade.

An episode has one turn here. The engine knows prefixes only, so everything that makes an episode
longer (another turn, a tool's answer, feedback, a hint) is more segments of the same rollout and
belongs into this file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from actor.engine.base import Engine, Sample
from actor.grade.pool import Pool, Verdict
from actor.text import Decode
from common.failpoints import Failpoint
from common.wire import Rollout, Segment, Ticket

UNDER_WAY_S = 0.01  # after so long a generation has some tokens


class Stage(NamedTuple):
    """What an episode is played with."""

    engine: Engine
    decode: Decode
    pool: Pool
    fail: Failpoint


async def play(ticket: Ticket, stage: Stage) -> tuple[tuple[Rollout, ...], dict[str, float]]:
    """The rollouts of `ticket`, and how many seconds each part took.

    Raises what the engine raises: DataError (the prompt), EngineError (itself). A grader that
    failed is a fact about its rollout (`error`), not an exception.
    """
    start = time.monotonic()
    samples = await _generate(ticket, stage)
    generated = time.monotonic()
    texts = [_text(sample, ticket.sampling.stop, stage.decode) for sample in samples]
    prompt = stage.decode(ticket.prompt.tolist())
    verdicts = await stage.pool.grade(prompt, texts, ticket.grading)
    graded = time.monotonic()
    pairs = zip(samples, verdicts, strict=True)
    rollouts = tuple(_rollout(sample, verdict, ticket) for sample, verdict in pairs)
    return rollouts, {"generate_s": generated - start, "grade_s": graded - generated}


async def _generate(ticket: Ticket, stage: Stage) -> Sequence[Sample]:
    passes = asyncio.get_running_loop().call_later(UNDER_WAY_S, stage.fail, "mid_generation")
    try:
        return await stage.engine.generate(ticket.prompt, ticket.n, ticket.sampling)
    finally:
        passes.cancel()


def _text(sample: Sample, stop: Sequence[int], decode: Decode) -> str:
    tokens = sample.tokens.tolist()
    if sample.finish == "stop" and tokens and tokens[-1] in stop:
        tokens.pop()
    return decode(tokens)


def _rollout(sample: Sample, verdict: Verdict, ticket: Ticket) -> Rollout:
    segment = Segment(
        role="policy",
        tokens=sample.tokens,
        logps=sample.logps,
        spans=sample.spans,
        temperature=ticket.sampling.temperature,
    )
    return Rollout(
        segments=(segment,),
        finish=sample.finish,
        correct=next(iter(verdict.parts.values()), 0.0),
        parts=(verdict.parts,) if verdict.parts else (),
        error=verdict.error,
    )
