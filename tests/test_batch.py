import numpy as np
import pytest
import torch

from learner.batch import flatten, pack, split
from learner.item import Item
from learner.reward import reward
from tests.builders import make_group, make_rollout, make_segment, make_ticket


def two_groups() -> list[Item]:
    a = make_group([1, 0], ticket=4, tokens=[[5, 6], [7, 8, 9]], version=2)
    b = make_group([0, 1], ticket=9, tokens=[[10], [11, 12]], version=3)
    return [Item(make_ticket(4, prompt=[1, 2]), a), Item(make_ticket(9, prompt=[3]), b)]


def test_the_table_is_in_canonical_order_whatever_the_admission_order() -> None:
    forward, backward = flatten(two_groups(), 3), flatten(two_groups()[::-1], 3)
    assert forward.static.ticket.tolist() == [4, 4, 4, 4, 4, 9, 9, 9]
    assert forward.static.rollout.tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert forward.static.position.tolist() == [2, 3, 2, 3, 4, 1, 1, 2]
    for name in ("lb", "row", "group", "lag", "ticket", "rollout", "position"):
        assert torch.equal(getattr(forward.static, name), getattr(backward.static, name))
    assert np.array_equal(forward.ids, backward.ids)


def test_a_token_is_predicted_by_the_hidden_state_before_it_and_the_last_is_not_fed() -> None:
    batch = flatten(two_groups(), 3)
    assert batch.target.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.at.tolist() == [1, 2, 1, 2, 3, 0, 0, 1]
    assert batch.ids.tolist() == [1, 2, 5, 1, 2, 7, 8, 3, 3, 11]
    assert batch.lengths.tolist() == [3, 4, 1, 2]


def test_lag_counts_from_the_version_of_each_token_and_is_never_negative() -> None:
    segment = make_segment([5, 6, 7, 8], spans=((0, 1), (3, 6)))
    group = make_group([1], rollouts=(make_rollout(segments=(segment,)),))
    batch = flatten([Item(make_ticket(n=1), group)], 4)
    assert batch.static.lag.tolist() == [3, 3, 3, 0]
    assert batch.row_lag.tolist() == [3]


def test_tool_tokens_are_fed_but_have_no_line_and_masked_tokens_have_one_without_a_loss() -> None:
    segments = (
        make_segment([5, 6], mask=[1, 0]),
        make_segment([20, 21], role="tool"),
        make_segment([7], turn=1, temperature=0.5),
        make_segment([22], role="feedback", turn=1),
    )
    group = make_group([1], rollouts=(make_rollout(segments=segments),))
    batch = flatten([Item(make_ticket(prompt=[1], n=1), group)], 0)
    assert batch.target.tolist() == [5, 6, 7]
    assert batch.static.mask.tolist() == [True, False, True]
    assert batch.static.position.tolist() == [1, 2, 5]
    assert batch.static.temperature.tolist() == [1.0, 1.0, 0.5]
    assert batch.ids.tolist() == [1, 5, 6, 20, 21]
    assert batch.row_trained.tolist() == [2]


def test_aux_rows_come_last_and_are_scored_at_temperature_one() -> None:
    hot = (make_rollout(1, tokens=[5], temperature=1.2),)
    aux = Item(make_ticket(1, kind="aux", n=1), make_group([1], kind="aux", rollouts=hot))
    batch = flatten([aux, *two_groups()], 3)
    assert batch.static.aux.tolist() == [False] * 8 + [True]
    assert batch.static.temperature[-1] == 1.0
    assert (batch.main_groups, batch.rows, batch.main_rows) == (2, 5, 4)


def test_the_reward_is_the_sum_of_the_last_turns_parts_or_the_correctness() -> None:
    assert reward(make_rollout(1, parts=({"a": 9.0}, {"a": 0.5, "b": -0.25}))) == 0.25
    assert reward(make_rollout(1, parts=())) == 1.0


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_split_holds_every_row_once_under_the_budget_with_even_ranks(ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 200)
    shares = split(lengths, 1000, ranks)
    micros = [rows for share in shares for rows in share]
    assert sorted(np.concatenate(micros).tolist()) == list(range(200))
    assert all(lengths[rows].sum() <= 1000 for rows in micros)
    assert len({len(share) for share in shares}) == 1
    cost = [sum(int((lengths[rows] ** 2).sum()) for rows in share) for share in shares]
    assert max(cost) <= 1.1 * min(cost)


def test_a_row_longer_than_the_budget_travels_alone() -> None:
    (share,) = split(np.array([5000, 10, 20]), 100)
    assert sorted(rows.tolist() for rows in share) == [[0], [2, 1]]


def test_a_packed_micro_batch_keeps_sequences_apart_and_finds_its_lines() -> None:
    batch = flatten(two_groups(), 3)
    micro = pack(batch, np.array([1, 3]))
    assert micro.ids.tolist() == [[3, 11, 1, 2, 7, 8]]
    assert micro.positions.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert micro.packing.starts.tolist() == [0, 2, 6]
    assert micro.tokens.tolist() == [6, 7, 2, 3, 4]
    assert micro.at.tolist() == [0, 1, 3, 4, 5]
    assert micro.target.tolist() == [11, 12, 7, 8, 9]


def test_a_groups_prompt_is_fed_once_and_every_row_finds_it() -> None:
    batch = flatten(two_groups(), 3)
    micro = pack(batch, np.arange(4))
    # rows by length: [3], [3 11], [1 2 5], [1 2 7 8]
    assert micro.ids.tolist() == [[3, 11, 1, 2, 5, 7, 8]]
    assert micro.positions.tolist() == [[0, 1, 0, 1, 2, 2, 3]]
    assert micro.target.tolist() == [10, 11, 12, 5, 6, 7, 8, 9]
    assert micro.at.tolist() == [0, 0, 1, 3, 4, 3, 5, 6]
    assert micro.packing.echoes[1].tolist() == [0, 2, 3]
    assert pack(batch, np.arange(4), share=False).ids.numel() == batch.ids.size


def test_small_groups_travel_together_and_large_ones_do_not() -> None:
    lengths = np.full(64, 10)
    group = np.repeat(np.arange(8), 8)
    (together,) = split(lengths, 320, 1, group)
    assert all((np.bincount(group[rows])[group[rows]] == 8).all() for rows in together)
    (apart,) = split(lengths, 100, 1, group)
    assert sorted(np.concatenate(apart).tolist()) == list(range(64))
    assert all(lengths[rows].sum() <= 100 for rows in apart)
