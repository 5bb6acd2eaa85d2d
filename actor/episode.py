"""From a ticket to its rollouts: generate, read, grade; and what the ticket asks for after that.

    generate n ─▶ grade ─┬▶ the rollouts                                        (a plain ticket)
                         ├▶ feedback.converse: wrong answers get further turns
                         └▶ intervene.correct: hinted siblings beside the rollouts

The engine knows prefixes only: whatever makes an episode longer is more segments of a rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from actor import feedback, intervene
from actor.engine.base import Sample
from actor.stage import Answer, Clock, Stage, judged, policy, rollout
from common.episodes import PLAIN
from common.wire import Rollout, Ticket

UNDER_WAY_S = 0.01  # after so long a generation has some tokens


class Played(NamedTuple):
    rollouts: tuple[Rollout, ...]
    timings: dict[str, float]  # seconds of each part
    hinted: tuple[Rollout, ...] = ()


async def play(ticket: Ticket, stage: Stage) -> Played:
    """The rollouts of `ticket`, and how many seconds each part took.

    Raises what the engine raises: DataError (the prompt; an episode out of time), EngineError
    (itself). A grader that failed is a fact about its rollout (`error`), not an exception.
    """
    clock, episode = Clock(), ticket.episode or PLAIN
    samples = await _generate(ticket, stage, clock)
    clock.lap("generate_s")
    answers = await judged(samples, ticket, stage)
    clock.lap("grade_s")
    if episode.feedback is not None:
        talks = await feedback.converse(ticket, episode.feedback, stage, answers, clock)
        return Played(tuple(talks), clock.spent)
    rollouts = tuple(_rollout(answer, ticket) for answer in answers)
    if episode.intervene is None:
        return Played(rollouts, clock.spent)
    hinted, events = await intervene.correct(ticket, episode.intervene, stage, answers)
    clock.lap("intervene_s")
    return Played(intervene.noted(rollouts, events), clock.spent, hinted)


async def _generate(ticket: Ticket, stage: Stage, clock: Clock) -> Sequence[Sample]:
    """The first answers. Those of an episode with feedback have its deadline."""
    rule = None if ticket.episode is None else ticket.episode.feedback
    passes = asyncio.get_running_loop().call_later(UNDER_WAY_S, stage.fail, "mid_generation")
    try:
        if rule is None:
            return await stage.engine.generate(ticket.prompt, ticket.n, ticket.sampling)
        warm = feedback.warmed(ticket.sampling, feedback.temperature(ticket, rule, 0))
        until = clock.began + rule.seconds
        samples = await stage.engine.generate(ticket.prompt, ticket.n, warm, deadline=until)
        feedback.refuse_aborted(samples, rule, stage)
        return samples
    finally:
        passes.cancel()


def _rollout(answer: Answer, ticket: Ticket) -> Rollout:
    return rollout([policy(answer.sample, ticket.sampling.temperature)], [answer])
