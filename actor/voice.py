"""Asking somebody outside of the policy about an answer: a user's function in a process of its own,
or an OpenAI-compatible endpoint. Both have a deadline; who is down, slow, or gives the answer away
is counted by name, said once in the log, and the episode goes on without. Who fails again and again
is left alone for a while (breaker.py), and then asked again.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from typing import Literal, NamedTuple

import msgspec

from actor.breaker import MOST_S, Breaker
from actor.endpoint import Endpoint
from actor.grade.pool import Pool
from actor.grade.said import Said, read
from actor.grade.worker import Question
from actor.leak import guard
from common.episodes import Voice
from common.errors import DataError, DeadlineError
from common.wire import Grading

log = logging.getLogger(__name__)

Role = Literal["feedback", "judge"]
TOLD = 64  # different complaints that are logged, each once
FLAW = 64  # characters of a flaw's name

_TASK: dict[Role, str] = {
    "feedback": "You help somebody whose answer to a problem is wrong. Say in a few plain sentences"
    " where the reasoning fails and what to look at again. You know the right answer; do not write"
    " it, nor any number or word from which it could be read off.",
    "judge": "You look for the first mistake in somebody's answer to a problem. If there is none,"
    " reply null. Otherwise reply with one JSON object and nothing else: flaw (a short name of the"
    " kind of mistake), quote (the exact words of the first wrong step), words (one or two"
    " sentences in the writer's own voice that notice the mistake and turn to what is right). Do"
    " not write the right answer.",
}


class Asked(NamedTuple):
    """What a voice hears."""

    question: str
    answer: str
    grading: Grading


class Voices:
    """Those that the tickets of one actor name. Nothing is started before the first question."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # by role and trouble: feedback_slow, judge_down …
        self._pool: Pool | None = None
        self._endpoint: Endpoint | None = None
        self._breakers: defaultdict[str, Breaker] = defaultdict(Breaker)  # by place
        self._left_alone: set[str] = set()  # places of which that was said
        self._told: set[str] = set()

    async def ask(self, role: Role, voice: Voice, asked: Asked, words: int) -> tuple[Said, str]:
        """What it says, free of the gold answer, and the name of what went wrong with it, if
        anything did: ROLE_down, _slow, _paused, _leak. Without words there is nothing to go on
        with.
        """
        breaker, began = self._breakers[voice.place], time.monotonic()
        if not breaker.allows(began, voice.seconds):
            return Said(), self._count(role, "paused")
        try:
            said = _writable(await self._say(role, voice, asked, words))
        except DeadlineError as error:
            return Said(), self._fails(role, "slow", voice, error, began)
        except DataError as error:
            return Said(), self._fails(role, "down", voice, error, began)
        if breaker.worked():
            log.info("%s: %s answers again", role, voice.place)
        kept, leaked = guard(said.words, asked.grading.gold)
        if leaked:
            self._tell(f"{role}: {voice.place} gives the gold answer away; masked")
            return msgspec.structs.replace(said, words=kept), self._count(role, "leak")
        return said, ""

    async def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        if self._pool is not None:
            await self._pool.close()

    async def _say(self, role: Role, voice: Voice, asked: Asked, words: int) -> Said:
        if not voice.place.startswith("python:"):
            self._endpoint = self._endpoint or Endpoint()
            text = await self._endpoint.ask(voice, _messages(role, asked), words)
            return _parsed(voice, text) if role == "judge" else Said(words=text.strip())
        self._pool = self._pool or Pool(1, voice.seconds)
        marks = await self._pool.say(_question(voice, asked), voice.seconds)
        if marks.error.startswith("no verdict within"):
            raise DeadlineError(f"{voice.place}: nothing said within {voice.seconds:g} s")
        if marks.error:
            raise DataError(f"{voice.place}: {marks.error}")
        return marks.said

    def _fails(self, role: Role, trouble: str, voice: Voice, error: Exception, began: float) -> str:
        self._tell(f"{role}: {error}")
        paused = self._breakers[voice.place].failed(began, time.monotonic())
        if paused and voice.place not in self._left_alone:
            self._left_alone.add(voice.place)
            log.warning(
                "%s: %s fails again and again; it is left alone for a while, then asked again, "
                "every %g s at least",
                *(role, voice.place, MOST_S),
            )
        return self._count(role, trouble)

    def _count(self, role: Role, trouble: str) -> str:
        event = f"{role}_{trouble}"
        self.counts[event] += 1
        return event

    def _tell(self, line: str) -> None:
        if line not in self._told and len(self._told) < TOLD:
            self._told.add(line)
            log.warning("%s", line)


def _writable(said: Said) -> Said:
    """As UTF-8 can hold it: halves of characters can neither be tokenised nor sent. A flaw's name
    goes into every record.
    """
    words, flaw, quote = (
        text.encode(errors="replace").decode() for text in (said.words, said.flaw, said.quote)
    )
    return Said(words=words, flaw=flaw[:FLAW], quote=quote)


def _question(voice: Voice, asked: Asked) -> Question:
    return Question(
        grader=voice.place,
        prompt=asked.question,
        texts=[asked.answer],
        gold=asked.grading.gold,
        columns=asked.grading.columns,
        options={},
        wants="words",
    )


def _messages(role: Role, asked: Asked) -> list[dict[str, str]]:
    said = f"Problem:\n{asked.question}\n\nAnswer:\n{asked.answer}"
    return [
        {"role": "system", "content": _TASK[role]},
        {"role": "user", "content": f"{said}\n\nThe right answer is: {asked.grading.gold}"},
    ]


def _parsed(voice: Voice, text: str) -> Said:
    """A judge's object, wherever it stands in what an endpoint's model wrote around it."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return Said()
    try:
        return read(voice.place, json.loads(text[start : end + 1]))
    except (ValueError, RecursionError) as error:  # DataError, and what json raises
        raise DataError(f"{voice.place}: not the object asked for: {error}") from None
