"""Turns after a wrong answer: say that it is wrong, and let the policy answer again.

    answer ─▶ graded ─▶ right: the episode is over
                  └───▶ feedback ─▶ next answer, from the very tokens so far ─▶ graded ─▶ …

All rollouts of a group take their turns together. The prefix of a turn is the prompt and every
token since, as it was sampled: nothing is rendered again. Noise is a function of (seed, rollout,
turn, position): no turn repeats the draws of another. arXiv 2506.11930, as a way to sample: the
loss masks feedback, and a right answer at turn k is worth gamma^k.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from actor.engine import noise
from actor.engine.base import Sample
from actor.grade.extract import answer_of
from actor.stage import LATER, Answer, Clock, Stage, ended, given, judged, policy, rollout, written
from actor.voice import Asked
from common.episodes import Feedback
from common.errors import DataError
from common.grading import OPTIONS, Extraction, options_of
from common.wire import Grading, Rollout, Sampling, Segment, Ticket

_CHOICE = np.uint64(0x5DEECE66D1CE4E5B)  # which of several tries: a stream of its own


async def converse(
    ticket: Ticket, rule: Feedback, stage: Stage, first: Sequence[Answer], clock: Clock
) -> list[Rollout]:
    """The rollouts that began with `first`. Raises DataError when the time is over."""
    talks = [Talk(ticket, rule, number, answer) for number, answer in enumerate(first)]
    for turn in range(1, rule.turns):
        open_ = [talk for talk in talks if talk.open]
        await asyncio.gather(*(talk.hear(stage) for talk in open_))
        clock.lap("feedback_s")
        open_ = [talk for talk in open_ if talk.open]  # some have no room for another answer
        if not open_:
            break
        until = clock.began + rule.seconds
        tries = await asyncio.gather(*(talk.sample(stage, turn, until) for talk in open_))
        clock.lap("generate_s")
        chosen = [
            talk.choose(several, turn, stage) for talk, several in zip(open_, tries, strict=True)
        ]
        for talk, answer in zip(open_, await judged(chosen, ticket, stage), strict=True):
            talk.say(answer, turn)
        clock.lap("grade_s")
    return [rollout(talk.segments, talk.answers, dict(talk.events)) for talk in talks]


class Talk:
    """One rollout on its way: what was said so far, and by whom."""

    def __init__(self, ticket: Ticket, rule: Feedback, number: int, first: Answer) -> None:
        self.segments: list[Segment] = []
        self.answers: list[Answer] = []
        self.events: Counter[str] = Counter()
        self.open = True  # unsolved, and there is room for another turn
        self._ticket, self._rule, self._number = ticket, rule, number
        self.say(first, 0)

    def say(self, answer: Answer, turn: int) -> None:
        """The policy's next answer. A turn that was chosen among several tries is no sample of
        the policy: it is masked unless the ticket trains on it."""
        rule = self._rule
        segment = policy(answer.sample, temperature(self._ticket, rule, turn), turn)
        if turn > 0 and rule.tries > 1 and not rule.train_tried:
            masked = np.zeros(segment.tokens.size, np.uint8)
            segment = msgspec.structs.replace(segment, mask=masked)
        self.segments.append(segment)
        self.answers.append(answer)
        self.open = not answer.solved and not answer.verdict.error

    async def hear(self, stage: Stage) -> None:
        """Feedback behind the last answer: the voice's, or the plain word that it is wrong."""
        rule, last = self._rule, self.answers[-1]
        end = () if ended(last.sample, self._ticket.sampling.stop) else rule.end
        words = await self._words(stage, last)
        for tokens in (words, rule.wrong):
            room = stage.engine.max_length - self._ticket.sampling.max_tokens - self._size
            if len(tokens) and len(end) + len(tokens) <= room:
                turn = self.segments[-1].turn
                said = given((*end, *tokens), self.segments[-1], "feedback", turn)
                self.segments.append(said)
                return
        self.events["no_room"] += 1
        self.open = False

    async def sample(self, stage: Stage, turn: int, until: float) -> Sequence[Sample]:
        rule, ticket = self._rule, self._ticket
        first = turn * LATER + self._number * rule.tries
        samples = await stage.engine.generate(
            np.concatenate([ticket.prompt, *(s.tokens for s in self.segments)]),
            rule.tries,
            warmed(ticket.sampling, temperature(ticket, rule, turn)),
            first=first,
            deadline=until,
        )
        refuse_aborted(samples, rule, stage)
        return samples

    def choose(self, samples: Sequence[Sample], turn: int, stage: Stage) -> Sample:
        """One of several tries: uniformly among those that give an answer not given before, or
        among all when there is none."""
        if len(samples) == 1:
            return samples[0]
        ticket = self._ticket
        texts = [written(sample, ticket.sampling.stop, stage.text) for sample in samples]
        before = {answer_key(answer.text, ticket.grading) for answer in self.answers}
        key = noise.keys(ticket.sampling.seed, np.array([self._number])) ^ _CHOICE
        at = noise.uniform(key, np.array([turn]))[0]
        return samples[novel([answer_key(t, ticket.grading) for t in texts], before, float(at))]

    @property
    def _size(self) -> int:
        return self._ticket.prompt.size + sum(s.tokens.size for s in self.segments)

    async def _words(self, stage: Stage, last: Answer) -> tuple[int, ...]:
        """Tokens of the voice's feedback with what stands around it; () where there is none."""
        rule, ticket = self._rule, self._ticket
        if rule.voice is None:
            return ()
        asked = Asked(stage.text(ticket.prompt.tolist()), last.text, ticket.grading)
        said, event = await stage.voices.ask("feedback", rule.voice, asked, rule.words)
        tokens = stage.text.encode(said.words)[: rule.words].tolist()
        self.events.update([event] if event else [])
        if not tokens:
            self.events["feedback_plain"] += 1
            return ()
        return (*rule.open, *tokens, *rule.close)


def temperature(ticket: Ticket, rule: Feedback, turn: int) -> float:
    return rule.temperatures[turn] if rule.temperatures else ticket.sampling.temperature


def warmed(sampling: Sampling, to: float) -> Sampling:
    return msgspec.structs.replace(sampling, temperature=to)


def refuse_aborted(samples: Sequence[Sample], rule: Feedback, stage: Stage) -> None:
    """An episode out of time has no end, and so no reward: its group is asked elsewhere, or another
    one is."""
    if any(sample.finish == "aborted" for sample in samples):
        stage.voices.counts["episode_abandoned"] += 1
        raise DataError(f"episode_abandoned: not over within {rule.seconds:g} s (feedback.seconds)")


def novel(keys: Sequence[str | None], before: set[str | None], at: float) -> int:
    """Index of the choice `at` (0 ≤ at < 1) among the keys that are not in `before`; among all when
    none is."""
    fresh = [i for i, key in enumerate(keys) if key not in before] or list(range(len(keys)))
    return fresh[int(at * len(fresh))]


def answer_key(text: str, grading: Grading) -> str | None:
    """What makes two answers the same: what the first grader would look at, spaces and capitals
    apart; the whole text where the grader is a stranger."""
    first = grading.parts[0] if grading.parts else None
    known = first is not None and first.grader in OPTIONS
    options = options_of(first.grader, first.options) if first and known else None
    found = answer_of(text, options) if isinstance(options, Extraction) else text
    return None if found is None else "".join(found.split()).casefold()
