"""Grading in real processes: what hangs, crashes or lies costs its own verdict only."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from actor.grade.pool import SHORT, Pool, Verdict
from common.wire import GradePart, Grading

GRADERS = """
import os, sys, time

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def columns(completions, answer, weight, gold, prompts, scale=1.0):
    assert len(answer) == len(weight) == len(gold) == len(prompts) == len(completions)
    return [scale * w * (t == a == g) for t, a, w, g in zip(completions, answer, weight, gold)]

def poisoned(completions, **columns):
    if "hang" in completions:
        time.sleep(1_000)
    if "die" in completions:
        os._exit(1)
    if "raise" in completions:
        raise ZeroDivisionError("one\\ntwo")
    return [1.0] * len(completions)

def odd(completions, **columns):
    odd = {"nan": float("nan"), "none": None, "huge": -1e300}
    return [odd.get(text, 0.5) for text in completions]

def short(completions, **columns):
    return [1.0]

def chatty(completions, **columns):
    print("noise " * 1_000)
    return [float("torch" in sys.modules)] * len(completions)

def pid(completions, **columns):
    return [float(os.getpid())] * len(completions)

def quits(completions, **columns):
    sys.exit("never mind")

def array(completions, completion_ids=None, **columns):
    import numpy as np
    return np.arange(len(completions)) / 2

def backtracks(completions, **columns):
    import re
    return [float(bool(re.search("(a+)+$", text))) for text in completions]

def parent(completions, **columns):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    open(completions[0], "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(1_000)
"""

BROKEN = """
import pathlib
log = pathlib.Path(__file__).with_suffix(".log")
log.write_text(log.read_text() + "x" if log.exists() else "x")
raise ImportError("no such library")
"""


@pytest.fixture(autouse=True)
def _graders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of graders that worker processes can import, as a user's would be."""
    (tmp_path / "our_graders.py").write_text(GRADERS)
    (tmp_path / "broken_graders.py").write_text(BROKEN)
    paths = [str(tmp_path), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield
    sys.modules.pop("our_graders", None)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(workers=1, timeout_s=1.0)
    yield pool
    await pool.close()


def _grading(*functions: str, gold: str = "", **columns: object) -> Grading:
    parts = tuple(GradePart(name=f, grader=f"python:our_graders:{f}") for f in functions)
    return Grading(gold=gold, parts=parts, columns=columns)


async def test_exact_is_graded_without_a_process(pool: Pool) -> None:
    part = GradePart(name="correct", grader="exact", options={"after": "#"})
    grading = Grading(gold="3", parts=(part,))
    verdicts = await pool.grade("1+2?", ["1+2=3#3", "#4"], grading)
    assert verdicts == [Verdict({"correct": 1.0}), Verdict({"correct": 0.0})]
    assert all(worker._process is None for worker in pool._workers)


async def test_texts_that_would_hold_the_event_loop_go_to_a_process(pool: Pool) -> None:
    part = GradePart(name="correct", grader="numeric")
    texts = ["{" * (2 * SHORT) + " 3", "4"]
    verdicts = await pool.grade("1+2?", texts, Grading(gold="3", parts=(part,)))
    assert verdicts == [Verdict({"correct": 1.0}), Verdict({"correct": 0.0})]
    assert pool._workers[0]._process is not None


async def test_a_users_function_is_called_with_trl_s_signature(pool: Pool) -> None:
    part = GradePart(name="x", grader="python:our_graders:columns", options={"scale": 2.0})
    grading = Grading(gold="a", parts=(part,), columns={"answer": "a", "weight": 3.0})
    verdicts = await pool.grade("?", ["a", "b"], grading)
    assert verdicts == [Verdict({"x": 6.0}), Verdict({"x": 0.0})]


async def test_several_parts_come_back_by_name_in_order(pool: Pool) -> None:
    (verdict,) = await pool.grade("?", ["abc"], _grading("length", "chatty"))
    assert list(verdict.parts.items()) == [("length", 3.0), ("chatty", 0.0)]


async def test_what_a_grader_prints_does_no_harm_and_torch_is_not_there(pool: Pool) -> None:
    assert await pool.grade("?", ["a"], _grading("chatty")) == [Verdict({"chatty": 0.0})]


@pytest.mark.parametrize("poison", ["hang", "die", "raise"])
async def test_one_poisonous_text_costs_its_own_verdict_and_the_next_group_is_graded(
    pool: Pool, poison: str
) -> None:
    verdicts = await pool.grade("?", ["good", poison, "fine"], _grading("poisoned"))
    assert [v.error == "" for v in verdicts] == [True, False, True]
    assert verdicts[0].parts == {"poisoned": 1.0}
    assert verdicts[1].error.startswith("verifier_error: poisoned: ")
    assert verdicts[1].parts == {}
    assert "\n" not in verdicts[1].error
    assert await pool.grade("?", ["good"], _grading("poisoned")) == [Verdict({"poisoned": 1.0})]


async def test_a_grader_that_quits_costs_verdicts_and_nothing_else(pool: Pool) -> None:
    (verdict,) = await pool.grade("?", ["a"], _grading("quits"))
    assert verdict.error == "verifier_error: quits: SystemExit: never mind"
    assert await pool.grade("?", ["abc"], _grading("length")) == [Verdict({"length": 3.0})]


async def test_an_array_of_scores_is_as_good_as_a_list(pool: Pool) -> None:
    assert await pool.grade("?", ["a", "b"], _grading("array")) == [
        Verdict({"array": 0.0}),
        Verdict({"array": 0.5}),
    ]


async def test_a_column_may_be_called_as_an_argument_is(pool: Pool) -> None:
    grading = _grading("length", completions=["theirs"])
    assert await pool.grade("?", ["abc"], grading) == [Verdict({"length": 3.0})]


async def test_a_grader_that_cannot_be_loaded_is_tried_once_a_group_not_once_a_text(
    pool: Pool, tmp_path: Path
) -> None:
    grading = Grading(parts=(GradePart(name="x", grader="python:broken_graders:f"),))
    verdicts = await pool.grade("?", ["a", "b", "c", "d"], grading)
    assert ["no such library" in verdict.error for verdict in verdicts] == [True] * 4
    assert (tmp_path / "broken_graders.log").read_text() == "x"


async def test_a_process_that_died_while_it_was_idle_costs_nobodys_verdict(pool: Pool) -> None:
    (verdict,) = await pool.grade("?", ["x"], _grading("pid"))
    process = pool._workers[0]._process
    assert process is not None
    os.kill(int(verdict.parts["pid"]), signal.SIGKILL)
    await process.wait()
    assert await pool.grade("?", ["abc"], _grading("length")) == [Verdict({"length": 3.0})]


async def test_a_grader_of_the_working_folder_is_found_and_nothing_there_hides_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def two(completions, **_): return [2.0] * len(completions)")
    for name in ("common", "actor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')")
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    pool = Pool(workers=1, timeout_s=10.0)
    grading = Grading(parts=(GradePart(name="x", grader="python:mine:two"),))
    assert await pool.grade("?", ["a"], grading) == [Verdict({"x": 2.0})]
    await pool.close()


async def test_what_a_grader_started_goes_with_its_process(tmp_path: Path) -> None:
    pool, place = Pool(workers=1, timeout_s=0.5), tmp_path / "pids"
    await pool.grade("?", [str(place)], _grading("parent"))
    await pool.close()
    assert not [pid for pid in place.read_text().split() if is_running(int(pid))]


def is_running(pid: int) -> bool:
    """Not gone, nor a zombie that its new parent has not looked after yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


ASKER = """
import asyncio, sys
from actor.grade.pool import Pool
from common.wire import GradePart, Grading

async def main():
    pool = Pool(workers=1, timeout_s=1000.0)
    part = GradePart(name="x", grader="python:our_graders:backtracks")
    task = asyncio.create_task(pool.grade("?", ["a"], Grading(parts=(part,))))
    await task
    print(pool._workers[0]._process.pid, flush=True)
    await pool.grade("?", ["a" * 60 + "b"], Grading(parts=(part,)))

asyncio.run(main())
"""


def test_a_grader_that_never_lets_go_of_the_interpreter_ends_with_its_asker() -> None:
    """Python's `re` holds the interpreter's lock while it backtracks: no thread hears the end of
    the input."""
    asker = subprocess.Popen([sys.executable, "-c", ASKER], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    with asker, asker.stdout:
        pid = int(asker.stdout.readline())
        ended = os.pidfd_open(pid)
        asker.kill()
    assert select.select([ended], [], [], 20.0)[0] == [ended]
    os.close(ended)


async def test_a_process_that_missed_its_deadline_is_gone(pool: Pool) -> None:
    (before,) = await pool.grade("?", ["x"], _grading("pid"))
    hung = int(before.parts["pid"])
    await pool.grade("?", ["hang"], _grading("poisoned"))
    (after,) = await pool.grade("?", ["x"], _grading("pid"))
    assert int(after.parts["pid"]) != hung
    assert not Path(f"/proc/{hung}").exists()
    assert pool.killed == 1


async def test_the_event_loop_goes_on_while_a_grader_hangs(pool: Pool) -> None:
    grading = asyncio.create_task(pool.grade("?", ["hang"], _grading("poisoned")))
    longest, last = 0.0, time.monotonic()
    while not grading.done():
        await asyncio.sleep(0.01)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert longest < 0.9  # the grader hangs for 1.0 s


async def test_groups_wait_their_turn_for_few_processes(pool: Pool) -> None:
    many = [pool.grade("?", ["x" * i], _grading("length")) for i in range(20)]
    verdicts = [verdict for (verdict,) in await asyncio.gather(*many)]
    assert [v.parts["length"] for v in verdicts] == list(range(20))


async def test_a_cancelled_question_does_not_leave_its_answer_to_the_next_one(pool: Pool) -> None:
    hanging = asyncio.create_task(pool.grade("?", ["hang"], _grading("poisoned")))
    while pool._workers[0]._process is None:
        await asyncio.sleep(0)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    assert await pool.grade("?", ["abcd"], _grading("length")) == [Verdict({"length": 4.0})]


async def test_a_process_that_cannot_be_started_costs_verdicts_and_nothing_else(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(sys, "executable", "/no/such/python")
        (verdict,) = await pool.grade("?", ["abcd"], _grading("length"))
    assert verdict.error.startswith("verifier_error: length: ")
    assert await pool.grade("?", ["abcd"], _grading("length")) == [Verdict({"length": 4.0})]


async def test_a_score_that_is_no_number_is_an_error_never_0(pool: Pool) -> None:
    texts = ["nan", "none", "huge", "x"]
    nan, none, huge, fine = await pool.grade("?", texts, _grading("odd"))
    assert huge.error == "verifier_error: odd: -1e+300 is no reward"
    assert nan.error == "verifier_error: odd: nan is no reward"
    assert none.error == "verifier_error: odd: no verdict"
    assert fine == Verdict({"odd": 0.5})


async def test_a_later_part_may_abstain(pool: Pool) -> None:
    (verdict,) = await pool.grade("?", ["none"], _grading("length", "odd"))
    assert verdict == Verdict({"length": 4.0})


@pytest.mark.parametrize(
    ("grader", "said"),
    [
        ("python:our_graders:missing", "no grader"),
        ("python:no_such_module:f", "no grader"),
        ("nonsense", "give exact, numeric, math_verify, reasoning_gym, format, or python:"),
        ("python:our_graders:short", "must return a list of 2 scores"),
    ],
)
async def test_a_grader_that_cannot_grade_says_why(pool: Pool, grader: str, said: str) -> None:
    grading = Grading(parts=(GradePart(name="x", grader=grader),))
    texts = ["a", "b"] if "short" in grader else ["a"]
    verdicts = await pool.grade("?", texts, grading)
    if "short" in grader:  # alone, each text has its one score
        assert verdicts == [Verdict({"x": 1.0})] * 2
    else:
        assert said in verdicts[0].error


async def test_a_ticket_without_a_grader_is_an_error_not_a_reward(pool: Pool) -> None:
    assert "names no grader" in (await pool.grade("?", ["a"], Grading()))[0].error


@pytest.mark.parametrize(
    ("grader", "package"), [("math_verify", "math_verify"), ("reasoning_gym", "reasoning_gym")]
)
def test_a_grader_whose_library_is_missing_names_what_to_install(grader: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from actor.grade.worker import Question, answer\n"
        f"q = Question(grader={grader!r}, prompt='', texts=['1'], gold='1', columns={{}}, "
        "options={})\n"
        "print(answer(q).error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"DataError: grader {grader!r} needs the package {package!r}: pip install -e '.[graders]'\n"
    )


async def test_a_complaint_of_a_grader_is_logged_once(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await pool.grade("?", ["raise"], _grading("poisoned"))
    assert [r.message for r in caplog.records] == [
        "verifier_error: poisoned: ZeroDivisionError: one two"
    ]
