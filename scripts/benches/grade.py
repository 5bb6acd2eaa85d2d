"""math-verify in two grading processes: how much they grade, and whether who asks is ever held up.

    grades_per_s        responses judged a second, none of them judged before
    grades_kept_per_s   the same when the judgements are known already (another epoch, a group that
                        agrees)
    max_loop_stall_ms   the longest time for which the asking event loop did nothing else, over what
                        it slept of its own will
    max_loop_busy_ms    the longest time that it computed without a break (what other programs of
                        the machine take is part of the stall and not of this)

Groups of 8 responses of about 1,200 characters, each with a box: numbers, fractions, roots, sets,
intervals, expressions; half of the answers right, written another way than the gold answer. As many
groups at once as keep both processes busy. The processes' start and imports are not counted.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Sequence

from actor.grade.pool import Pool
from common.wire import GradePart, Grading

LIMITS = {"max_loop_stall_ms": ("<=", 20.0)}
WORKERS, GROUPS, GROUP, AT_ONCE, ROUNDS = 2, 60, 8, 16, 3
PROSE = "Let us look at this step by step, since the sum $a + b$ may be written in many ways. "
FORMS = ("%s", r"\frac{%s}{7}", r"%s\sqrt{2}", r"\{%s,-1\}", "[0,%s)", "x^2+%sx")
TICK_S = 0.001

Problem = tuple[str, list[str]]  # gold answer, responses


def bench() -> dict[str, object]:
    return asyncio.run(_bench())


async def _bench() -> dict[str, object]:
    pool = Pool(WORKERS, timeout_s=60.0)
    try:
        await _grade(pool, _problems(-1)[: 4 * WORKERS])
        gc.collect()
        gc.freeze()
        async with _Watch() as watch:
            found = [await _rates(pool, number) for number in range(ROUNDS)]
    finally:
        await pool.close()
    fresh, kept = zip(*found, strict=True)
    return {
        "grades_per_s": statistics.median(fresh),
        "grades_kept_per_s": statistics.median(kept),
        "max_loop_stall_ms": 1e3 * watch.longest_s,
        "max_loop_busy_ms": 1e3 * watch.busiest_s,
        "workers": WORKERS,
        "killed": pool.killed,
    }


async def _rates(pool: Pool, number: int) -> tuple[float, float]:
    problems = _problems(number)
    rates = []
    for _ in range(2):
        began = time.perf_counter()
        await _grade(pool, problems)
        rates.append(sum(len(texts) for _, texts in problems) / (time.perf_counter() - began))
    return rates[0], rates[1]


async def _grade(pool: Pool, problems: Sequence[Problem]) -> None:
    """All of them; checks that half of the responses are judged right."""
    part = GradePart(name="correct", grader="math_verify")
    room = asyncio.Semaphore(AT_ONCE)

    async def one(gold: str, texts: list[str]) -> None:
        async with room:
            verdicts = await pool.grade("?", texts, Grading(gold=gold, parts=(part,)))
        scores = [verdict.parts["correct"] for verdict in verdicts]
        assert sum(scores) == len(texts) / 2, f"{gold}: {scores}"

    await asyncio.gather(*(one(gold, texts) for gold, texts in problems))


class _Watch:
    """Sleeps for TICK_S again and again; what it sleeps longer, the loop was busy elsewhere."""

    def __init__(self) -> None:
        self.longest_s = self.busiest_s = 0.0

    async def __aenter__(self) -> _Watch:
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _look(self) -> None:
        while True:
            before, computed = time.perf_counter(), time.thread_time()
            await asyncio.sleep(TICK_S)
            self.busiest_s = max(self.busiest_s, time.thread_time() - computed)
            self.longest_s = max(self.longest_s, time.perf_counter() - before - TICK_S)


def _problems(number: int) -> list[Problem]:
    """GROUPS problems that no other number has."""
    first = 1_000 * (number + 2)
    return [_problem(first + i) for i in range(GROUPS)]


def _problem(k: int) -> Problem:
    """A gold answer, and GROUP responses, none like the other: right and wrong ones in turn."""
    form = FORMS[k % len(FORMS)]
    right = [form % rf"\frac{{{(i + 2) * k}}}{{{i + 2}}}" for i in range(GROUP // 2)]
    wrong = [form % f"{k + i + 1}" for i in range(GROUP // 2)]
    texts = [f"{PROSE * 14}\\boxed{{{answer}}}" for answer in (*right, *wrong)]
    return form % k, texts
