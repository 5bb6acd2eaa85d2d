"""Random drop, the control: as many tokens as asked for, of the sign asked for, any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.methods.random_drop import RandomDrop
from tests.tables import make_table, random_table


@pytest.mark.parametrize(("of", "sign"), [("positive", 1), ("negative", -1)])
@pytest.mark.parametrize("ratio", [1e-9, 0.02, 0.3])
def test_so_many_tokens_of_the_sign_are_dropped(of: str, sign: int, ratio: float) -> None:
    t = random_table(size=1000)
    dropped = RandomDrop(ratio=ratio, advantage=of).drop(t)  # type: ignore[arg-type]
    assert int(dropped.sum()) == max(1, int(ratio * int(t.main.sum())))
    assert (t.advantage[dropped].sign() == sign).all()
    assert not (dropped & (t.stopped | ~t.main)).any()


def test_a_ratio_above_what_there_is_drops_all_of_them() -> None:
    t = random_table()
    everyone = t.main & ~t.stopped & (t.advantage != 0)
    assert torch.equal(RandomDrop(ratio=1.0, advantage="any").drop(t), everyone)
    assert not RandomDrop().drop(make_table([-1.0, -2.0], [-1.0, 0.0])).any()


def test_every_step_draws_anew_and_all_tokens_have_their_turn() -> None:
    t = random_table(size=100)
    times = torch.zeros(100)
    for step in range(300):
        times += RandomDrop(ratio=0.1).drop(replace(t, when=(0, step, 0)))
    can = t.main & ~t.stopped & (t.advantage > 0)
    assert (times[~can] == 0).all()
    expected = 300 * int(0.1 * int(t.main.sum())) / int(can.sum())
    assert ((times[can] - expected).abs() < 6 * expected**0.5).all()
