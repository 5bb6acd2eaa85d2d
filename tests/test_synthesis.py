"""The pure pieces of synthesis: rewards, labels, checks, against their golden numbers."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from common.recipe import load
from learner.advantage import advantages
from learner.config import LearnerConfig
from learner.prompts.arithmetic import draw
from learner.prompts.config import PromptsConfig
from learner.synthesis import label, reward
from learner.synthesis.checks import (
    asks_more,
    clusters,
    fingerprint,
    in_other_letters,
    leaks,
    near,
    overlap,
)
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.label import Labeller, Opinion

EIGHTHS = [k / 8 for k in range(9)]


def test_diversity_is_the_variance_of_answers_as_a_share_of_the_largest() -> None:
    found = [reward.diversity(p) for p in EIGHTHS]
    assert found == [0, 0.4375, 0.75, 0.9375, 1, 0.9375, 0.75, 0.4375, 0]


def test_the_baseline_follows_what_proposals_have_been_like() -> None:
    baseline: float | None = 0.6
    seen = []
    for p in ((2 / 8, 1 / 8, 4 / 8), (3 / 8, 5 / 8, 1 / 8), (0.0, 1 / 8, 2 / 8)):
        assert baseline is not None
        seen.append([reward.deviation(q, baseline, 1.0) for q in p])
        baseline = reward.smoothed(baseline, [reward.diversity(q) for q in p], 0.9)
        seen.append([baseline or 0.0])
    golden = [
        *([0.15, -0.1625, 0.4], [0.612917]),
        *([0.324583, 0.324583, -0.175417], [0.628708]),
        *([-0.628708, -0.191208, 0.121292], [0.605421]),
    ]
    for found, wanted in zip(seen, golden, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_the_first_proposals_are_the_first_baseline_and_none_change_nothing() -> None:
    assert reward.smoothed(None, [0.5, 1.0], 0.9) == 0.75
    assert reward.smoothed(0.4, [], 0.9) == 0.4


def test_the_deviation_is_clipped_on_both_sides() -> None:
    assert (reward.deviation(0.5, 0.2, 0.5), reward.deviation(0.0, 0.9, 0.5)) == (0.5, -0.5)


def test_svs_rewards_one_to_five_of_eight_and_its_parents_are_one_to_four() -> None:
    svs = SynthesisConfig(reward="svs", accept=(0.125, 0.625))
    found = [reward.worth(p, cluster=0, baseline=0, config=svs) for p in EIGHTHS]
    assert found == [0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert [reward.in_band(p, (0.125, 0.5)) for p in EIGHTHS] == [
        p in EIGHTHS[1:5] for p in EIGHTHS
    ]


def test_proposals_are_compared_with_those_of_their_own_ticket() -> None:
    found = advantages(np.array([1.0, 1, 0, 0, 1, 0, 0, 0]), np.zeros(8, np.int64), "grpo")
    high, low = 1.207612, -0.724567
    assert found == pytest.approx([high, high, low, low, high, low, low, low], abs=1e-6)


def test_r_zero_rewards_doubt_and_takes_off_what_is_said_again() -> None:
    config = SynthesisConfig(reward="r_zero", label="consensus")
    shares = zip([0.5, 0.9, 0.3, 0.7], [0.5, 0.5, 0.25, 0.25], strict=True)
    found = [reward.worth(s, cluster=c, baseline=0, config=config) for s, c in shares]
    assert found == pytest.approx([0, -0.4, 0.05, 0.05])
    assert reward.unusable(0.25, config) == -1.25
    assert [reward.in_band(s, (0.3, 0.8)) for s in (0.5, 0.9, 0.3, 0.7)] == [
        True,
        False,
        True,
        True,
    ]


def test_nothing_but_the_score_decides_what_a_proposal_is_worth() -> None:
    config = SynthesisConfig(duplicate=0.25, unsolved=0.5)
    known = {"cluster": 0.5, "baseline": 0.5, "config": config}
    assert reward.worth(0.5, **known) == 0.5
    assert reward.worth(0.5, duplicate=True, **known) == 0.25
    assert reward.worth(0.0, **known) == -1.0
    assert reward.unusable(0.5, config) == 0.0


def test_an_inherited_label_is_believed_from_two_right_answers_on() -> None:
    found = [reward.label_confidence(k) for k in range(4)]
    assert found == pytest.approx([0.055779, 0.428007, 0.904563, 0.991739], abs=1e-6)


@pytest.mark.parametrize(
    ("q", "eight", "sixteen"),
    [
        (0.3, 0.057968, 0.025674),
        (0.5, 0.363281, 0.401810),
        (0.6, 0.594086, 0.716063),
        (0.8, 0.943718, 0.992996),
    ],
)
def test_a_majority_is_confidently_wrong_where_few_answers_are_right(
    q: float, eight: float, sixteen: float
) -> None:
    found = [reward.majority_right(q, n) for n in (8, 16)]
    assert found == pytest.approx([eight, sixteen], abs=1e-6)


def test_a_consensus_is_more_than_half_of_all_answers_readable_or_not() -> None:
    assert label.majority(["7", "7", "7", "8"]) == ("7", 0.75)
    assert label.majority(["7", "7", "8", None]) == ("", 0.5)
    assert label.majority([None, None]) == ("", 0.0)
    assert label.majority(["8", "7", "8", "7"])[1] == 0.5


def test_both_ways_to_work_out_a_sum_agree_and_neither_labels_what_is_no_sum() -> None:
    for i in range(200):
        problem = draw(0, i, "train")
        assert label.arithmetic(problem.text) == label.by_columns(problem.text) == problem.answer
    assert label.by_columns("999+1?") == label.arithmetic("999+1?") == "1000"
    assert label.by_columns("0+00?") == label.arithmetic("0+00?") == "0"
    for text in ("12+?", "+1?", "12?", "1+2", "1+2?3", "", "1-2?", "٣+٤?"):
        assert label.arithmetic(text) is label.by_columns(text) is None


def test_a_second_opinion_that_writes_the_same_otherwise_is_no_other() -> None:
    for one, two in (
        ("42", "42.0"),
        ("42", "42\n"),
        ("1e2", "100"),
        ("x + 1", " x  + 1"),
        ("a", "a"),
        ("1/2", "0.50"),
        ("-6/4", "-3/2"),
        ("1,000", "1e3"),
        ("1e99999999", "1E+99999999"),
    ):
        assert label.same(one, two)
    for one, two in (
        ("42", "42.1"),
        ("4 2", "42"),
        ("nan", "inf"),
        ("yes", "no"),
        ("42", "x"),
        ("1/0", "0"),
    ):
        assert not label.same(one, two)


def test_a_sum_that_evaluations_ask_is_known_in_any_order() -> None:
    problem = draw(0, 3, "heldout").text
    turned = "+".join(reversed(problem.rstrip("?").split("+"))) + "?"
    assert label.is_heldout_sum(problem)
    assert label.is_heldout_sum(turned)
    assert not label.is_heldout_sum(draw(0, 3, "train").text)
    assert not label.is_heldout_sum("What is 1 and 2?")


def hear(labeller: Labeller, count: int) -> list[Opinion]:
    heard: list[Opinion] = []
    pause = threading.Event()
    while len(heard) < count:
        heard += labeller.hear()
        pause.wait(0.002)
    return heard


def fails(problem: str) -> str | None:
    if problem == "odd":
        return None
    raise ValueError("no idea")


NEVER = threading.Event()


def hangs(problem: str) -> str | None:
    NEVER.wait()
    return problem


def test_a_labeller_that_fails_or_cannot_tell_gives_no_label() -> None:
    labeller = Labeller("python:tests.test_synthesis:fails")
    labeller.ask("a", "even")
    labeller.ask("b", "odd")
    heard = {opinion.id: opinion for opinion in hear(labeller, 2)}
    assert (heard["a"].gold, heard["b"].gold) == ("", "")
    assert heard["a"].why == "verifier_error: the labeller failed: ValueError: no idea"
    assert "cannot tell" in heard["b"].why
    labeller.close()


def test_a_labeller_that_hangs_costs_its_own_labels_and_is_given_up() -> None:
    labeller = Labeller("python:tests.test_synthesis:hangs", deadline_s=0.02)
    for i in range(5):
        labeller.ask(str(i), "p")
    heard = hear(labeller, 5)
    assert [opinion.id for opinion in heard] == ["0", "1", "2", "3", "4"]
    assert not any(opinion.gold for opinion in heard)
    labeller.ask("5", "p")
    assert labeller.hear()[0].why == "verifier_error: the labeller hangs"
    NEVER.set()


def test_a_labeller_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"python:no\.such:thing.*cannot be loaded"):
        Labeller("python:no.such:thing")


def test_a_labeller_of_the_working_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a learner is started: without the working folder before what is installed (-P)."""
    (tmp_path / "my_labels.py").write_text("def label(problem): return problem[::-1]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    assert label.load("python:my_labels:label")("12") == "21"


def test_a_labellers_module_that_breaks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "our_broken_labels.py").write_text("def label(problem) return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="our_broken_labels:label' cannot be loaded: SyntaxError"):
        Labeller("python:our_broken_labels:label")


def test_a_problem_said_again_in_other_spaces_and_letters_is_the_same() -> None:
    one = fingerprint("How many Apples  does Anna have?")
    assert overlap(one, fingerprint("how many apples does anna have ?")) == 1.0
    assert not near(one, [fingerprint("How many pears has Bert eaten since yesterday?")])
    long = "Anna has three apples and buys four more at the market on Monday; how many has she"
    assert near(fingerprint(f"{long}?"), [fingerprint(f"{long} now?")])


def test_clusters_are_shares_of_all_that_are_alike() -> None:
    texts = ["a b c d e", "a b c d e", "a b c d f", "x y z"]
    assert clusters([fingerprint(text) for text in texts]) == [0.5, 0.5, 0.25, 0.25]
    assert clusters([]) == []


def test_a_statement_that_names_its_answer_leaks_unless_its_parent_did() -> None:
    assert leaks("Show that x is 42.", "42", "What is x?")
    assert not leaks("Is it 142 or 4.42?", "42", "What is x?")
    assert not leaks("Is 42 even?", "42", "Is 42 odd?")
    assert not leaks("7 + 5?", "7", "")
    assert asks_more("What is a? What is b?", "What is c?")
    assert in_other_letters("Сколько яблок у Анны?", "How many apples has Anna?")
    assert not in_other_letters("How many яблок?", "How many apples has Anna?")
    assert not in_other_letters("How many apples?", "3 + 4?")
    assert not in_other_letters("12+7?", "How many apples?")
    assert not asks_more("12+7?", "1+2?")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"label": "program_verified"}, "labeller is empty"),
        ({"labeller": "arithmetic"}, "labeller: label"),
        ({"auditor": "me"}, 'auditor = "me"'),
        (
            {"label": "program_verified", "labeller": "arithmetic", "auditor": "arithmetic"},
            "no second opinion",
        ),
        ({"extract": "(["}, "extract: no regular expression"),
        ({"extract": "abc"}, "extract: needs a group"),
        ({"prompt": "{solution}"}, "prompt: no {solution}"),
        ({"prompt": r"{response} in \boxed{}"}, "prompt: no {}"),
        ({"prompt": "{response:d}"}, "prompt: Unknown format code 'd'"),
        ({"prompt": "{stem}"}, "stem is empty"),
        ({"statement": "why?"}, "statement: needs a place"),
        ({"accept": (0.7, 0.3)}, "accept = "),
        ({"reward": "r_zero"}, 'reward = "r_zero"'),
    ],
)
def test_a_table_that_cannot_work_is_refused_by_its_field(
    fields: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        SynthesisConfig(**fields).check()  # type: ignore[arg-type]
    assert said in str(raised.value)


def test_the_pools_share_of_the_prompts_has_a_hard_cap() -> None:
    sections = {"learner": LearnerConfig}
    most = load("synthesis", sections, ["learner.synthesis.ratio=0.5"])["learner"]
    assert most.synthesis.ratio == 0.5
    with pytest.raises(ConfigError, match=r"ratio"):
        load("synthesis", sections, ["learner.synthesis.ratio=0.51"])


def test_a_scorer_that_knows_its_own_problems_only_is_refused_for_others() -> None:
    prompts = PromptsConfig(source="reasoning_gym", task="chain_sum", grader="reasoning_gym")
    LearnerConfig(prompts=prompts, synthesis=SynthesisConfig()).check()
    own = SynthesisConfig(label="consensus")
    with pytest.raises(ConfigError, match=r"synthesis\.label: reasoning_gym"):
        LearnerConfig(prompts=prompts, synthesis=own).check()
