"""Grading processes with deadlines: a grader that hangs, crashes or answers nonsense costs one
verdict, never the actor.

Worker processes are started when they are first needed and spoken to over pipes (MessagePack, no
pickle), so killing one by its id harms no other; a `concurrent.futures` pool is broken as a whole
when one of its processes dies.

All rollouts of a group are one question. If that fails they are asked again one by one, so that a
single poisonous text does not take its siblings' verdicts with it; not where the grader itself
cannot be loaded, which may take a minute each time. `exact`, `format` and `numeric` are pure and
ours and take microseconds: short texts they judge in place, where a hop to a process would cost the
event loop more than the grading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import msgspec

from actor.grade.worker import LENGTH, Marks, Question, answer
from common.errors import DeadlineError
from common.grading import is_reward
from common.wire import GradePart, Grading

log = logging.getLogger(__name__)

IN_PLACE = frozenset({"exact", "format", "numeric"})
SHORT = 1 << 15  # letters of gold answer and texts: below it the worst of them take 10 ms
TOLD = 64  # different complaints of graders that are logged, each once
ENDS = (DeadlineError, EOFError, OSError)  # of a grading process
LOAD_S = 60.0  # to start a process and import a grader; not part of the deadline of grading


class Verdict(NamedTuple):
    """The parts of one rollout's reward in the order of the grading, or why there are none."""

    parts: dict[str, float]
    error: str = ""


class Pool:
    """At most `workers` grading processes; a question takes at most about twice `timeout_s`."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.killed = 0  # processes that missed a deadline
        self._idle = [Worker() for _ in range(max(1, workers))]
        self._workers = tuple(self._idle)
        self._free = asyncio.Semaphore(len(self._idle))
        self._told: set[str] = set()

    async def grade(self, prompt: str, texts: Sequence[str], grading: Grading) -> list[Verdict]:
        """One verdict a text; never raises because of a grader."""
        if not grading.parts:
            return [Verdict({}, "verifier_error: the ticket names no grader")] * len(texts)
        columns = [await self._part(prompt, texts, grading, part) for part in grading.parts]
        verdicts = [_verdict(grading.parts, scores) for scores in zip(*columns, strict=True)]
        for error in {v.error for v in verdicts if v.error} - self._told:
            if len(self._told) < TOLD:
                self._told.add(error)
                log.warning("%s", error)
        return verdicts

    async def say(self, question: Question, within_s: float) -> Marks:
        """What a voice says about one text, or why it says nothing. Its time runs while others are
        being heard: however many ask one that hangs, none of them waits for all before it.
        """
        try:
            return await self._ask(question, within_s, patience_s=within_s)
        except TimeoutError:
            return Marks(error=f"no verdict within {within_s:.3g} s: others are being heard")

    async def close(self) -> None:
        for worker in self._workers:
            await worker.end()

    async def _part(
        self, prompt: str, texts: Sequence[str], grading: Grading, part: GradePart
    ) -> list[float | str | None]:
        """One score a text, or a line about what went wrong with it."""
        question = Question(
            grader=part.grader,
            prompt=prompt,
            texts=list(texts),
            gold=grading.gold,
            columns=grading.columns,
            options=part.options,
        )
        marks = await self._ask(question, self.timeout_s)
        if not marks.error:
            return list(marks.scores)
        if len(texts) == 1 or not marks.loaded:
            return [marks.error] * len(texts)
        share_s = self.timeout_s / len(texts)
        alone = [msgspec.structs.replace(question, texts=[text]) for text in texts]
        several = [await self._ask(one, share_s) for one in alone]
        return [one.error or one.scores[0] for one in several]

    async def _ask(
        self, question: Question, within_s: float, patience_s: float | None = None
    ) -> Marks:
        """Raises TimeoutError when no process was free for `patience_s`."""
        letters = len(question.gold) + sum(map(len, question.texts))
        if question.grader in IN_PLACE and letters <= SHORT:
            return answer(question)
        async with self._worker(question, patience_s) as worker:
            try:
                wrong = await worker.load(question)
            except ENDS as error:
                return self._replaced(worker, question, error, loaded=False)
            if wrong:
                return Marks(error=wrong, loaded=False)
            try:
                return await worker.ask(question, within_s)
            except ENDS as error:
                return self._replaced(worker, question, error)

    def _replaced(
        self, worker: Worker, question: Question, error: Exception, loaded: bool = True
    ) -> Marks:
        self.killed += isinstance(error, DeadlineError)
        worker.kill()
        log.warning("grader %s: %s; its process is replaced", question.grader, error)
        return Marks(error=str(error), loaded=loaded)

    @contextlib.asynccontextmanager
    async def _worker(self, question: Question, patience_s: float | None) -> AsyncIterator[Worker]:
        """An idle process: the one that gets this gold answer's questions if it can be, since it
        remembers what it judged.
        """
        async with asyncio.timeout(patience_s):
            await self._free.acquire()
        usual = self._workers[zlib.crc32(question.gold.encode()) % len(self._workers)]
        worker = usual if usual in self._idle else self._idle[-1]
        self._idle.remove(worker)
        try:
            yield worker
        except asyncio.CancelledError:
            worker.kill()  # in the middle of an answer that nobody reads
            raise
        finally:
            self._idle.append(worker)
            self._free.release()


class Worker:
    """One process, started at the first question and again after it was killed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []  # not known to be gone yet
        self._loaded: set[str] = set()
        self._decode = msgspec.msgpack.Decoder(Marks).decode

    async def load(self, question: Question) -> str:
        """Import the grader, once a process: that may take long and is not the text's fault. Says
        why there is none, "" when there is. Raises like `ask`.
        """
        if self._process is not None and self._process.returncode is not None:
            self.kill()  # it died while nobody asked it anything
        if question.grader not in self._loaded:
            marks = await self.ask(msgspec.structs.replace(question, texts=[]), LOAD_S)
            if marks.error:
                return marks.error
            self._loaded.add(question.grader)
        return ""

    async def ask(self, question: Question, within_s: float) -> Marks:
        """Raises DeadlineError, EOFError / ConnectionError when the process died over it, or the
        OSError for which it could not be started.
        """
        process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        frame = msgspec.msgpack.encode(question)
        process.stdin.write(LENGTH.pack(len(frame)) + frame)
        try:
            async with asyncio.timeout(within_s):
                await process.stdin.drain()
                head = await process.stdout.readexactly(LENGTH.size)
                return self._decode(await process.stdout.readexactly(LENGTH.unpack(head)[0]))
        except TimeoutError:
            raise DeadlineError(f"no verdict within {within_s:.3g} s") from None
        except asyncio.IncompleteReadError:
            raise EOFError(f"the grading process died ({await _ended(process)})") from None

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it started goes with it
        if self._process is not None:
            still = [process for process in self._killed if process.returncode is None]
            self._killed = [*still, self._process]
        self._process = None
        self._loaded.clear()

    async def end(self) -> None:
        """Returns when every process it ever had is gone."""
        self.kill()
        for process in self._killed:
            await process.wait()
        self._killed.clear()

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-P", "-m", "actor.grade.worker")
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, start_new_session=True
            )
        )
        try:
            self._process = await asyncio.shield(starting)
        except asyncio.CancelledError:  # a process half started would be nobody's
            self._process = await starting
            self.kill()
            raise
        return self._process


async def _ended(process: asyncio.subprocess.Process) -> str:
    """What became of a process that has closed its output."""
    try:
        async with asyncio.timeout(1.0):
            code = await process.wait()
    except TimeoutError:
        return "its output is closed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _verdict(parts: Sequence[GradePart], scores: Sequence[float | str | None]) -> Verdict:
    """The first part is the raw correctness and must be there; a later part may abstain."""
    for part, score in zip(parts, scores, strict=True):
        if isinstance(score, str):
            return Verdict({}, f"verifier_error: {part.name}: {score}")
        if score is not None and not is_reward(score):
            return Verdict({}, f"verifier_error: {part.name}: {score} is no reward")
    if scores[0] is None:
        return Verdict({}, f"verifier_error: {parts[0].name}: no verdict")
    named = zip(parts, scores, strict=True)
    return Verdict({part.name: score for part, score in named if isinstance(score, float)})
