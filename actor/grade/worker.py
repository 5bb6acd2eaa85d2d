"""One grading process: questions on standard input, answers on standard output, both MessagePack
behind a u32 length.

A process of its own, not a thread, because graders run code that may hang or crash: whoever asks
can kill it. What a grader prints goes to standard error, so that it cannot damage an answer. When
the asker is gone the input ends and the process exits at once, even from within a grader, and with
it what the grader had started.
"""

from __future__ import annotations

import os
import queue
import signal
import struct
import sys
import threading
from typing import Any, BinaryIO, Literal

import msgspec

from actor.grade import graders
from actor.grade.said import Said, say
from common.process import die_with_parent, import_from_here

LENGTH = struct.Struct("<I")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Grade `texts` with one grader; without texts: only load the grader. A voice is asked for
    words about the one text.
    """

    grader: str
    prompt: str
    texts: list[str]
    gold: str
    columns: dict[str, Any]
    options: dict[str, Any]
    wants: Literal["scores", "words"] = "scores"


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """One score a text, or what a voice said, or why there is neither."""

    scores: list[float | None] = []
    said: Said = Said()
    error: str = ""
    loaded: bool = True  # False: there is no such grader, whatever the text


def answer(question: Question) -> Marks:
    """Whatever a grader raises is its own failure: a line, not the end of this process."""
    try:
        if not question.texts:
            graders.resolve(question.grader)
            return Marks()
        q = question
        if q.wants == "words":
            return Marks(said=say(q.grader, q.prompt, q.texts[0], q.gold, q.columns))
        return Marks(scores=graders.call(q.grader, q.prompt, q.texts, q.gold, q.columns, q.options))
    except (Exception, SystemExit) as error:  # noqa: BLE001  a stranger's code may raise anything
        return Marks(error=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the asker
    import_from_here()
    die_with_parent()  # a grader that never lets go of the interpreter hears of no end of input
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions, asked), daemon=True).start()
    decode, encode = msgspec.msgpack.Decoder(Question).decode, msgspec.msgpack.encode
    while True:
        frame = encode(answer(decode(asked.get())))
        answers.write(LENGTH.pack(len(frame)) + frame)
        answers.flush()


def _listen(stream: BinaryIO, asked: queue.SimpleQueue[bytes]) -> None:
    while len(head := stream.read(LENGTH.size)) == LENGTH.size:
        asked.put(stream.read(LENGTH.unpack(head)[0]))
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with whatever graders started
    os._exit(0)


if __name__ == "__main__":
    main()
