"""Prompt augmentation: many templates for one problem, one for a group, and how form is scored."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor.grade.marks import score
from actor.grade.pool import Pool
from common import recipe
from common.errors import ConfigError
from common.wire import Grading
from learner.advantage import advantages, informative
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Draft, Prompts
from learner.prompts.templates import STOP_WORDS, Templates, TemplatesConfig
from learner.reward import reward
from tests import chat_model
from tests.builders import make_group, make_rollout
from tests.test_prompts import Given

ALL = Templates(TemplatesConfig(), seed=0)
LINES = "<think>\n2 + 2\n</think>\n\n<answer>\n\\boxed{4}\n</answer>"
INLINE = "<think>2 + 2</think><answer>\\boxed{4}</answer>"
CHECKED = (
    "<solution>\n2 + 2 = 4\n</solution>\n<check>\nLet me verify the solution step by step. Yes."
    "\n</check>\n\\boxed{4}"
)


def marks(name: str) -> tuple[str, ...]:
    return ALL[name].marks


def group_advantages(rewards: list[float]) -> list[float]:
    found = advantages(np.array(rewards), np.zeros(len(rewards), int), "grpo")
    return [float(a) for a in found]


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("tags_on_lines", LINES, 1.0),
        ("tags_on_lines", LINES.replace("\n\n", "\n"), 1.0),
        ("tags_on_lines", INLINE, 0.0),
        ("tags", LINES, 1.0),
        ("tags", INLINE, 1.0),
        ("tags", INLINE + "</answer>", 0.75),
        ("tags_on_lines_begun", "2 + 2\n</think>\n\n<answer>\n4\n", 2 / 3),
        ("tags_begun", "2 + 2</think><answer>4</answer>", 1.0),
        ("checked", CHECKED, 1.0),
        ("checked", CHECKED.replace("verify", "look at"), 0.75),
        ("checked_begun", CHECKED.removeprefix("<solution>\n"), 1.0),
        ("closing", "So 4.", 0.0),
        ("closing", "The final answer is: 4", 1.0),
        ("closing", "The final answer is: 4. The final answer is: 4", 0.0),
        ("boxed", "anything", 1.0),
    ],
)
def test_the_format_score_is_the_published_one(template: str, text: str, expected: float) -> None:
    assert score(text, marks(template)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (
            [2, 2, 1.75, 1, 0.75, 1, 0, 1.25],
            [1.137033, 1.137033, 0.773183, -0.318369, -0.682220, -0.318369, -1.773772, 0.045481],
        ),
        (
            [2, 2, 1.75, 2, 2, 2, 2, 1.5],
            [0.504013, 0.504013, -0.840022, 0.504013, 0.504013, 0.504013, 0.504013, -2.184058],
        ),
        (
            [1, 0.75, 1, 1, 0.5, 1, 1, 0],
            [0.600243, -0.085749, 0.600243, 0.600243, -0.771742, 0.600243, 0.600243, -2.143726],
        ),
    ],
)
def test_advantages_of_accuracy_plus_format_are_the_published_ones(
    rewards: list[float], expected: list[float]
) -> None:
    assert group_advantages(rewards) == pytest.approx(expected, abs=3e-6)


def test_a_group_that_differs_in_form_alone_is_not_trained_on() -> None:
    for right in (1.0, 0.0):
        rollouts = tuple(
            make_rollout(right, parts=({"correct": right, "format": f},)) for f in (1.0, 0.75, 0.5)
        )
        assert not informative(make_group(rollouts=rollouts), "grpo")


def test_a_constant_format_score_leaves_the_advantages_as_they_are() -> None:
    right = [1.0, 0.0, 0.0, 1.0]
    with_one = group_advantages([r + 1.0 for r in right])
    assert with_one == pytest.approx(group_advantages(right), abs=1e-12)


def test_the_format_counts_for_wrong_answers_too_unless_it_is_gated() -> None:
    wrong = make_rollout(0.0, parts=({"correct": 0.0, "format": 0.75},))
    right = make_rollout(1.0, parts=({"correct": 1.0, "format": 0.75},))
    for gate, of_wrong in ((False, 0.75), (True, 0.0)):
        templates = Templates(TemplatesConfig(gate_by_acc=gate), 0)
        grading = Grading(parts=templates.part("tags"))
        assert (reward(right, grading), reward(wrong, grading)) == (1.75, of_wrong)


def test_there_are_thirteen_and_every_one_is_of_its_own_making() -> None:
    assert len(ALL.names) == 13
    told = {(ALL[name].system, ALL[name].user, ALL[name].prefill) for name in ALL.names}
    assert len(told) == 13
    prefilled = [name for name in ALL.names if ALL[name].prefill]
    assert len(prefilled) == 6
    for name in prefilled:
        begun = ALL[name].prefill.rstrip("\n")
        assert not any(begun in mark for mark in marks(name)), "a begun mark is not asked for"


# ---- which template ------------------------------------------------------------------------------


def test_the_draw_is_pure_in_seed_epoch_and_problem() -> None:
    again = Templates(TemplatesConfig(), seed=0)
    draws = [(epoch, f"p/{i}") for epoch in range(4) for i in range(40)]
    names = [ALL.pick(*draw) for draw in draws]
    assert [again.pick(*draw) for draw in reversed(draws)] == names[::-1]
    assert names[:40] != names[40:80], "another epoch, another draw"
    assert [Templates(TemplatesConfig(), 1).pick(*draw) for draw in draws] != names


def test_templates_of_an_epoch_are_uniform() -> None:
    """Chi-square with 12 degrees of freedom: 32.9 is exceeded once in a thousand."""
    for epoch in range(3):
        counts = Counter(ALL.pick(epoch, f"p/{i}") for i in range(8523))
        expected = 8523 / 13
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 32.9
        assert len(counts) == 13


def test_a_problem_meets_as_many_templates_as_chance_lets_it() -> None:
    problems = [f"p/{i}" for i in range(2000)]
    seen = [len({ALL.pick(epoch, p) for epoch in range(8)}) for p in problems]
    expected = 13 * (1 - (12 / 13) ** 8)
    assert expected == pytest.approx(6.147540, abs=1e-6)
    assert pytest.approx(12.893287, abs=1e-6) == 13 * (1 - (12 / 13) ** 60)
    assert sum(13 / k for k in range(1, 14)) == pytest.approx(41.341739, abs=1e-6)
    assert np.mean(seen) == pytest.approx(expected, abs=5 * math.sqrt(np.var(seen) / 2000))


# ---- in the stream -------------------------------------------------------------------------------


def stream(
    *questions: str, chat: str | None = chat_model.TEMPLATE, room: int = 4000, **settings: Any
) -> Prompts:
    config = PromptsConfig(**settings)
    words = chat_model.tokenizer(chat)
    return Prompts(Given(*questions), config, words, (256,), 0, room)


def text(draft: Draft) -> str:
    return str(chat_model.tokenizer().decode(draft.prompt))


def drawn(name: str, **settings: Any) -> Draft:
    return stream("1+1?", templates=TemplatesConfig(use=(name,)), **settings).draw(0)


def test_a_template_is_rendered_by_the_chat_template_and_its_beginning_is_prompt() -> None:
    draft = drawn("closing_guided")
    told = ALL["closing_guided"]
    assert text(draft) == (
        f"<|start|>system\n{told.system}<|end|>\n<|start|>user\n1+1?<|end|>\n"
        "<|start|>assistant\nLet us think step by step."
    )
    assert draft.template == "closing_guided"


def test_a_model_without_a_chat_template_is_asked_in_plain_lines() -> None:
    assert text(drawn("tags_begun", chat=None)) == f"{ALL['tags_begun'].system}\n1+1?<think>"
    assert text(drawn("assistant", chat=None)).endswith(ALL["assistant"].user[len("{problem}") :])


def test_a_ticket_carries_the_templates_marks_as_a_part_of_the_reward() -> None:
    correct, form = drawn("tags").grading.parts
    assert (form.name, form.grader, form.options) == (
        "format",
        "format",
        {"marks": [*marks("tags")]},
    )
    assert correct.options == {"until": [*STOP_WORDS]}
    silent = TemplatesConfig(use=("tags",), format_weight=0.0)
    assert len(stream("1+1?", templates=silent).draw(0).grading.parts) == 1


def test_the_answer_is_found_in_the_same_way_whatever_the_template() -> None:
    graded = [drawn(name, grader="math_verify").grading.parts[0] for name in ALL.names]
    assert all(part == graded[0] for part in graded)


async def test_an_answer_ends_at_its_closing_tag_and_form_is_graded_in_the_actor() -> None:
    grading = drawn("tags", grader="exact", grader_options={"boxed": True}).grading
    late = INLINE + " or \\boxed{gold}"
    right = INLINE.replace("4", "gold")
    pool = Pool(workers=1, timeout_s=20.0)
    try:
        found = await asyncio.wait_for(pool.grade("1+1?", [late, right], grading), 60)
    finally:
        await pool.close()
    assert [verdict.parts for verdict in found] == [
        {"correct": 0.0, "format": 1.0},
        {"correct": 1.0, "format": 1.0},
    ]


def test_evaluations_ask_in_exactly_one_template() -> None:
    questions = [f"{i}+1?" for i in range(40)]
    every = stream(*questions, templates=TemplatesConfig())
    assert {draft.template for draft in every.heldout(40)} == {"boxed"}
    assert len({every.draw(i).template for i in range(40)}) > 5
    chosen = stream(*questions, templates=TemplatesConfig(evaluation="closing"))
    assert {draft.template for draft in chosen.heldout(40)} == {"closing"}


def test_one_template_that_adds_nothing_is_the_plain_stream_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[bare]\nuser = "{problem}"\n')
    only = TemplatesConfig(file=str(path), format_weight=0.0)
    words = chat_model.tokenizer(None)
    bare = Prompts(Arithmetic(3), PromptsConfig(templates=only), words, (256,), 3, 99)
    plain = Prompts(Arithmetic(3), PromptsConfig(), words, (256,), 3, 99)
    for cursor in range(20):
        one, other = bare.draw(cursor), plain.draw(cursor)
        assert one.prompt.tobytes() == other.prompt.tobytes()
        assert (one.problem, one.cursor, one.source) == (other.problem, other.cursor, other.source)


def test_the_tiny_models_templates_are_in_its_own_characters() -> None:
    from transformers import AutoTokenizer

    from common import models

    words: Any = AutoTokenizer.from_pretrained(models.find("tiny"))
    tiny = PromptsConfig(templates=TemplatesConfig(file="tiny"))
    prompts = Prompts(Arithmetic(0), tiny, words, (2,), 0, 80)
    drafts = [prompts.draw(cursor) for cursor in range(60)]
    assert len({draft.template for draft in drafts}) == 6
    templates = Templates(TemplatesConfig(file="tiny"), 0)
    for draft in drafts:
        template = templates[draft.template]
        about = template.user.replace("{problem}", "") + template.prefill
        assert draft.prompt.size == len(words.decode(draft.prompt)) >= 6 + len(about)
        assert 3 not in draft.prompt, "<unk>"


# ---- what is wrong with a file -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "table", "said"),
    [
        (
            '[mine]\nuser = "solve it"',
            "",
            "'mine' has not one place for the problem: put {problem}",
        ),
        ('[mine]\nusr = "{problem}"', "", "mine.usr: unknown; did you mean mine.user?"),
        ("mine = 3", "", "mine is not a table"),
        ("", "", "has no template"),
        ("[mine", "", "is no TOML file"),
        ("[mine]", 'use = ["boxd"]', "use: no template 'boxd'; did you mean 'boxed'?"),
        ("[mine]", 'evaluation = "mime"', "use: no template 'mime'; did you mean 'mine'?"),
    ],
)
def test_a_templates_file_that_cannot_work_is_one_line(
    content: str, table: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content + "\n")
    override = f'learner.prompts.templates={{file = "{path}", {table}}}'.replace(", }", "}")
    with pytest.raises(ConfigError) as refused:
        recipe.load_all("tiny", [override])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_templates_of_ones_own_come_first_and_may_stand_beside_the_shipped(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[mine]\nuser = "Q: {problem}"\n[boxed]\nsystem = "Mine."\n')
    own = Templates(TemplatesConfig(file=str(path)), 0)
    assert own.names == ("mine", "boxed")
    both = Templates(TemplatesConfig(file=str(path), use=("tags", "boxed")), 0)
    assert (both.names, both["boxed"].system) == (("tags", "boxed"), "Mine.")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"system": "Be brief."}, "system: the templates bring their own"),
        ({"prefill": "="}, "prefill: the templates bring their own"),
        ({"parts": ({"name": "correct"}, {"name": "format"})}, 'the templates add a part "format"'),
    ],
)
def test_what_templates_bring_is_not_given_twice(settings: dict[str, Any], said: str) -> None:
    table = recipe.inline({"templates": {}, **settings})
    with pytest.raises(ConfigError, match=said):
        recipe.load_all("scripted", ["learner.prompts.grader=exact", f"learner.prompts={table}"])
