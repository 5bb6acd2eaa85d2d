"""Tasks of reasoning-gym as a source: pure in the index, no question on both sides."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from common.errors import DataError
from common.plain import rebuilt
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Source, open_source

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def source_of(task: str, seed: int = 0, **options: Any) -> Source:
    config = PromptsConfig(source="reasoning_gym", task=task, options=options)
    return open_source(config, seed)


def test_a_problem_depends_on_its_index_alone() -> None:
    one, other = source_of("chain_sum", **SMALL), source_of("chain_sum", **SMALL)
    forth = [one.train(index) for index in range(40)]
    assert [other.train(index) for index in reversed(range(40))] == forth[::-1]
    assert [source_of("chain_sum", seed=1, **SMALL).train(i) for i in range(40)] != forth


def test_no_question_is_on_both_sides_not_even_of_a_task_with_few() -> None:
    source = source_of("chain_sum", **SMALL)
    train = {source.train(index).text for index in range(600)}
    held = {problem.text for i in range(200) if (problem := source.heldout(i))}
    assert len(train) < 200, "a small task repeats itself"
    assert not train & held


def test_one_question_is_one_problem_under_one_name() -> None:
    source = source_of("chain_sum", **SMALL)
    names: dict[str, set[str]] = {}
    for index in range(400):
        problem = source.train(index)
        names.setdefault(problem.text, set()).add(problem.id)
    assert {len(ids) for ids in names.values()} == {1}
    assert len(set.union(*names.values())) == len(names)


@pytest.mark.parametrize(
    "task", ["chain_sum", "letter_counting", "knights_knaves", "simple_geometry", "time_intervals"]
)
def test_an_item_travels_whole_and_its_scorer_takes_it(task: str) -> None:
    import reasoning_gym

    problem = source_of(task).train(3)
    columns = msgspec.msgpack.decode(msgspec.msgpack.encode(problem.columns))
    entry = rebuilt(columns["entry"])
    assert (columns["task"], entry["question"]) == (task, problem.text)
    scorer = reasoning_gym.create_dataset(task, size=1, seed=0)
    assert scorer.score_answer(problem.gold, entry) == 1.0


def test_the_grader_of_the_actor_needs_nothing_but_the_columns() -> None:
    from actor.grade import graders

    problem = source_of("chain_sum", **SMALL).train(0)
    scores = graders.call(
        "reasoning_gym", problem.text, [problem.gold, "999"], problem.gold, problem.columns, {}
    )
    assert scores[0] == 1.0
    assert scores[1] is not None
    assert scores[1] < 1.0


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("chain_sums", {}, "did you mean 'chain_sum'"),
        ("chain_sum", {"terms": 2}, "options of 'chain_sum'"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "options of 'chain_sum'"),
        ("composite", {}, "composite"),
    ],
)
def test_what_reasoning_gym_cannot_make_is_one_line(
    task: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said) as refused:
        source_of(task, **options)
    assert "\n" not in str(refused.value)


def test_a_task_with_too_few_questions_for_two_sides_is_refused() -> None:
    source = source_of("coin_flip", min_trials=3, max_trials=3)
    with pytest.raises(DataError, match="too few different questions"):
        [(source.train(index), source.heldout(index)) for index in range(20)]
