"""Turns and hints on the learner's side: settings, what tickets say, rewards, metrics, the sink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from common.audit_rule import facts_of
from common.codec import Codec
from common.config import RunConfig
from common.episodes import Episode, Feedback
from common.errors import ConfigError, DataError
from common.journal import Journal
from common.recipe import load
from common.records import Admit, Issue, Open
from common.runfolder import RunFolder
from common.wire import FromActor, GradePart, Grading, Rollout
from learner.advantage import advantages, informative
from learner.config import LearnerConfig
from learner.evaluation import Evaluation
from learner.interventions import FILE, write
from learner.prompts.chat import Renderer
from learner.prompts.config import PromptsConfig
from learner.prompts.episodes import Episodes
from learner.reward import reward
from learner.turns import FeedbackConfig, InterveneConfig, facts
from tests import chat_model
from tests.builders import make_group, make_rollout, make_segment, make_ticket
from tests.talking import TINY, WORDS, tokens_of

CHAT = chat_model.tokenizer()


def episodes(
    feedback: FeedbackConfig | None = None,
    intervene: InterveneConfig | None = None,
    tokenizer: Any = CHAT,
    **prompts: Any,
) -> Episodes:
    return Episodes(feedback, intervene, PromptsConfig(**prompts), tokenizer)


def talk(solved_at: int | None, turns: int = 3, **fields: Any) -> Rollout:
    """An episode that was right at turn `solved_at`, or wrong at all of its turns."""
    last = turns - 1 if solved_at is None else solved_at
    segments = tuple(make_segment(turn=turn) for turn in range(last + 1))
    right = solved_at is not None
    parts = tuple({"correct": float(right and turn == last)} for turn in range(last + 1))
    return make_rollout(float(right), segments=segments, parts=parts, **fields)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.feedback={turns=0}", "learner.feedback.turns: expected a whole number >= 1"),
        ("learner.feedback={turms=2}", "did you mean learner.feedback.turns?"),
        ('learner.feedback={voice="gpt"}', 'voice = "gpt": expected python:MODULE:FUNCTION or'),
        ('learner.feedback={voice="http://h/v1"}', "model is empty: which model of http://h/v1?"),
        ('learner.feedback={model="m"}', "model, key: they are an endpoint's, and voice is none"),
        (
            'learner.feedback={voice="http://h/v1", model="m", key="sk-123"}',
            "key: give the name of the environment variable",
        ),
        ("learner.feedback={gamma=1.5}", "learner.feedback.gamma: expected a number <= 1"),
        ("learner.intervene={triggers=[]}", "triggers: there is none, and no judge either"),
        ('learner.intervene={triggers=["long"]}', 'long = 0: the trigger "long" needs it'),
        ("learner.intervene={hint_tokens=65}", "expected a whole number <= 64"),
        ("learner.intervene={share=0.1}", "expected a number <= 0.026"),
        ("learner.intervene={rounds=4}", "expected a whole number <= 3"),
        ("learner.intervene={cut=true}", "cut: only a judge says where a step begins"),
    ],
)
def test_bad_settings_are_one_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("tiny", {"learner": LearnerConfig}, [override])
    assert said in str(caught.value)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="it looks at answers of one turn"):
        load(
            "tiny",
            {"learner": LearnerConfig},
            ["learner.feedback={}", "learner.intervene={}"],
        )
    with pytest.raises(ConfigError, match="keep_journal = true"):
        load(
            "tiny",
            {"learner": LearnerConfig},
            ["learner.keep_journal=false", "learner.intervene={}"],
        )


# -- what tickets say ------------------------------------------------------------------------------


def test_one_turn_and_no_hints_say_nothing_so_that_tickets_are_as_before() -> None:
    prompt = np.array([1, 2], np.int32)
    assert episodes().of("main", prompt, "q") is None
    assert episodes(FeedbackConfig(turns=1)).of("main", prompt, "q") is None
    asked = episodes(FeedbackConfig(), tokenizer=CHAT)
    assert asked.of("main", prompt, "q") is not None
    assert asked.of("eval", prompt, "q") is asked.of("aux", prompt, "q") is None
    evaluated = episodes(FeedbackConfig(evaluate=True, temperature_step=0.15))
    heldout = evaluated.of("eval", prompt, "q")
    assert heldout is not None
    assert heldout.feedback is not None
    assert heldout.feedback.temperatures == ()  # evaluations have their own


def test_a_plain_tickets_bytes_do_not_know_of_episodes() -> None:
    frame = Codec(Issue).encode(Issue(ticket=make_ticket()))
    assert b"episode" not in frame


@pytest.mark.parametrize("prefill", ["", "Well: "])
def test_the_next_turn_is_the_chat_templates_own_token_by_token(prefill: str) -> None:
    settings = {"system": "Be brief.", "prefill": prefill}
    prompt = Renderer(PromptsConfig(**settings), CHAT)("1+1?")
    rule = FeedbackConfig(wrong="No. Again: {question}")
    episode = episodes(rule, **settings).of("main", prompt, "1+1?")
    assert episode is not None
    assert episode.feedback is not None
    answer = CHAT("3<|end|>", add_special_tokens=False)["input_ids"]
    talked = CHAT.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": f"{prefill}3"},
            {"role": "user", "content": "No. Again: 1+1?"},
        ],
        add_generation_prompt=True,
        return_dict=False,
    )
    again = CHAT(prefill, add_special_tokens=False)["input_ids"]
    assert [*prompt, *answer, *episode.feedback.wrong] == [*talked, *again]
    assert list(episode.feedback.end) == [258]
    words = CHAT("No. Again: 1+1?", add_special_tokens=False)["input_ids"]
    assert (*episode.feedback.open, *words, *episode.feedback.close) == episode.feedback.wrong


def test_words_that_the_tokenizer_cannot_write_are_refused() -> None:
    from transformers import AutoTokenizer

    tiny: Any = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(ConfigError, match=r"feedback.wrong: the model's tokenizer cannot write"):
        episodes(FeedbackConfig(), tokenizer=tiny)
    with pytest.raises(ConfigError, match=r"intervene.hint: the model's tokenizer cannot write"):
        episodes(None, InterveneConfig(), tokenizer=tiny)
    fits = episodes(FeedbackConfig(wrong="{question}", turns=2), tokenizer=tiny)
    episode = fits.of("main", np.array(tokens_of("1+2?"), np.int32), "1+2?")
    assert episode is not None
    assert episode.feedback is not None
    assert list(episode.feedback.wrong) == tokens_of("1+2?")


def test_a_template_that_leaves_out_earlier_turns_is_refused() -> None:
    last = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}A:{% endif %}"
    with pytest.raises(DataError, match="leaves out earlier turns"):
        episodes(FeedbackConfig(), tokenizer=chat_model.tokenizer(last))


def test_temperatures_of_turns_rise_above_a_floor_where_that_is_asked_for() -> None:
    rule = FeedbackConfig(turns=4, temperature_step=0.15, temperature_floor=0.2)
    episode = episodes(rule).of("main", np.array([1], np.int32), "q")
    assert episode is not None
    assert episode.feedback is not None
    assert episode.feedback.temperatures == pytest.approx((0.2, 0.2, 0.3, 0.45))


# -- rewards and metrics ---------------------------------------------------------------------------


def test_a_right_answer_at_turn_k_is_worth_gamma_to_the_k() -> None:
    worth = [reward(talk(k, 10), gamma=0.9) for k in range(6)]
    assert worth == pytest.approx([1, 0.9, 0.81, 0.729, 0.6561, 0.59049])
    assert reward(talk(None), gamma=0.9) == 0.0
    parts = ({"correct": 0.0, "format": 1.0}, {"correct": 1.0, "format": 0.5})
    shaped = make_rollout(1.0, segments=(make_segment(), make_segment(turn=1)), parts=parts)
    weighed = Grading(parts=(GradePart(name="correct", grader="exact", weight=2.0),))
    assert reward(shaped, weighed, gamma=0.5) == 2.0 * 0.5 + 0.5


def test_groups_are_compared_by_discounted_rewards() -> None:
    group = make_group(rollouts=tuple(talk(k) for k in (0, 2, None, 1)))
    rewards = np.array([reward(r, gamma=0.9) for r in group.rollouts])
    assert rewards.tolist() == pytest.approx([1, 0.81, 0, 0.9])
    rows = np.zeros(4, np.int64)
    expected = {
        "grpo": [0.703709, 0.289121, -1.478335, 0.485505],
        "dr_grpo": [0.3225, 0.1325, -0.6775, 0.2225],
        "rloo": [0.43, 0.176667, -0.903333, 0.296667],
    }
    for estimator, values in expected.items():
        assert advantages(rewards, rows, estimator) == pytest.approx(values, abs=2e-6)


def test_a_group_solved_at_different_turns_teaches_something() -> None:
    group = make_group(rollouts=(talk(0), talk(1)))
    assert informative(group, "grpo", gamma=0.9)
    assert not informative(group, "grpo")
    assert (facts_of(group, 0.9).uniform, facts_of(group).uniform) == (False, True)  # the auditor
    assert not informative(make_group(rollouts=(talk(1), talk(1))), "grpo", gamma=0.9)
    assert not informative(make_group(rollouts=(talk(None), talk(None))), "grpo", gamma=0.9)


def test_a_step_says_how_accurate_each_turn_was_and_what_happened() -> None:
    lost = make_rollout(0, error="verifier_error: x")
    slow = talk(None, events={"feedback_slow": 2})
    group = make_group(rollouts=(talk(0), talk(2), slow, lost))
    found = facts([group], FeedbackConfig(turns=3), None)
    third = pytest.approx(1 / 3)
    assert found["turn_correct"] == {"0": third, "1": third, "2": pytest.approx(2 / 3)}
    assert found["turns"] == {"0": 1, "1": 0, "2": 2}
    assert found["episode_events"] == {"feedback_slow": 2}
    assert facts([group], None, None) == {}


def test_an_evaluation_of_several_turns_counts_by_turn() -> None:
    point = Evaluation()
    point.add(make_group(rollouts=(talk(0), talk(2), talk(None))))
    point.add(make_group(rollouts=(talk(2),)))
    assert point.by_turn == {"0": 0.25, "1": 0.25, "2": 0.75}
    assert point.accuracy == 0.75


# -- supervised data -------------------------------------------------------------------------------


def hinted(correct: float, clean: bool = True) -> Rollout:
    segments = (
        make_segment(CHAT("2+2=5.")["input_ids"]),
        make_segment(CHAT(" No:")["input_ids"], role="hint"),
        make_segment([*CHAT(" 4")["input_ids"], 258]),
    )
    return make_rollout(correct, segments=segments, flaws=("wrong",), clean=clean)


def test_kept_interventions_become_conversations_each_once(tmp_path: Path) -> None:
    settings = PromptsConfig(system="Be brief.", prefill="So ")
    prompt = Renderer(settings, CHAT)("2+2?").tolist()
    asked = episodes(None, InterveneConfig()).of("main", np.array(prompt, np.int32), "2+2?")
    assert asked is not None
    ticket = make_ticket(1, prompt=prompt, n=1, episode=asked)
    group = make_group([0], ticket=1, hinted=(hinted(1), hinted(0), hinted(1, clean=False)))
    folder = RunFolder.create(tmp_path / "run")
    journal = Journal(folder.journal, folder.claim())
    journal.append(Open(run="r", incarnation=1, config={}))
    journal.append(Issue(ticket=ticket))
    journal.append(Issue(ticket=make_ticket(2)))
    journal.append(Admit(ticket=1, frame=bytes(Codec(FromActor).encode(group)), at=0.0))
    journal.commit()
    journal.close()
    CHAT.save_pretrained(tmp_path / "model")
    for _ in range(2):  # again, as after a restart
        path, lines = write(folder, tmp_path / "model")
        assert (path.name, lines) == (FILE, 1)
    (line,) = [json.loads(each) for each in path.read_text().splitlines()]
    assert line["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "So 2+2=5. No: 4"},
    ]
    assert (line["ticket"], line["flaws"], line["hint_tokens"]) == (1, ["wrong"], 4)


def test_a_plain_prompt_is_what_the_user_said(tmp_path: Path) -> None:
    from learner.interventions import Reader

    reader = Reader(chat_model.tokenizer(None))
    ticket = make_ticket(prompt=CHAT("2+2?")["input_ids"])
    assert reader.asked(ticket) == ([{"role": "user", "content": "2+2?"}], "")


def test_an_episode_travels_in_a_ticket() -> None:
    rule = Feedback(turns=3, wrong=(1, 2), temperatures=(1.0, 0.5, 0.3), gamma=0.9)
    ticket = make_ticket(episode=Episode(feedback=rule))
    codec = Codec(Issue)
    found = codec.decode(codec.encode(Issue(ticket=ticket))).ticket
    assert found.episode == ticket.episode
    assert msgspec.structs.asdict(found.episode.feedback)["wrong"] == (1, 2)


def test_the_builders_speak_the_shipped_model() -> None:
    assert WORDS(tokens_of("1+2?")) == "1+2?"
    assert RunConfig().model == "tiny"
