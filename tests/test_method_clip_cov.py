"""Clip-Cov: golden numbers, who is a candidate, and how many go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from learner.loss import surrogate
from learner.methods.clip_cov import ClipCov
from learner.table import Table
from tests.tables import GOLDEN, PPO, golden, make_table, random_table, with_surrogate

DTYPES = [torch.float64, torch.float32]
LP = [-0.02, -0.12, -0.5, -1.4, -3.1, -5.8, -0.03, -0.3]
L = [-0.01, -0.1, -0.55, -1.5, -3, -6, -0.02, -0.3]
A = [1, 1, -1, -1, 1, -1, -1, 1]
MASK = [True] * 7 + [False]


def paper(dtype: torch.dtype = torch.float64) -> Table:
    """GV7"""
    return make_table(L, A, lp=LP, mask=MASK, dtype=dtype)


def candidates(table: Table, method: ClipCov | None = None) -> Tensor:
    return (method or ClipCov()).candidates(table, table.main)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_covariances_and_candidates_come_out(dtype: torch.dtype) -> None:
    t = paper(dtype)
    golden(ClipCov().covariance(t, t.main)[t.main], "GV7.C", dtype)
    golden((t.logp - t.lp).exp()[t.main], "GV7.ratio", dtype)
    golden(candidates(t).double(), "GV7.candidates", dtype)
    assert not t.stopped[t.main].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_loss_of_every_possible_draw_comes_out(dtype: torch.dtype) -> None:
    t = paper(dtype)
    base = surrogate(t.logp, t.lp, t.lb, t.advantage, PPO)
    golden(base[t.main].mean(), "GV7.ppo", dtype)
    seen = set()
    for step in range(40):
        dropped = ClipCov().drop(replace(t, when=(0, step, 0)))
        (index,) = dropped.nonzero().squeeze(1).tolist()  # max(1, ⌊2e-4 · 7⌋) of three
        # dropped tokens stay in the denominator
        golden((base * ~dropped)[t.main].sum() / 7, f"GV7.clipcov.drop{index}", dtype)
        seen.add(index)
    assert seen == {0, 1, 5}


def test_the_covariances_add_up_to_the_batch_covariance() -> None:
    t = random_table()
    own = ClipCov().covariance(t, t.main)[t.main].mean()
    whole = torch.stack([t.logp[t.main], t.advantage[t.main]])
    assert own == pytest.approx(float(torch.cov(whole, correction=0)[0, 1]))


def test_adding_a_constant_to_log_probs_or_advantages_changes_no_covariance() -> None:
    t = random_table()
    c = ClipCov().covariance(t, t.main)
    for moved in (replace(t, logp=t.logp - 3), replace(t, advantage=t.advantage + 2)):
        assert torch.allclose(ClipCov().covariance(moved, t.main)[t.main], c[t.main])


def test_the_window_is_open_at_both_ends() -> None:
    t = paper()
    c = ClipCov().covariance(t, t.main)
    at = ClipCov(low=float(c[1]), high=float(c[5]))
    assert candidates(t, at).nonzero().squeeze(1).tolist() == [0]
    wider = ClipCov(low=float(c[1]) - 1e-9, high=float(c[5]) + 1e-9)
    assert candidates(t, wider).nonzero().squeeze(1).tolist() == [0, 1, 5]


def test_what_the_clip_stops_is_no_candidate() -> None:
    t = paper()
    moved = replace(t, lp=t.lp + torch.tensor([0, -0.3, 0, 0, 0, 0.3, 0, 0]).double())
    moved = with_surrogate(moved)  # token 1 now has r > 1.28 and A > 0, token 5 r < 0.8 and A < 0
    assert moved.stopped.nonzero().squeeze(1).tolist() == [1, 5]
    assert candidates(moved).nonzero().squeeze(1).tolist() == [0]


def test_equal_advantages_leave_nobody_to_drop() -> None:
    t = with_surrogate(replace(random_table(), advantage=torch.ones(400).double()))
    assert not ClipCov(ratio=1.0).drop(t).any()


def test_the_number_dropped_is_the_ratio_but_at_least_one() -> None:
    t = random_table(size=4000)
    tokens, allowed = int(t.main.sum()), candidates(t)
    for ratio, n in ((1e-9, 1), (1e-3, int(1e-3 * tokens)), (1.0, int(allowed.sum()))):
        dropped = ClipCov(ratio=ratio).drop(t)
        assert int(dropped.sum()) == n
        assert not (dropped & ~allowed).any()
    assert n < tokens


def test_micro_scope_has_its_own_means_and_its_own_one_token() -> None:
    t = random_table(size=400)  # 80 rollouts of 5 tokens
    own = ClipCov(scope="micro", micro_rollouts=40, low=0.1)
    for half in (t.row < 40, t.row >= 40):
        on = t.main & half
        assert int((own.drop(t) & on).sum()) == 1
        assert not (own.drop(t) & on & ~own.candidates(t, on)).any()
    assert int(ClipCov(low=0.1).drop(t).sum()) == 1


def test_the_released_preset_is_micro_scope() -> None:
    t = random_table()
    released, named = ClipCov(preset="released", low=0.1), ClipCov(scope="micro", low=0.1)
    assert torch.equal(released.drop(t), named.drop(t))
    assert not torch.equal(released.drop(t), ClipCov(low=0.1).drop(t))
    assert torch.equal(ClipCov(preset="released", scope="minibatch").drop(t), ClipCov().drop(t))


def test_masked_tokens_enter_no_mean() -> None:
    assert GOLDEN["GV7.mean[l,A]"] == pytest.approx([sum(L[:7]) / 7, sum(A[:7]) / 7], rel=1e-5)
    wild = make_table([*L[:7], -50.0], [*A[:7], 99.0], lp=[*LP[:7], -50.0], mask=MASK)
    assert torch.equal(candidates(wild), candidates(paper()))


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip_cov\.low = 5 is not below high = 5"):
        ClipCov(low=5.0).check()
