"""ADORA: the published examples, the edge cases, and what a factor a group promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common import recipe
from common.errors import DataError
from common.wire import Group
from learner.advantage import advantages
from learner.methods.adora import Adora
from tests.builders import make_group, make_rollout
from tests.test_methods import bits, train

REPO = Adora(preset="llm_repo")


def group(correct: Sequence[float], lengths: Sequence[int], cut: Sequence[int] = ()) -> Group:
    """`cut`: numbers of the rollouts that ended at max_tokens."""
    rollouts = tuple(
        make_rollout(float(c), tokens=[5] * n, finish="length" if i in cut else "stop")
        for i, (c, n) in enumerate(zip(correct, lengths, strict=True))
    )
    return make_group(correct, rollouts=rollouts)


def weighed(method: Adora, one: Group, reward: Sequence[float], estimator: str = "grpo") -> Any:
    rewards = np.array(reward, np.float64)
    return method.factor(one) * advantages(rewards, np.zeros(len(rewards), int), estimator)


G1_ADVANTAGE = np.array([1.095445, -0.730296, 1.095445, -0.730296, -0.730296])


@pytest.mark.parametrize(
    ("lengths", "cut", "factor"),
    [
        ([300, 500, 420, 700, 600], None, 0.1),
        ([300, 500, 820, 700, 600], None, 1.0),
        ([300, 500, 600, 700, 600], None, 0.1),  # a tie is no advantage
        ([300, 500, 420, 700, 600], 550, 0.1),
    ],
)
def test_the_published_length_examples_come_out(
    lengths: list[int], cut: int | None, factor: float
) -> None:
    method = Adora(preset="llm_repo", length_cut=cut)
    found = weighed(method, group([1, 0, 1, 0, 0], lengths), [3, -0.5, 3, -0.5, -0.5])
    np.testing.assert_allclose(found, factor * G1_ADVANTAGE, atol=1e-5)


def test_where_every_failure_is_cut_the_published_codes_disagree() -> None:
    lengths = [300, 500, 420, 700, 600]
    factors = [
        Adora(preset="llm_repo", length_cut=400, empty_failures=how).factor(
            group([1, 0, 1, 0, 0], lengths)
        )
        for how in ("neutral", "as_llm_repo", "as_vlm_repo")
    ]
    assert factors == [1.0, 1.0, 0.1]


def test_the_factor_comes_after_the_groups_normalisation_which_would_cancel_it() -> None:
    one = group([1, 0, 1, 0, 0], [300, 500, 420, 700, 600])
    rewards = np.array([3, -0.5, 3, -0.5, -0.5])
    before = advantages(0.1 * rewards, np.zeros(5, int), "grpo")
    np.testing.assert_allclose(before[:2], [1.095439, -0.730293], atol=1e-6)
    np.testing.assert_allclose(weighed(REPO, one, rewards)[0], 0.109544, atol=1e-6)
    pair = [group([1, 0, 1, 0], [9, 3, 3, 3]), group([1, 1, 1, 0], [3, 3, 3, 9])]
    found = np.concatenate([weighed(REPO, g, [r.correct for r in g.rollouts]) for g in pair])
    wanted = [0.866024, -0.866024, 0.866024, -0.866024, 0.05, 0.05, 0.05, -0.15]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_more_reward_levels_change_the_advantage_not_the_factor() -> None:
    found = weighed(REPO, group([1, 0, 0, 0], [900, 400, 800, 1200]), [3, -0.5, -1, -3])
    np.testing.assert_allclose(found, [1.352255, -0.050084, -0.250418, -1.051754], atol=1e-5)


def test_the_paper_preset_for_language_wants_length_and_difficulty() -> None:
    lengths = [300, 500, 820, 700, 600]
    hard = weighed(Adora(), group([1, 0, 1, 0, 0], lengths), [1, 0, 1, 0, 0])
    wanted = [2.190886, -1.460591, 2.190886, -1.460591, -1.460591]
    np.testing.assert_allclose(hard, wanted, atol=1e-4)
    easy = weighed(Adora(), group([1, 1, 1, 0, 0], lengths), [1, 1, 1, 0, 0])
    np.testing.assert_allclose(easy, [0.730295] * 3 + [-1.095443] * 2, atol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("grpo", [0.120326, -0.064003, -0.084485, 0.120326, -0.064003, 0.120326, -0.084485]),
        ("rloo", [0.067143, -0.035714, -0.047143, 0.067143, -0.035714, 0.067143, -0.047143]),
        ("dr_grpo", [0.058750, -0.031250, -0.041250, 0.058750, -0.031250, 0.058750, -0.041250]),
    ],
)
def test_the_vision_example_comes_out_after_every_estimator(
    estimator: str, wanted: list[float]
) -> None:
    right, lengths = [1, 0, 0, 1, 0, 1, 0, 0], [210, 350, 4096, 260, 400, 330, 500, 310]
    rewards = [1, 0.1, 0, 1, 0.1, 1, 0, 0.1]
    method = Adora(preset="vlm_attenuate", length_cut=4094)
    found = weighed(method, group(right, lengths), rewards, estimator)
    np.testing.assert_allclose(found[:7], wanted, atol=1e-5)
    longer = group(right, [*lengths[:5], 430, *lengths[6:]])
    np.testing.assert_allclose(weighed(method, longer, rewards, estimator), 10 * found, rtol=1e-6)


EDGE = {
    "no success": ([0, 0, 0], [3, 4, 5], ()),
    "all success": ([1, 1, 1], [3, 4, 5], ()),
    "every failure cut": ([1, 0, 0], [3, 4, 5], (1, 2)),
    "tie": ([1, 0, 0], [4, 3, 5], ()),
    "all failed and cut": ([0, 0, 0], [3, 4, 5], (0, 1, 2)),
}


@pytest.mark.parametrize(
    ("how", "factors"),
    [
        ("neutral", [1.0, 1.0, 1.0, 0.1, 1.0]),
        ("as_llm_repo", [0.1, 1.0, 1.0, 0.1, 0.1]),
        ("as_vlm_repo", [1.0, 0.1, 0.1, 0.1, 1.0]),
    ],
)
def test_without_evidence_the_factor_is_one_or_as_a_published_code_has_it(
    how: Any, factors: list[float]
) -> None:
    method = Adora(preset="llm_repo", empty_failures=how)
    assert [method.factor(group(*case)) for case in EDGE.values()] == factors


@pytest.mark.parametrize(
    ("criteria", "hard_short", "easy_long"),
    [("length", 0.5, 3.0), ("difficulty", 3.0, 0.5), ("and", 0.5, 0.5), ("or", 3.0, 3.0)],
)
def test_the_criteria_are_length_difficulty_both_or_either(
    criteria: Any, hard_short: float, easy_long: float
) -> None:
    method = Adora(criteria=criteria, w_tas=3.0, w_tds=0.5)
    assert method.factor(group([1, 0, 0], [3, 9, 9])) == hard_short
    assert method.factor(group([1, 1, 0], [9, 9, 3])) == easy_long


def test_a_correctness_that_is_no_number_is_refused_with_its_ticket_and_rollout() -> None:
    broken = group([1, float("nan"), 0, 0], [5, 5, 5, 5])
    line = f"method 'adora', correct: nan of rollout 1 of ticket {broken.ticket}"
    for criteria in ("length", "difficulty"):
        with pytest.raises(DataError, match=line):
            Adora(criteria=criteria).scale_groups([broken])  # type: ignore[arg-type]


def test_lengths_count_only_among_themselves_and_groups_do_not_see_each_other() -> None:
    one, other = group([1, 0, 1], [6, 3, 8]), group([1, 0, 0], [2, 9, 9])
    found = REPO.scale_groups([one, other])
    assert found.tolist() == [1.0, 0.1]
    assert REPO.scale_groups([other, one]).tolist() == [0.1, 1.0]
    assert REPO.factor(group([1, 0, 1], [60, 30, 80])) == REPO.factor(one)
    assert REPO.factor(group([1, 1, 0], [8, 6, 3])) == REPO.factor(one)


def test_the_mean_factor_can_be_normalised_so_that_the_step_size_stays() -> None:
    groups = [group([1, 0, 1], [6, 3, 8]), group([1, 0, 0], [2, 9, 9])]
    method = Adora(preset="llm_repo", normalize_mean_weight=True)
    assert method.scale_groups(groups).mean() == pytest.approx(1.0)
    found = method.scale_groups(groups)
    assert found[0] / found[1] == pytest.approx(10.0)


def test_equal_weights_of_one_are_the_empty_list_bit_for_bit() -> None:
    plain = bits(train([])[0])
    assert bits(train([Adora(w_tas=1.0, w_tds=1.0)])[0]) == plain
    assert Adora(w_tas=1.0).neutral  # llm_amplify's other weight is 1
    assert bits(train([REPO])[0]) != plain


def test_the_presets_are_those_of_paper_and_code() -> None:
    assert Adora().weights == (2.0, 1.0)
    assert Adora(preset="vlm_attenuate").weights == (1.0, 0.1) == REPO.weights
    assert Adora(preset="llm_repo", w_tds=0.3).weights == (1.0, 0.3)
    (of_recipe,) = recipe.load_all("adora")["learner"].methods  # type: ignore[attr-defined]
    assert of_recipe == Adora()


def test_the_log_has_the_share_of_groups_with_the_advantage_and_how_long_both_sorts_are() -> None:
    tas = group([1, 0, 0, 0], [9, 3, 3, 3])
    tds = group([1, 1, 1, 0], [3, 3, 3, 9])
    neither = group([1, 1], [7, 7])
    assert REPO.group_numbers([tas, tas, tds, neither]) == {
        "tas": 0.5,
        "tas_length": 4.5,
        "tds_length": 4.5,
    }
    assert REPO.group_numbers([tds]) == {"tas": 0.0, "tds_length": 4.5}
    assert REPO.group_numbers([]) == {"tas": 0.0}
    metrics = train([REPO])[1].metrics
    assert 0 <= metrics["methods/adora/tas"] <= 1
