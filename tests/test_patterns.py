"""A recipe's regular expressions on text that nobody chose."""

from __future__ import annotations

import logging
import re
import time

import pytest

from common.errors import ConfigError, DeadlineError
from common.patterns import MOST_SLOW, Pattern, groups

HOSTILE = [
    (r"((?:a|aa)+)$", "a" * 60 + "b"),
    (r"((?:.*a){12})b", "a" * 8_000),
    (r"(\s+)$", " " * 8_000 + "x"),
]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(-?\d+(?:\.\d+)?)\D*$", "so 12, or 3.5 m"),
        (r"```(?:[a-z]*\n)?(.+?)```", "```text\na```"),
        (r"^(.*\+)\d+\?$", "1+2+3?"),
        (r"(a)|b", "b"),
        (r"(a)", "b"),
        (r"(?i)answer:\s*(\w+)", "ANSWER:  ß"),
    ],
)
def test_it_finds_what_pythons_own_finds(pattern: str, text: str) -> None:
    found = re.search(pattern, text)
    assert Pattern("p", pattern).find(text) == (found and found.group(1))


def test_a_dot_may_also_be_the_end_of_a_line() -> None:
    assert Pattern("p", "a(.)b", across_lines=True).find("a\nb") == "\n"
    assert Pattern("p", "a(.)b").find("a\nb") is None


@pytest.mark.parametrize(("pattern", "text"), HOSTILE)
def test_one_that_would_take_for_ever_is_stopped_in_time(pattern: str, text: str) -> None:
    began = time.process_time()
    with pytest.raises(DeadlineError, match=f"key: no verdict on {len(text)} characters within"):
        Pattern("key", pattern, deadline_s=0.02).find(text)
    assert time.process_time() - began < 1.0


def test_one_that_is_always_slow_is_given_up_and_said_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Pattern("key", r"((?:a|aa)+)$", deadline_s=0.01)
    with caplog.at_level(logging.WARNING):
        for _ in range(MOST_SLOW):
            with pytest.raises(DeadlineError):
                slow.find("a" * 60 + "b")
        for _ in range(3):
            with pytest.raises(DeadlineError, match="key is given up"):
                slow.find("aa")
    first, last = (record.message for record in caplog.records)
    assert first.endswith("write the regular expression without repeats inside of repeats")
    assert "it is not tried any more" in last


def test_a_slow_text_now_and_then_costs_its_own_verdict() -> None:
    seldom = Pattern("key", r"((?:a|aa)+)$", deadline_s=0.01)
    for _ in range(2 * MOST_SLOW):
        with pytest.raises(DeadlineError):
            seldom.find("a" * 60 + "b")
        assert seldom.find("aa") == "aa"


def test_what_is_no_regular_expression_is_one_line() -> None:
    assert groups("key", "(a)(b)") == 2
    for wrong in ("(", "*", r"(?P<1>x)", "a" + "(" * 5):
        with pytest.raises(ConfigError, match="key: no regular expression"):
            groups("key", wrong)
