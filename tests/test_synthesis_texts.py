"""From tokens to proposed problems and from parents to prompts."""

from __future__ import annotations

from typing import Any

from learner.config import LearnerConfig
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.pool import Asked, Seed
from learner.synthesis.texts import LONGEST, Texts
from tests import chat_model
from tests.builders import make_rollout


def fenced(**prompts: Any) -> tuple[Texts, Any]:
    """The default formulation, with a tokenizer that knows all letters and a chat template."""
    letters = chat_model.tokenizer()
    config = LearnerConfig(prompts=PromptsConfig(**prompts), synthesis=SynthesisConfig())
    made = Prompts(Arithmetic(0), config.prompts, letters, (256,), 0, 2000)
    return Texts(config, made), letters


def test_by_default_the_policy_is_shown_a_right_response_and_not_the_problem() -> None:
    texts, letters = fenced(instruction="Think.", prefill="Well")
    said = letters.encode("3 + 4 = 7, so 7.", add_special_tokens=False)
    seed = Seed(
        ticket=1, problem="p", text="Add {3} & 4", gold="7", source="", p=0.5, response=said
    )
    ids = texts.prompt(seed)
    assert ids is not None
    asked = letters.decode(ids)
    assert "3 + 4 = 7, so 7." in asked
    assert "Add {3}" not in asked
    assert "Think." not in asked
    assert asked.endswith("assistant\n")


def test_a_response_without_a_problem_has_none_whatever_others_had() -> None:
    texts, letters = fenced()
    asked = Asked(n=2, parent="p", text="3 + 4?", gold="7", source="", depth=1)

    def said(text: str) -> tuple[str, str]:
        tokens = letters.encode(text, add_special_tokens=False)
        return texts.statement(make_rollout(0, tokens), asked)

    assert said("Here:\n```text\nTom has 3.\nHow many?\n```\nDone.")[0] == "Tom has 3.\nHow many?"
    assert said("```a``` or ```b```")[0] == "a"
    assert said("I cannot.") == ("", "no problem in it")
    assert said("``` ```") == ("", "no problem in it")


def test_a_regex_of_the_recipe_is_given_no_more_than_so_many_characters() -> None:
    texts, letters = fenced()
    asked = Asked(n=2, parent="p", text="3 + 4?", gold="7", source="", depth=1)
    for before, found in ((LONGEST - 7, "a"), (LONGEST - 6, "")):
        tokens = letters.encode("x" * before + "```a```", add_special_tokens=False)
        assert texts.statement(make_rollout(0, tokens), asked)[0] == found
    for after, answer in ((LONGEST - 2, "42"), (LONGEST, None)):
        tokens = letters.encode("It is 42" + "x" * after, add_special_tokens=False)
        assert texts.answer(tokens) == answer
