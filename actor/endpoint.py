"""One question to an OpenAI-compatible endpoint: POST ADDRESS/chat/completions, with a deadline.

The standard library in a thread of its own: an endpoint that drips its answer byte by byte holds a
thread until the deadline, and never the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult, urlsplit

from common.episodes import Voice
from common.errors import DataError, DeadlineError

MOST_BYTES = 1 << 20  # of an answer
THREADS = 32  # questions of one actor at once; what waits for a thread waits within its deadline
_PIECE = 1 << 14
_OK = 200


class Endpoint:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="voice")

    async def ask(self, voice: Voice, messages: list[dict[str, str]], words: int) -> str:
        """What the endpoint's model says, in `words` tokens at most. Raises DeadlineError, and
        DataError for an endpoint that is not there, refuses, or answers something else.
        """
        until = time.monotonic() + voice.seconds
        loop = asyncio.get_running_loop()
        body = json.dumps({"model": voice.model, "messages": messages, "max_tokens": words})
        asked = loop.run_in_executor(self._threads, _post, voice, body.encode(), until)
        try:
            async with asyncio.timeout(voice.seconds):
                return await asked
        except TimeoutError:
            raise DeadlineError(f"{voice.place}: no answer within {voice.seconds:g} s") from None
        except DataError as error:
            raise DataError(_without_key(voice, str(error))) from None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _post(voice: Voice, body: bytes, until: float) -> str:
    headers = {"Content-Type": "application/json", **_key(voice)}
    try:
        place = urlsplit(voice.place)
        with contextlib.closing(_connection(place, _left(until))) as connection:
            connection.request("POST", f"{place.path.rstrip('/')}/chat/completions", body, headers)
            answer = connection.getresponse()
            said = _read(connection, answer, until)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, TimeoutError):
            raise
        raise DataError(f"{voice.place}: {type(error).__name__}: {error}") from None
    if answer.status != _OK:
        raise DataError(f"{voice.place}: HTTP {answer.status} {answer.reason}")
    return _words(voice, said)


def _connection(place: SplitResult, left_s: float) -> http.client.HTTPConnection:
    """Raises HTTPException or ValueError for an address that is none."""
    if place.scheme != "https":
        return http.client.HTTPConnection(place.netloc, timeout=left_s)
    secure = ssl.create_default_context()
    return http.client.HTTPSConnection(place.netloc, timeout=left_s, context=secure)


def _read(
    connection: http.client.HTTPConnection, answer: http.client.HTTPResponse, until: float
) -> bytes:
    """The body, piece by piece, as each may take no longer than is left."""
    said = bytearray()
    while True:
        if connection.sock is not None:  # http.client drops it when the server closes
            connection.sock.settimeout(_left(until))
        piece = answer.read1(_PIECE)
        if not piece:
            return bytes(said)
        said += piece
        if len(said) > MOST_BYTES:
            raise http.client.HTTPException(f"more than {MOST_BYTES} bytes")
        _left(until)


def _words(voice: Voice, said: bytes) -> str:
    try:
        found: Any = json.loads(said)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DataError(f"{voice.place}: not a chat completion: {said[:80]!r}") from None
    if not isinstance(found, str):
        raise DataError(f"{voice.place}: a completion without words")
    return found


def _key(voice: Voice) -> dict[str, str]:
    """Raises DataError when the variable that should hold the key is not set, or holds none: what
    no header can carry is refused here, where nothing quotes it.
    """
    if not voice.key:
        return {}
    key = os.environ.get(voice.key)
    if not key:
        raise DataError(f"{voice.place}: ${voice.key} is not set in the actor's environment")
    if not (key.isascii() and key.isprintable()):
        raise DataError(f"{voice.place}: ${voice.key} is no key: a line break, or no ASCII, in it")
    return {"Authorization": f"Bearer {key}"}


def _without_key(voice: Voice, words: str) -> str:
    """An endpoint may quote what it was sent, and what goes wrong is logged."""
    key = os.environ.get(voice.key) if voice.key else None
    return words.replace(key, "***") if key else words


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
