"""Questions as tokens: the chat template, what stands around a question, what does not fit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from learner.prompts.chat import Renderer
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Problem
from learner.prompts.stream import MOST_BYTES, REMEMBERED, Prompts
from tests import chat_model


class Given:
    """A source of the questions it is given, over and over; every one is held out too."""

    name = "given"

    def __init__(self, *questions: str) -> None:
        self._questions = questions

    def train(self, index: int) -> Problem:
        question = self._questions[index % len(self._questions)]
        return Problem(f"given/{question[:8]}", question, "gold", {})

    def heldout(self, index: int) -> Problem | None:
        return self.train(index) if index < len(self._questions) else None


def rendered(question: str, template: str | None = chat_model.TEMPLATE, **settings: Any) -> str:
    """What the model is sent, as text."""
    words = chat_model.tokenizer(template)
    return str(words.decode(Renderer(PromptsConfig(**settings), words)(question)))


def prompts(*questions: str, room: int = 40, **settings: Any) -> Prompts:
    words = chat_model.tokenizer(None)
    return Prompts(Given(*questions), PromptsConfig(**settings), words, (256,), 0, room)


def test_tokens_are_those_of_the_tokenizers_own_chat_template() -> None:
    words = chat_model.tokenizer()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    expected = words.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = Renderer(PromptsConfig(system="Be brief."), words)("1+1?")
    assert ids.dtype == np.int32
    assert ids.tolist() == expected


def test_an_answer_is_stopped_by_the_token_that_ends_a_turn() -> None:
    source, words = Given("1+1?"), chat_model.tokenizer()
    sampling = Prompts(source, PromptsConfig(), words, (256,), 0, 99).sampling(1, 1.0, 8)
    assert sampling.stop == (256, 258)
    plain = Prompts(source, PromptsConfig(chat=False), words, (256,), 0, 99)
    assert plain.sampling(1, 1.0, 8).stop == (256,)


def test_a_template_that_ends_turns_with_plain_text_stops_nothing_by_it() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert Renderer(PromptsConfig(), chat_model.tokenizer(template)).stop == ()


def test_auto_uses_the_template_that_there_is_and_does_without_one() -> None:
    assert rendered("1+1?") == "<|start|>user\n1+1?<|end|>\n<|start|>assistant\n"
    assert rendered("1+1?", template=None) == "1+1?"
    assert rendered("1+1?", chat=False) == "1+1?"


def test_instruction_system_and_prefill_have_their_places() -> None:
    around = {"system": "Be brief.", "instruction": "Only the number.", "prefill": "="}
    assert rendered("1+1?", **around) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\n1+1?\nOnly the number.<|end|>\n"
        "<|start|>assistant\n="
    )
    assert rendered("1+1?", template=None, **around) == "Be brief.\n1+1?\nOnly the number.="


def test_chat_without_a_template_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"has no chat template: copy its chat_template\.jinja"):
        rendered("1+1?", template=None, chat=True)


def test_a_broken_template_is_one_line() -> None:
    with pytest.raises(DataError, match=r"the model's chat template: .*Error") as refused:
        rendered("1+1?", template="{{ messages[9]['content'] }}")
    assert "\n" not in str(refused.value)


def test_what_is_known_of_problems_passed_over_is_bounded() -> None:
    stream = prompts("short")
    for number in range(2 * REMEMBERED + 1):
        stream._pass_over(str(number), "too long")
        assert len(stream._unfit) <= REMEMBERED


def test_a_prompt_that_does_not_fit_is_passed_over_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = prompts("short", "x" * 41, "also short")
    assert [stream.draw(cursor).cursor for cursor in range(3)] == [0, 2, 2]
    assert stream.draw(4).cursor == 5
    assert caplog.text.count("passed over") == 1, "said once a problem"
    assert "passed over (1 so far): a prompt of 41 tokens; the model's context" in caplog.text


def test_a_text_that_cannot_fit_is_not_even_tokenised(caplog: pytest.LogCaptureFixture) -> None:
    """Tokenizing a row of a hundred megabytes would take the desk's thread for a minute."""
    stream = prompts("x" * 3_000_000, "short", room=4_000)
    began = time.process_time()
    assert stream.draw(0).problem == "given/short"
    assert time.process_time() - began < 0.5
    assert "a prompt of 3000000 characters" in caplog.text


def test_a_row_too_heavy_for_a_message_is_passed_over_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Heavy(Given):
        def train(self, index: int) -> Problem:
            problem = super().train(index)
            heavy = {"tests": "x" * (MOST_BYTES + 1)} if problem.text == "heavy" else {}
            return problem._replace(columns=heavy)

    words = chat_model.tokenizer(None)
    stream = Prompts(Heavy("heavy", "light"), PromptsConfig(), words, (256,), 0, 40)
    assert stream.draw(0).problem == "given/light"
    assert f"{MOST_BYTES} may travel with a ticket" in caplog.text


def test_what_is_passed_over_depends_on_the_cursor_alone() -> None:
    questions = ("a", "x" * 50, "b", "y" * 60, "z" * 70, "c")
    whole, restarted = prompts(*questions), prompts(*questions)
    cursor, walked = 0, []
    while len(walked) < 6:
        draft = whole.draw(cursor)
        walked.append(draft.problem)
        assert restarted.draw(cursor)[:1] == draft[:1]
        cursor = draft.cursor + 1
    assert walked == ["given/a", "given/b", "given/c"] * 2


def test_a_source_of_which_nothing_fits_ends_with_one_line() -> None:
    stream = prompts("x" * 41)
    with pytest.raises(DataError, match="problems in a row do not fit; the model's context"):
        stream.draw(0)
    with pytest.raises(DataError, match="no held-out problem fits"):
        stream.heldout(4)


def test_heldout_problems_are_different_and_as_many_as_there_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = prompts("one", "two", "one", "x" * 41, "three")
    assert [draft.problem for draft in stream.heldout(2)] == ["given/one", "given/two"]
    assert len(stream.heldout(9)) == 3
    assert "3 held-out problems: there are no 9 different ones" in caplog.text


def test_a_ticket_carries_gold_columns_and_grader() -> None:
    draft = prompts("one", grader="numeric", grader_options={"absolute": 0.5}).draw(0)
    assert (draft.template, draft.source, draft.grading.gold) == ("plain", "given", "gold")
    assert draft.grading.parts[0].grader == "numeric"
    assert draft.grading.parts[0].options == {"absolute": 0.5}
