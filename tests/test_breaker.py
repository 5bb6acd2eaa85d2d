"""A voice that is down: it costs a deadline now and then, not every episode one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import pytest

from actor.breaker import FAILURES, MOST_S, PAUSE_S, Breaker
from actor.voice import Asked, Voices
from common.episodes import Voice
from tests.talking import EXACT, completion, endpoint

ASKED = Asked("12+7?", "12+7=18#18", EXACT)
DEADLINE_S = 0.3


@pytest.fixture
async def voices() -> AsyncIterator[Voices]:
    voices = Voices()
    yield voices
    await voices.close()


def broken(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES):
        assert breaker.allows(at, DEADLINE_S)
        breaker.failed(at, at)
    return breaker


def test_some_failures_are_no_reason_to_stop_asking_and_an_answer_forgets_them() -> None:
    breaker = Breaker()
    for _ in range(10):
        for _ in range(FAILURES - 1):
            assert not breaker.failed(0.0, 0.0)
        assert not breaker.worked()
        assert breaker.allows(0.0, DEADLINE_S)


def test_in_a_pause_one_asks_at_a_time_and_each_pause_is_longer_up_to_a_bound() -> None:
    breaker, now = broken(), 0.0
    pauses = []
    for _ in range(10):
        pauses.append(breaker.pause_s)
        assert not breaker.allows(now + 0.99 * breaker.pause_s, DEADLINE_S)
        now += breaker.pause_s
        assert breaker.allows(now, DEADLINE_S)
        assert not breaker.allows(now, DEADLINE_S), "the others go on without"
        assert breaker.failed(now, now)
    assert pauses[:3] == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S]
    assert pauses[-1] == MOST_S


def test_an_answer_ends_the_pause_and_one_that_was_cancelled_does_not_keep_it_for_ever() -> None:
    breaker = broken()
    assert breaker.allows(PAUSE_S, DEADLINE_S)  # and nothing more is heard of it
    assert breaker.allows(PAUSE_S + max(DEADLINE_S, PAUSE_S), DEADLINE_S)
    assert breaker.worked()
    assert breaker.allows(PAUSE_S, DEADLINE_S)
    assert not breaker.failed(PAUSE_S, PAUSE_S), "it counts from the beginning again"


def test_failures_of_what_was_asked_before_the_pause_do_not_make_it_longer() -> None:
    breaker = broken(at=5.0)
    for _ in range(50):
        assert not breaker.failed(4.9, 5.1)
    assert breaker.pause_s == PAUSE_S


async def test_an_endpoint_that_hangs_does_not_cost_every_group_its_deadline(
    voices: Voices, caplog: pytest.LogCaptureFixture
) -> None:
    async with endpoint(completion("Look again."), pause_s=60) as (place, heard):
        voice = Voice(place=place, seconds=DEADLINE_S)
        events = []
        began = time.monotonic()
        with caplog.at_level(logging.INFO):
            for _ in range(100):
                said, event = await voices.ask("feedback", voice, ASKED, 64)
                assert said.words == ""
                events.append(event)
        assert time.monotonic() - began < 50 * DEADLINE_S
    assert events[:FAILURES] == ["feedback_slow"] * FAILURES
    assert events.count("feedback_paused") >= 90
    assert voices.counts["feedback_paused"] == events.count("feedback_paused")
    assert len(heard) <= events.count("feedback_slow")
    assert caplog.text.count("fails again and again") == 1


async def test_it_is_tried_again_later_and_one_answer_makes_all_as_before(
    voices: Voices, caplog: pytest.LogCaptureFixture
) -> None:
    status = ["500 Oops"]
    async with endpoint(completion("Look again."), status) as (place, _):
        voice = Voice(place=place, seconds=30)
        for _ in range(FAILURES):
            assert (await voices.ask("judge", voice, ASKED, 64))[1] == "judge_down"
        status[0] = "200 OK"
        with caplog.at_level(logging.INFO):
            while (await voices.ask("feedback", voice, ASKED, 64))[1] == "feedback_paused":
                await asyncio.sleep(0.05)  # there is no event to wait on: the pause ends by itself
        many = await asyncio.gather(*(voices.ask("feedback", voice, ASKED, 64) for _ in range(8)))
    assert [(said.words, event) for said, event in many] == [("Look again.", "")] * 8
    assert caplog.text.count("answers again") == 1


async def test_another_voice_is_asked_as_ever(voices: Voices) -> None:
    gone = Voice(place="http://127.0.0.1:9/v1", seconds=30)
    for _ in range(FAILURES + 1):
        await voices.ask("judge", gone, ASKED, 64)
    async with endpoint(completion("Look again.")) as (place, _):
        said, event = await voices.ask("judge", Voice(place=place, seconds=30), ASKED, 64)
    assert (said.words, event) == ("", "")
    assert voices.counts == {"judge_down": FAILURES, "judge_paused": 1}
