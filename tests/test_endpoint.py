"""OpenAI-compatible endpoints, asked over real sockets: those that answer, drip, lie, or are not
there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from actor.voice import Asked, Voices
from common.episodes import Voice
from tests.talking import EXACT, WORDS, completion, endpoint

ASKED = Asked("12+7?", "12+7=18#18", EXACT)


@pytest.fixture
async def voices() -> AsyncIterator[Voices]:
    voices = Voices()
    yield voices
    await voices.close()


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


@pytest.mark.parametrize(("body", "status"), [(b"s3cret!", "200 OK"), (b"", "401 bad key s3cret")])
async def test_an_endpoint_that_quotes_the_key_does_not_bring_it_into_the_log(
    voices: Voices,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    body: bytes,
    status: str,
) -> None:
    monkeypatch.setenv("OUR_KEY", "s3cret")
    async with endpoint(body, status) as (place, _):
        voice = Voice(place=place, key="OUR_KEY", seconds=30)
        _, event = await voices.ask("feedback", voice, ASKED, 64)
    assert event == "feedback_down"
    assert "***" in caplog.text
    assert "s3cret" not in caplog.text


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
