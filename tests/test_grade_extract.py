"""Where the answer is: one extraction for all graders, on its examples."""

from __future__ import annotations

import time
from typing import Any

import pytest

from actor.grade.extract import answer_of, last_box, last_number, value_of
from common.grading import Extraction


@pytest.mark.parametrize(
    ("text", "where", "answer"),
    [
        (" so 49\n", {}, "so 49"),
        ("12+7=19#49", {"after": "#"}, "49"),
        ("#12#49", {"after": "#"}, "49"),
        ("49", {"after": "#"}, None),
        ("#", {"after": "#"}, ""),
        ("<answer>3</answer> or <answer> 4 </answer>!", {"tag": "answer"}, "4"),
        ("<answer>3</answer> or <answer>4", {"tag": "answer"}, "3"),
        ("<answer>3", {"tag": "answer"}, None),
        ("3</answer>", {"tag": "answer"}, None),
        (r"\boxed{1} then \boxed{2}", {"boxed": True}, "2"),
        ("2", {"boxed": True}, None),
        ("a\nb \n\n", {"take": "last_line"}, "b"),
        ("", {"take": "last_line"}, ""),
        ("of 12, 30 are 1,042.50 dollars", {"take": "last_number"}, "1,042.50"),
        ("none", {"take": "last_number"}, None),
        ("4<|im_end|>5", {"until": ("<|im_end|>",)}, "4"),
        (r"\boxed{4}</answer>\boxed{5}", {"until": ("</answer>", "END"), "boxed": True}, "4"),
        (r"<answer>so \boxed{3/4}</answer>", {"tag": "answer", "boxed": True}, "3/4"),
        ("<answer>x = 5\n= 6</answer>", {"tag": "answer", "after": "=", "take": "last_line"}, "6"),
    ],
)
def test_each_field_narrows_what_the_one_before_it_left(
    text: str, where: dict[str, Any], answer: str | None
) -> None:
    assert answer_of(text, Extraction(**where)) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{3} \boxed{7}", "7"),
        (r"\boxed{7} \boxed{8", "7"),
        (r"\boxed{7 and \boxed{8}", "8"),
        (r"\boxed{7", None),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{x = \boxed{7} }", "7"),
        (r"\fbox{7}", "7"),
        (r"{ \boxed{7}", "7"),
        (r"} \boxed{7} }", "7"),
        (r"\text{a\\}\boxed{7}", "7"),
        ("boxed{7}", None),
    ],
)
def test_only_the_last_box_that_is_closed_counts(text: str, content: str | None) -> None:
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12+7=19", "19"),
        ("it is -3", "-3"),
        ("5-3", "3"),
        ("x=-3", "-3"),
        ("−4", "−4"),
        ("2e-3 m", "2e-3"),
        ("3/4 of it", "3/4"),
        ("1,234,567 people", "1,234,567"),
        ("3,4", "4"),
        ("1,2345", "2345"),
        ("7.", "7"),
        ("$.5", ".5"),
        ("50%", "50"),
        ("", None),
    ],
)
def test_the_last_number_is_read_as_it_is_written(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("number", "value"),
    [("1,234.5", 1234.5), ("−4", -4.0), ("3/4", 0.75), ("1/0", None), ("x", None), ("", None)],
)
def test_a_written_number_has_a_value(number: str, value: float | None) -> None:
    assert value_of(number) == value


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 20_000, "{" * 100_000, "1," * 50_000, "<answer>" * 20_000, "9" * 100_000]
)
def test_a_hostile_response_costs_time_in_proportion_to_its_length(text: str) -> None:
    began = time.process_time()
    for where in ({"boxed": True}, {"take": "last_number"}, {"tag": "answer"}):
        answer_of(text, Extraction(**where))  # type: ignore[arg-type]
    assert time.process_time() - began < 2.0
