"""reasoning-gym's own scorers, on rows that went through MessagePack."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from actor.grade import graders
from common.errors import DataError
from common.plain import plain

reasoning_gym = pytest.importorskip("reasoning_gym", reason="pip install -e '.[graders]'")

# Tasks whose metadata hold tuples, maps with numbers for keys, dates and arrays of numbers.
TASKS = [
    "arc_1d",
    "calendar_arithmetic",
    "chain_sum",
    "color_cube_rotation",
    "fraction_simplification",
    "game_of_life",
    "knights_knaves",
    "letter_counting",
    "n_queens",
    "number_sorting",
    "palindrome_partitioning",
    "polynomial_equations",
    "simple_equations",
    "spell_backward",
    "time_intervals",
    "tower_of_hanoi",
    "word_ladder",
]


def columns(task: str, entry: dict[str, Any], **more: Any) -> dict[str, Any]:
    kept = {key: entry[key] for key in ("question", "answer", "metadata")}
    row = {"task": task, "entry": plain(kept), **more}
    sent: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(row))
    return sent


def grade(task: str, entry: dict[str, Any], text: str, **options: Any) -> float | None:
    (score,) = graders.call("reasoning_gym", "?", [text], "", columns(task, entry), options)
    return score


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_tasks_own_scorer_in_the_process_that_made_the_row(
    task: str,
) -> None:
    data = reasoning_gym.create_dataset(task, size=3, seed=7)
    for entry in data:
        assert grade(task, entry, entry["answer"]) == 1.0
        for answer in ("17", "[1, 2]"):
            assert grade(task, entry, answer) == data.score_answer(answer, entry)


def test_fractions_of_a_point_stay_fractions() -> None:
    (entry,) = reasoning_gym.create_dataset("letter_counting", size=1, seed=7)
    score = reasoning_gym.create_dataset("letter_counting", size=1).score_answer(
        f"about {entry['answer']} letters", entry
    )
    assert 0 < score < 1
    assert grade("letter_counting", entry, f"about {entry['answer']} letters") == score


def test_the_answer_is_found_as_the_recipe_says() -> None:
    (entry,) = reasoning_gym.create_dataset("chain_sum", size=1, seed=7)
    right = entry["answer"]
    assert grade("chain_sum", entry, f"so <answer> {right} </answer>", tag="answer") == 1.0
    assert grade("chain_sum", entry, f"so\n{right}", take="last_line") == 1.0
    assert grade("chain_sum", entry, f"1+1=2#{right}", after="#") == 1.0
    assert grade("chain_sum", entry, right, tag="answer") == 0.0


def test_parameters_that_the_scorer_reads_come_with_the_row() -> None:
    made = {"max_num_decimal_places": 2, "min_num_decimal_places": 2, "size": 10, "seed": 3}
    (entry,) = reasoning_gym.create_dataset("decimal_arithmetic", **{**made, "size": 1})
    row = columns("decimal_arithmetic", entry, config=made)
    scores = graders.call("reasoning_gym", "?", [entry["answer"]], "", row, {})
    assert scores == [1.0]


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("simple_integration", "__import__('os').getpid()"),
        ("countdown", "().__class__"),
        ("puzzle24", "os.getpid()"),
        ("n_queens", "__import__('os').getpid()"),
        ("binary_matrix", "[open('/dev/null')]"),
    ],
)
def test_an_answer_that_is_a_program_is_not_run(
    task: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr("os.getpid", lambda: ran.append(answer) or 1)
    (entry,) = reasoning_gym.create_dataset(task, size=1, seed=7)
    assert grade(task, entry, answer) in (0.0, 0.01)
    assert not ran


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "the row has no columns `task` and `entry`"),
        ({"task": "chain_sum"}, "the row has no columns"),
        ({"task": "no_such_task", "entry": {}}, "reasoning-gym has no task 'no_such_task'"),
    ],
)
def test_a_row_of_another_source_is_an_error_never_0(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        graders.call("reasoning_gym", "?", ["1"], "", row, {})
