"""A reward of several parts: named in the recipe, weighted in the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import recipe
from common.errors import ConfigError
from common.wire import GradePart, Grading
from learner.batch import flatten
from learner.config import LearnerConfig
from learner.item import Item
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts, parts_of
from learner.reward import reward
from tests.builders import make_group, make_rollout, make_ticket

TWO = """
[[learner.prompts.parts]]
name = "correct"
grader = "exact"
options = { after = "#" }

[[learner.prompts.parts]]
name = "format"
grader = "python:mine:tags"
weight = 0.25
"""


def prompts(folder: Path, text: str) -> PromptsConfig:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    loaded = recipe.load(str(path), {"learner": LearnerConfig})["learner"]
    assert isinstance(loaded, LearnerConfig)
    return loaded.prompts


def test_a_recipe_names_the_parts_of_the_reward_with_their_weights(tmp_path: Path) -> None:
    parts = parts_of(prompts(tmp_path, TWO))
    assert [(p.name, p.grader, p.weight) for p in parts] == [
        ("correct", "exact", 1.0),
        ("format", "python:mine:tags", 0.25),
    ]


def test_one_grader_is_one_part_named_correct(tmp_path: Path) -> None:
    (part,) = parts_of(prompts(tmp_path, '[learner.prompts]\ngrader = "numeric"\n'))
    assert (part.name, part.grader, part.weight) == ("correct", "numeric", 1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[learner.prompts]\ngrader = "exakt"', "did you mean 'exact'?"),
        (
            '[learner.prompts]\ngrader = "python:mine"',
            "give one of exact, numeric, math_verify, reasoning_gym, format, or python:MODULE:",
        ),
        (
            '[learner.prompts]\ngrader = "math_verify"\ngrader_options = { percnt = "ignore" }',
            "grader 'math_verify' has no option 'percnt' (did you mean 'percent'?)",
        ),
        (
            '[learner.prompts]\ngrader = "numeric"\ngrader_options = { relative = "x" }',
            "Expected `float`, got `str` - at `$.relative`",
        ),
        (TWO + '[learner.prompts]\ngrader = "numeric"', "leave these out"),
        (TWO.replace("format", "correct"), "a name comes twice among correct, correct"),
        (TWO.replace('"format"', '""'), "every part needs a name"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_with_the_recipe(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        prompts(tmp_path, text)
    assert said in str(caught.value)
    assert "learner.prompts" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tickets_carry_the_parts_and_their_weights(tmp_path: Path) -> None:
    class Letters:
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    tokenizer: Any = Letters()
    stream = Prompts(Arithmetic(0), prompts(tmp_path, TWO), tokenizer, (2,), 0, 100)
    parts = stream.draw(0).grading.parts
    assert [(p.name, p.weight, p.options) for p in parts] == [
        ("correct", 1.0, {"after": "#"}),
        ("format", 0.25, {}),
    ]


def test_the_reward_is_the_weighted_sum_and_correctness_stays_what_it_is() -> None:
    parts = (
        GradePart(name="correct", grader="exact", weight=2.0),
        GradePart(name="format", grader="python:mine:tags", weight=0.25),
    )
    grading = Grading(gold="1", parts=parts)
    scores: dict[float, dict[str, float]] = {
        1.0: {"correct": 1.0, "format": 0.5},
        0.0: {"correct": 0.0, "format": 1.0},
    }
    rollouts = tuple(make_rollout(k, parts=(v,)) for k, v in scores.items())
    item = Item(make_ticket(grading=grading), make_group([1, 0], rollouts=rollouts))
    batch = flatten([item], 0)
    assert batch.reward.tolist() == [2.125, 0.25]
    assert batch.correct.tolist() == [1.0, 0.0]
    assert reward(make_rollout(1.0, parts=({"correct": 1.0},)), grading) == 2.0, "one may abstain"
