"""Interveners: a finished answer gets a hint where it first goes wrong, and the policy goes on.

    answer ─▶ inspect ─▶ nothing found: it stays what it is
                 └─────▶ answer[:at] + hint + the policy's own continuation ─▶ graded ─▶ inspect …

What comes of it is a sibling beside the group's rollouts, never in place of one: the group is what
it would have been without, to the last bit. Hint tokens are never trained on; the tokens behind
them have log-probs under the context with the hint. They are for supervised training, where the
answer is right in the end and nothing is found any more (`clean`). Hints are kept within a share of
all sampled tokens. arXiv 2510.04204.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from actor.engine.base import Sample
from actor.stage import LATER, Answer, Stage, ended, given, judged, policy, rollout
from actor.text import Decode
from actor.triggers import first_flaw
from actor.voice import Asked
from common.episodes import Intervene
from common.wire import Finish, Rollout, Segment, Ticket


class Edit(NamedTuple):
    """Keep so many tokens of the last answer, then the hint."""

    at: int
    hint: tuple[int, ...]
    flaw: str


async def correct(
    ticket: Ticket, rule: Intervene, stage: Stage, answers: Sequence[Answer]
) -> tuple[tuple[Rollout, ...], list[Counter[str]]]:
    """The hinted siblings, and what went wrong on the way, one counter an answer. Never raises
    because of a judge."""
    stage.budget.sampled += sum(answer.sample.tokens.size for answer in answers)
    any_right = any(answer.solved for answer in answers)
    tries = [Attempt(ticket, rule, i, a, any_right) for i, a in enumerate(answers)]
    found = await asyncio.gather(*(attempt.run(stage) for attempt in tries))
    hinted = tuple(rollout for rollout in found if rollout is not None)
    return hinted, [attempt.events for attempt in tries]


def noted(rollouts: Sequence[Rollout], events: Sequence[Counter[str]]) -> tuple[Rollout, ...]:
    """The rollouts, with what happened to those that were looked at."""
    pairs = zip(rollouts, events, strict=True)
    replace = msgspec.structs.replace
    return tuple(replace(r, events=dict(e)) if e else r for r, e in pairs)


class Attempt:
    """One answer that is looked at, and what it becomes."""

    def __init__(
        self, ticket: Ticket, rule: Intervene, number: int, answer: Answer, any_right: bool
    ) -> None:
        self.events: Counter[str] = Counter()
        self._ticket, self._rule, self._number = ticket, rule, number
        self._any_right = any_right
        self._answer = answer
        self._segments: list[Segment] = [policy(answer.sample, ticket.sampling.temperature)]
        self._flaws: list[str] = []

    async def run(self, stage: Stage) -> Rollout | None:
        """None where it stays what it is: nothing was found, or nothing could be done."""
        until = time.monotonic() + self._rule.seconds
        edit = None
        while not self._answer.verdict.error:
            edit = await self._inspect(stage)
            if edit is None or not self._may(edit, stage):
                break
            if not await self._go_on(edit, stage, until):
                return None
        if not self._flaws or self._answer.verdict.error:
            return None
        behind = self._segments[1:]  # counted when it is there to stay
        stage.budget.sampled += sum(s.tokens.size for s in behind if s.role == "policy")
        made = rollout(self._segments, [self._answer])
        return msgspec.structs.replace(made, flaws=tuple(self._flaws), clean=edit is None)

    async def _inspect(self, stage: Stage) -> Edit | None:
        """Triggers choose what a judge is asked about; without triggers it is asked about all."""
        rule, tokens = self._rule, self._tokens()
        flaw = first_flaw(tokens, self._answer.solved, self._any_right, rule)
        if rule.triggers and flaw is None:
            return None
        if rule.judge is None:
            return None if flaw is None else Edit(flaw.at, rule.hint, flaw.name)
        asked = Asked(
            stage.text(self._ticket.prompt.tolist()), self._answer.text, self._ticket.grading
        )
        said, event = await stage.voices.ask("judge", rule.judge, asked, rule.hint_tokens)
        self.events.update([event] if event else [])
        hint = tuple(stage.text.encode(said.words)[: rule.hint_tokens].tolist())
        if not hint:
            return None
        whole = self._answer.sample.tokens
        at = place(whole, self._answer.text, said.quote, stage.text, rule.cut)
        before = whole.size - self._segments[-1].tokens.size  # earlier hints stay where they are
        return Edit(min(max(at - before, 0), tokens.size), hint, said.flaw or "judge")

    def _may(self, edit: Edit, stage: Stage) -> bool:
        """Rounds, room and budget are there; the budget is spent then."""
        rule, ticket = self._rule, self._ticket
        if len(self._flaws) >= rule.rounds:
            return False
        before = sum(s.tokens.size for s in self._segments[:-1])
        size = ticket.prompt.size + before + edit.at + len(edit.hint)
        if size + ticket.sampling.max_tokens > stage.engine.max_length:
            self.events["no_room"] += 1
            return False
        if not stage.budget.take(len(edit.hint), rule.share):
            self.events["no_budget"] += 1
            return False
        return True

    async def _go_on(self, edit: Edit, stage: Stage, until: float) -> bool:
        """False when the time was over: the continuation has no end."""
        ticket = self._ticket
        kept = head(self._segments[-1], edit.at)
        segments = [*self._segments[:-1], kept, given(edit.hint, kept, "hint", 0)]
        number = LATER * (1 + len(self._flaws)) + self._number
        prefix = np.concatenate([ticket.prompt, *(s.tokens for s in segments)])
        (sample,) = await stage.engine.generate(
            prefix, 1, ticket.sampling, first=number, deadline=until
        )
        if sample.finish == "aborted":
            self.events["intervention_abandoned"] += 1
            return False
        segments.append(policy(sample, ticket.sampling.temperature))
        (graded,) = await judged([_joined(segments, sample.finish)], ticket, stage)
        self._answer = graded
        self._segments = segments
        self._flaws.append(edit.flaw)
        return True

    def _tokens(self) -> np.ndarray:
        """The last answer without its stop token: what may be found fault with."""
        tokens = self._segments[-1].tokens
        return tokens[:-1] if ended(self._answer.sample, self._ticket.sampling.stop) else tokens


def place(tokens: np.ndarray, text: str, quote: str, decode: Decode, cut: bool) -> int:
    """How many of the tokens int32 [T] of `text` stay: those up to the end of the quote, or with
    `cut` those before it; all where it is not there."""
    start = text.find(quote) if quote else -1
    if start < 0:
        return int(tokens.size)
    sizes = range(tokens.size + 1)
    ids = tokens.tolist()

    def reach(size: int) -> int:
        return len(decode(ids[:size]))

    if cut:
        return bisect_right(sizes, start, key=reach) - 1
    return min(bisect_left(sizes, start + len(quote), key=reach), tokens.size)


def head(segment: Segment, size: int) -> Segment:
    """Its first `size` tokens, as they were."""
    return msgspec.structs.replace(
        segment,
        tokens=segment.tokens[:size],
        logps=segment.logps[:size],
        spans=tuple(span for span in segment.spans if span[0] < max(size, 1)),
    )


def _joined(segments: Sequence[Segment], finish: Finish) -> Sample:
    """All of a response as one answer, to be read and graded."""
    tokens = np.concatenate([segment.tokens for segment in segments])
    logps = np.concatenate([segment.logps for segment in segments])
    return Sample(tokens, logps, segments[-1].spans, finish)
