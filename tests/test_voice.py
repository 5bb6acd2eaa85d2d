"""Asking somebody outside: who is down, slow or gives the answer away is counted, and the episode
goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from actor import episode
from actor.grade.pool import Pool
from actor.leak import guard
from actor.voice import Asked, Voices
from common.episodes import Episode, Feedback, Intervene, Voice
from tests.talking import EXACT, Speaker, asks, stage, tokens_of

OURS = """
import os, time

def helpful(question, answer, gold):
    return "12+" + str(len(question))

def leaky(gold, **columns):
    return "#" + gold + "+"

def slow(answer):
    time.sleep(1_000)

def dead(answer):
    os._exit(1)

def broken(answer):
    raise ZeroDivisionError("one")

def odd(answer):
    return 7

def silent(answer):
    return None

def judge(answer, gold):
    if answer.endswith(gold):
        return None
    return {"words": "+", "flaw": "sum", "quote": "=18"}
"""
ASKED = Asked("12+7?", "12+7=18#18", EXACT)


@pytest.fixture(scope="module", autouse=True)
def _ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("voices")
    (folder / "our_voices.py").write_text(OURS)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parent.parent)]))
    yield
    patch.undo()
    sys.modules.pop("our_voices", None)


@pytest.fixture
async def voices() -> AsyncIterator[Voices]:
    voices = Voices()
    yield voices
    await voices.close()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(1, 1.0)
    yield pool
    await pool.close()


def ours(name: str, seconds: float = 30.0) -> Voice:
    return Voice(place=f"python:our_voices:{name}", seconds=seconds)


async def test_a_users_function_is_asked_for_what_it_takes(voices: Voices) -> None:
    said, event = await voices.ask("feedback", ours("helpful"), ASKED, 64)
    assert (said.words, event) == ("12+5", "")


async def test_whoever_fails_is_named_and_has_said_nothing(voices: Voices) -> None:
    for name in ("broken", "odd", "dead", "nowhere"):
        said, event = await voices.ask("feedback", ours(name), ASKED, 64)
        assert (said.words, event) == ("", "feedback_down")
    said, event = await voices.ask("judge", ours("slow", 0.2), ASKED, 64)
    assert (said.words, event) == ("", "judge_slow")
    assert voices.counts == {"feedback_down": 4, "judge_slow": 1}


async def test_a_leak_is_masked_and_counted(voices: Voices) -> None:
    said, event = await voices.ask("feedback", ours("leaky"), ASKED, 64)
    assert (said.words, event) == ("#***+", "feedback_leak")


async def test_words_of_a_voice_stand_between_the_turns_tokens(pool: Pool, voices: Voices) -> None:
    opening, closing = tuple(tokens_of(",")), tuple(tokens_of("?"))
    rule = Feedback(turns=2, wrong=(4,), open=opening, close=closing, voice=ours("helpful"))
    engine = Speaker({0: ["#18<eos>", "#19<eos>"]})
    ticket = asks(1, Episode(feedback=rule))
    (rollout,), *_ = await episode.play(ticket, stage(engine, pool, voices))
    assert rollout.segments[1].tokens.tolist() == [*opening, *tokens_of("12+5"), *closing]
    assert rollout.events == {}


@pytest.mark.parametrize(
    ("name", "events"),
    [("slow", {"feedback_slow": 1, "feedback_plain": 1}), ("silent", {"feedback_plain": 1})],
)
async def test_without_a_voices_words_the_plain_word_is_said(
    pool: Pool, voices: Voices, name: str, events: dict[str, int]
) -> None:
    rule = Feedback(turns=2, wrong=(4, 5), voice=ours(name, 0.5))
    engine = Speaker({0: ["#18<eos>", "#19<eos>"]})
    here = stage(engine, pool, voices)
    (rollout,), *_ = await episode.play(asks(1, Episode(feedback=rule)), here)
    assert rollout.segments[1].tokens.tolist() == [4, 5]
    assert (rollout.correct, rollout.events) == (1.0, events)


async def test_a_judge_shows_the_flaw_and_a_dead_one_changes_nothing(
    pool: Pool, voices: Voices
) -> None:
    rule = Intervene(judge=ours("judge"), share=1.0)
    engine = Speaker({0: ["12+7=18#18<eos>", "#19<eos>"]})
    played = await episode.play(asks(1, Episode(intervene=rule)), stage(engine, pool, voices))
    (sibling,) = played.hinted
    written = [segment.tokens.tolist() for segment in sibling.segments]
    assert written == [tokens_of("12+7=18"), tokens_of("+"), tokens_of("#19<eos>")]
    assert (sibling.flaws, sibling.clean, sibling.correct) == (("sum",), True, 1.0)
    dead = Intervene(judge=ours("dead"), share=1.0)
    engine = Speaker({0: ["#18<eos>"]})
    played = await episode.play(asks(1, Episode(intervene=dead)), stage(engine, pool, voices))
    assert played.hinted == ()
    assert played.rollouts[0].events == {"judge_down": 1}


# -- the gold answer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "gold", "kept"),
    [
        (r"It is \boxed{19}, not 18.", "19", "It is ***, not 18."),
        ("You wrote 18; 19 is right.", "19", "You wrote 18; *** is right."),
        ("Not 190, nor 119.", "19", "Not 190, nor 119."),
        ("One thousand is 1,000.", "1000", "One thousand is ***."),
        ("Say Paris. PARIS!", "paris", "Say ***. ***!"),
        ("A is a letter", "A", "*** is a letter"),
        ("x+1 or x + 1", "x + 1", "*** or ***"),
        ("the word parisian", "paris", ""),  # it stands inside of a word: nothing is said
        ("fine", "", "fine"),
    ],
)
def test_the_gold_answer_stands_in_no_feedback(words: str, gold: str, kept: str) -> None:
    found, leaked = guard(words, gold)
    assert found == kept
    assert leaked == (found != words)
    assert not gold or guard(found, gold) == (found, False)


# -- who does not answer ---------------------------------------------------------------------------


async def test_a_voice_that_hangs_holds_nobody_longer_than_its_deadline_however_many_ask(
    voices: Voices,
) -> None:
    voice = Voice(place="python:our_voices:slow", seconds=2.0)
    first = await voices.ask("feedback", voice, ASKED, 64)
    began = time.monotonic()
    many = await asyncio.gather(*(voices.ask("feedback", voice, ASKED, 64) for _ in range(12)))
    assert {event for _, event in (first, *many)} == {"feedback_slow"}
    assert time.monotonic() - began < 18.0, "one after the other they would take 24 s at least"


def test_a_gold_answer_of_megabytes_is_guarded_without_holding_the_event_loop() -> None:
    gold, began = "12 34 " * 300_000, time.process_time()
    assert guard("so 12 34", gold) == ("so 12 34", False)
    assert guard(f"it is {gold}!", gold) == ("", True)
    assert time.process_time() - began < 2.0
