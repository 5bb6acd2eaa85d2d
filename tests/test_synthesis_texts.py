"""From tokens to proposed problems and from parents to prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learner.config import EvalConfig, LearnerConfig
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Arithmetic, open_source
from learner.prompts.stream import Prompts
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.pool import Asked, Made, Seed
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


def test_what_any_row_holds_out_is_not_proposed_asked_in_evaluations_or_not(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"What is {i} and {i + 1}?", "answer": str(i)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = PromptsConfig(source="jsonl", path=str(tmp_path / "rows.jsonl"))
    config = LearnerConfig(
        prompts=prompts, synthesis=SynthesisConfig(), eval=EvalConfig(problems=2)
    )
    source = open_source(prompts, 0)
    stream = Prompts(source, prompts, chat_model.tokenizer(), (256,), 0, 2000)
    texts = Texts(config, stream)
    asked = Asked(n=2, parent="p", text="What is 3 and 4?", gold="7", source="", depth=1)
    made = Made(ticket=1, rollout=0)
    held = list(stream.held_out_words(1_000))
    assert len(held) == 20
    assert {texts.objection(text, made, asked, []) for text in held} == {"held out"}
    taught = source.train(0).text
    assert texts.objection(taught, made, asked, []) == ""
    assert texts.objection(f" {taught.upper()}", made, asked, [taught]) == "duplicate"
