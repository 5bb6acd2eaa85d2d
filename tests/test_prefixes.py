"""Where choices lead: prefixes that answers share, the entropy ahead, and what is lost already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.methods.prefixes import entropy_ahead, lost, prefixes
from tests.tables import four_answers, two_answers


def test_answers_share_the_prefixes_up_to_where_they_part() -> None:
    at = prefixes(four_answers()).tolist()
    first, second, third, alone = at[0], at[1], at[2], at[8:10]
    assert at == [first, second, third, first, second, third, first, second, *alone, first]
    assert len({first, second, third, *alone}) == 5
    two = replace(four_answers(), group=torch.tensor([0] * 6 + [1] * 5))
    assert prefixes(two)[0] != prefixes(two)[6]


def test_a_choice_is_worth_the_entropy_that_follows_above_the_mean_and_the_others() -> None:
    t = four_answers()
    h = float(t.H.mean())
    led = torch.tensor([0 - 2 * h, 2 - 2 * h, 4 - 3 * h, 0.0]).double()  # of the first tokens
    ahead = entropy_ahead(t, prefixes(t))
    assert torch.allclose(ahead[[0, 3, 6, 10]], led - led.mean())
    led = torch.tensor([-h, 2 - h, 4 - 2 * h]).double()  # of the second ones
    assert torch.allclose(ahead[[1, 4, 7]], led - led.mean())
    assert ahead[[2, 5]].tolist() == [0, 0]  # both end here
    assert ahead[[8, 9]].tolist() == [0, 0]  # alone at their prefixes


def test_what_follows_is_the_derivative_of_the_mean_entropy_by_a_choice() -> None:
    t, tiny = four_answers(), 1e-6
    share = torch.ones(4, dtype=torch.float64)
    share[0] += tiny  # answer 0 is a little more frequent
    share = share / share.mean()

    def mean_entropy(weight: Tensor) -> Tensor:
        each = weight[t.row]
        return (each * t.H.double()).sum() / each.sum()

    moved = (mean_entropy(share) - mean_entropy(torch.ones(4).double())) / tiny
    whole = entropy_ahead(t, prefixes(t))[0] / len(t.H)
    assert float(moved) == pytest.approx(float(whole), abs=1e-5)


def test_tokens_are_lost_once_no_answer_that_came_this_far_is_right() -> None:
    t = two_answers()
    assert lost(t, prefixes(t)).tolist() == [False] * 5 + [True] * 2
    masked = replace(t, mask=torch.arange(7) != 5)
    assert lost(masked, prefixes(masked)).tolist() == [False] * 6 + [True]
    alike = replace(t, advantage=torch.zeros(7))  # all right, or all wrong: nobody knows
    assert not lost(alike, prefixes(alike)).any()
