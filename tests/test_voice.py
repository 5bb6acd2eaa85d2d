"""Asking somebody outside: who is down, slow or gives the answer away is counted, and the episode
goes on."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actor import episode
from actor.grade.pool import Pool
from actor.leak import guard
from actor.voice import Asked, Voices
from common.episodes import Episode, Feedback, Intervene, Voice
from tests.talking import EXACT, WORDS, Speaker, asks, stage, tokens_of

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


# -- endpoints -------------------------------------------------------------------------------------


@asynccontextmanager
async def endpoint(body: bytes, status: str = "200 OK", pause_s: float = 0.0) -> AsyncIterator[Any]:
    """A real server that answers every request alike; yields its address and what it heard."""
    heard: list[bytes] = []
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        heard.append(head + await reader.readexactly(length))
        length_line = f"Content-Length: {len(body)}\r\n\r\n".encode()
        writer.write(f"HTTP/1.1 {status}\r\n".encode() + length_line)
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


async def test_an_endpoint_is_asked_in_the_open_ai_way(
    voices: Voices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_KEY", "s3cret")
    async with endpoint(completion(" Look at 19 again. ")) as (place, heard):
        voice = Voice(place=place, model="m", key="OUR_KEY", seconds=30)
        said, event = await voices.ask("feedback", voice, ASKED, 33)
    assert (said.words, event) == ("Look at *** again.", "feedback_leak")
    head, _, body = heard[0].partition(b"\r\n\r\n")
    asked = json.loads(body)
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1")
    assert b"Authorization: Bearer s3cret" in head
    assert (asked["model"], asked["max_tokens"]) == ("m", 33)
    assert "12+7=18#18" in asked["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ('Sure: {"flaw": "sum", "quote": "=18", "words": "Wait."} Done.', ("sum", "=18", "Wait.")),
        ("null", ("", "", "")),
    ],
)
async def test_a_judges_object_is_found_in_what_it_writes(
    voices: Voices, words: str, found: tuple[str, str, str]
) -> None:
    async with endpoint(completion(words)) as (place, _):
        said, event = await voices.ask("judge", Voice(place=place, seconds=30), ASKED, 64)
    assert ((said.flaw, said.quote, said.words), event) == (found, "")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", "200 OK"),
        (b"no json", "200 OK"),
        (completion(None), "200 OK"),
        (completion("words"), "500 Oops"),
        (b"x" * (2 << 20), "200 OK"),
        (b"[" * 200_000, "200 OK"),
    ],
)
async def test_an_endpoint_that_answers_something_else_is_down(
    voices: Voices, body: bytes, status: str
) -> None:
    async with endpoint(body, status) as (place, _):
        said, event = await voices.ask("feedback", Voice(place=place, seconds=30), ASKED, 64)
    assert (said.words, event) == ("", "feedback_down")


async def test_an_endpoint_that_is_not_there_slow_or_has_no_key_is_named(voices: Voices) -> None:
    async with endpoint(completion("words"), pause_s=60) as (place, _):
        late = await voices.ask("feedback", Voice(place=place, seconds=0.3), ASKED, 64)
    gone = await voices.ask("feedback", Voice(place=place, seconds=30), ASKED, 64)
    keyless = Voice(place=place, key="NO_SUCH_KEY_HERE", seconds=30)
    without = await voices.ask("feedback", keyless, ASKED, 64)
    assert [event for _, event in (late, gone, without)] == [
        "feedback_slow",
        "feedback_down",
        "feedback_down",
    ]


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("http://host:port/v1", "line"),
        ("http://user:word@127.0.0.1:9/v1", "line"),
        ("http://two..dots/v1", ""),
        ("http://[::1/v1", ""),
        ("http://127.0.0.1:9/v\N{LATIN SMALL LETTER E WITH ACUTE}", ""),
        ("http://127.0.0.1:9/v1", "OUR_KEY"),
    ],
)
async def test_an_address_or_a_key_that_no_request_can_carry_is_down(
    voices: Voices,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    key: str,
) -> None:
    monkeypatch.setenv("OUR_KEY", "of a file\n")
    monkeypatch.setenv("line", "k")
    said, event = await voices.ask("feedback", Voice(place=place, key=key, seconds=30), ASKED, 64)
    assert (said.words, event) == ("", "feedback_down")
    assert "of a file" not in caplog.text, "the key"


@pytest.mark.parametrize(
    "word", [r'{"words": "\ud800+", "flaw": "\udfffsum"}', '{"words": ' + "[" * 200_000 + "}"]
)
async def test_what_a_stranger_writes_can_be_tokenised_and_sent(voices: Voices, word: str) -> None:
    async with endpoint(completion(word)) as (place, _):
        said, _ = await voices.ask("judge", Voice(place=place, seconds=30), ASKED, 64)
    async with endpoint(completion("\ud800+")) as (place, _):
        plain, _ = await voices.ask("feedback", Voice(place=place, seconds=30), ASKED, 64)
    for text in (said.words, said.flaw, said.quote, plain.words):
        assert text in ("", "?+", "?sum")
        WORDS.encode(text)


async def test_the_name_of_a_flaw_is_short(voices: Voices) -> None:
    long = json.dumps({"words": "+", "flaw": "x" * 100_000})
    async with endpoint(completion(long)) as (place, _):
        said, _ = await voices.ask("judge", Voice(place=place, seconds=30), ASKED, 64)
    assert 0 < len(said.flaw) <= 64


async def test_a_voice_that_hangs_holds_nobody_longer_than_its_deadline_however_many_ask(
    voices: Voices,
) -> None:
    voice = Voice(place="python:our_voices:slow", seconds=1.0)
    first = await voices.ask("feedback", voice, ASKED, 64)
    began = time.monotonic()
    many = await asyncio.gather(*(voices.ask("feedback", voice, ASKED, 64) for _ in range(12)))
    assert {event for _, event in (first, *many)} == {"feedback_slow"}
    assert time.monotonic() - began < 9.0, "one after the other they would take 12 s at least"
