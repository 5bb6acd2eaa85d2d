"""math-verify behind one extraction: what it is good at, and the traps it sets."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actor.grade import graders
from actor.grade.pool import Pool
from common.errors import DataError
from common.wire import GradePart, Grading

pytest.importorskip("math_verify", reason="pip install -e '.[graders]'")


def grade(gold: str, text: str, **options: Any) -> float | None:
    (score,) = graders.call("math_verify", "?", [text], gold, {}, options)
    return score


def boxed(gold: str, answer: str, **options: Any) -> float | None:
    return grade(gold, f"so it is \\boxed{{{answer}}}.", **options)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", "0.5"),
        ("1/2", r"\frac12"),
        ("$\\frac12$", "1/2"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\{1,2\}", "2,1"),
        ("1,2,3", r"\{3,2,1\}"),
        ("1/3", "0.333333"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("50%", "0.5"),
        ("50", r"50\%"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("1000", "1,000"),
        ("1,000", "1000"),
        ("10", "10 cm"),
        ("10", r"10\text{ cm}"),
        ("90", r"90^\circ"),
        ("90", "90°"),
        ("90°", "90"),
        ("(1,2)", "1,2"),
        (r"\left(1,2\right)", "1,2"),
        ("[0,1)", "[0,1)"),
        (r"\emptyset", r"\{\}"),
        ("x^2+1", "1+x^2"),
        ("Tuesday", r"\text{tuesday}"),
        (r"\text{(C)}", "C"),
        ("2^{100}", "1267650600228229401496703205376"),
        ("x<3", r"(-\infty,3)"),
    ],
)
def test_equal_as_mathematics_is_right(gold: str, answer: str) -> None:
    assert boxed(gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/3", "0.3333"),
        ("7", "7.00001"),
        ("1", "0.99999999"),
        ("(1,2)", "[1,2]"),
        ("[0,1)", "(0,1)"),
        ("(2,1)", "(1,2)"),
        ("(1,2)", "2,1"),
        ("5", "5,6"),
        ("abc", "cba"),
        ("north", r"\text{south}"),
        ("7", ""),
        ("7", "x_{"),
        ("7", "nonsense"),
        ("7", r"\frac{0}{0}"),
        (r"(-\infty,3)", "x<3"),
    ],
)
def test_anything_else_is_wrong(gold: str, answer: str) -> None:
    assert boxed(gold, answer) == 0.0


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("7", r"\boxed{3} \boxed{7}", 1.0),
        (r"\{3,7\}", r"\boxed{3} \boxed{7}", 0.0),
        ("3", r"\boxed{3} \boxed{7}", 0.0),
        ("7", r"\boxed{7} no, \boxed{8", 1.0),
        ("7", r"\boxed{7", 0.0),
        ("7", r"\boxed{}", 0.0),
        ("7", "the answer is 7.", 0.0),
        ("7", "", 0.0),
        ("8", r"$x=7$, \boxed{8}, then 9", 1.0),
    ],
)
def test_the_last_complete_box_is_the_answer_and_naming_many_does_not_pay(
    gold: str, text: str, reward: float
) -> None:
    assert grade(gold, text) == reward


@pytest.mark.parametrize(
    ("text", "unboxed", "reward"),
    [
        ("the answer is 7.", "last", 1.0),
        ("first 3, then $7$", "last", 1.0),
        ("the answer is 7.", "whole", 0.0),
        (" 7 ", "whole", 1.0),
        (r"7, no: \boxed{3}", "last", 0.0),
        (r"\boxed{3} but 7", "whole", 0.0),
    ],
)
def test_without_a_box_the_recipe_says_what_counts(text: str, unboxed: str, reward: float) -> None:
    assert grade("7", text, unboxed=unboxed) == reward
    assert grade("7", text) == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "options", "reward"),
    [
        ("50", "50%", {"percent": "hundredth"}, 0.0),
        ("0.5", r"50\%", {"percent": "hundredth"}, 1.0),
        ("50%", "50", {"percent": "ignore"}, 1.0),
        ("0.5", "50%", {"percent": "ignore"}, 0.0),
        ("10 m", "10 cm", {}, 1.0),
        ("10 m", "10 cm", {"units": "same"}, 0.0),
        ("10 m", r"10\text{ m}", {"units": "same"}, 1.0),
        ("10", "10 m", {"units": "same"}, 1.0),
        (r"\pi/2", "90°", {"degrees": "radians"}, 1.0),
        ("90", "90°", {"degrees": "radians"}, 0.0),
        ("abc", "cba", {"words": False}, 1.0),
        ("1/3", "0.333", {"digits": 3}, 1.0),
    ],
)
def test_rules_for_percent_units_degrees_words_and_digits(
    gold: str, answer: str, options: dict[str, Any], reward: float
) -> None:
    assert boxed(gold, answer, **options) == reward


@pytest.mark.parametrize(("gold", "said"), [("", "is empty"), ("x_{", "is no mathematics")])
def test_a_gold_answer_that_cannot_be_read_is_an_error_never_0(gold: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        boxed(gold, "7")


def test_in_a_thread_it_grades_without_its_own_clock() -> None:
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(boxed("1/4", "0.25")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_judgements_are_kept_by_gold_answer_and_options_and_their_number_is_bounded() -> None:
    graders._judged.cache_clear()
    texts = [rf"{i} \boxed{{5}}" for i in range(8)]
    assert graders.call("math_verify", "?", texts, "5.0", {}, {}) == [1.0] * 8
    assert graders._judged.cache_info()[:2] == (7, 1)
    graders.call("math_verify", "?", texts, "5.0", {}, {"digits": 5})
    graders.call("math_verify", "?", texts, "6.0", {}, {})
    assert graders._judged.cache_info().misses == 3
    assert graders._judged.cache_info().maxsize == graders.KEPT


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(workers=1, timeout_s=20.0)
    yield pool
    await pool.close()


async def test_an_answer_that_would_take_for_ever_is_an_error_and_its_siblings_are_judged(
    pool: Pool,
) -> None:
    part = GradePart(name="correct", grader="math_verify", options={"seconds": 1})
    texts = [r"\boxed{7}", r"\boxed{9^{9^{9^9}}}", r"\boxed{8}"]
    verdicts = await pool.grade("?", texts, Grading(gold="7", parts=(part,)))
    assert [v.parts for v in verdicts] == [{"correct": 1.0}, {}, {"correct": 0.0}]
    assert verdicts[1].error.startswith("verifier_error: correct: DeadlineError: no verdict on")
    assert pool.killed == 0, "its own clock was enough"
