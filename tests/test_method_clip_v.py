"""Clip_V: golden numbers, the cap, and the sign of what is dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.methods.base import moments
from learner.methods.clip_v import ClipV
from learner.table import Table
from tests.tables import golden, make_table, random_table

DTYPES = [torch.float64, torch.float32]
LOGITS = [
    [2, 1, 0, -1],
    [0, 0, 0, 0],
    [5, 0, 0, 0],
    [3, 2.9, -2, -2],
    [1, 0.5, 0, -4],
    [0.2, 0.1, 0, -6],
]


def paper(dtype: torch.dtype = torch.float64) -> Table:
    """GV9"""
    l = torch.tensor(LOGITS, dtype=dtype).log_softmax(-1)  # noqa: E741
    p = l.exp()
    H = -(p * l).sum(-1)
    logp = l.gather(1, torch.tensor([3, 1, 0, 1, 3, 3])[:, None]).squeeze(1)
    N = (p**2 * (H[:, None] + l)).sum(-1)
    return make_table(logp, [-1, 1, -1, 1, -1, 1], H=H, N=N, dtype=dtype)


def capped() -> Table:
    """GV10: D as given, with q = 1 so that S = H and D = N - H."""
    d = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.05, 0.6, 0, -0.1, 0.02, 0.5], dtype=torch.float64)
    return make_table(torch.zeros(10), [-1, 1, -1, -1, 0, -1, 1, -1, 0, 0], H=0.0, N=d)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_statistics_and_masks_come_out(dtype: torch.dtype) -> None:
    t = paper(dtype)
    golden(t.H, "GV9.H", dtype)
    golden(t.logp.exp(), "GV9.p", dtype)
    golden(t.N, "GV9.N", dtype)
    golden(moments(t.N - t.S, t.main)[1], "GV9.stdD", dtype)
    for mu in (1, 2):
        keep = ~ClipV(mu=mu, max_frac=1.0).drop(t)
        golden(keep.double(), f"GV9.clipV mu{mu} nocap", dtype)


def test_the_golden_first_order_changes_come_out() -> None:
    t = paper()
    assert t.push is not None
    golden(-1e-3 * t.push * (t.S - t.N), "GV9.dH")


@pytest.mark.parametrize("cap", ["0.05", "0.2", "0.5"])
def test_the_golden_masks_under_a_cap_come_out(cap: str) -> None:
    t = capped()
    golden(moments(t.N - t.S, t.main)[1], "GV10.stdD")
    keep = ~ClipV(mu=1.0, max_frac=float(cap)).drop(t)
    golden(keep.double(), f"GV10.clipV cap {cap}")


def test_the_threshold_is_on_the_deviation_itself_not_on_its_distance_from_the_mean() -> None:
    t = capped()
    moved = replace(t, N=t.N - 0.5)  # same spread, lower mean
    assert int(ClipV(mu=1.0, max_frac=1.0).drop(t).sum()) == 5
    assert int(ClipV(mu=1.0, max_frac=1.0).drop(moved).sum()) == 1


def test_every_dropped_token_would_have_lowered_the_entropy() -> None:
    for seed in range(5):
        t = random_table(seed)
        assert t.push is not None
        dropped = ClipV(mu=0.5, max_frac=1.0).drop(t)
        assert dropped.any()
        assert (t.advantage[dropped] < 0).all()
        assert (t.push * (t.S - t.N))[dropped & ~t.stopped].min() > 0


def test_equal_deviations_are_capped_the_same_in_any_order() -> None:
    t = replace(capped(), N=torch.tensor([0.9] * 4 + [0.0] * 6).double())
    shuffled = t.take(torch.randperm(10, generator=torch.Generator().manual_seed(0)))
    method = ClipV(mu=1.0, max_frac=0.1)
    (one,) = t.position[method.drop(t)].tolist()
    assert shuffled.position[method.drop(shuffled)].tolist() == [one]


@pytest.mark.parametrize("sides", ["neg_low", "two_sided", "entropy_lowering"])
@pytest.mark.parametrize("cap", [0.02, 1.0])
def test_a_larger_mu_never_drops_more(sides: str, cap: float) -> None:
    t = random_table(3)
    counts = [
        int(ClipV(mu=mu / 4, max_frac=cap, sides=sides).drop(t).sum())  # type: ignore[arg-type]
        for mu in range(1, 20)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0


def test_the_other_sides_are_about_the_same_deviation() -> None:
    t = random_table()
    deviation, sigma = t.S - t.N, moments(t.N - t.S, t.main)[1]
    both = ClipV(mu=1.0, mu_plus=2.0, sides="two_sided", max_frac=1.0).drop(t)
    assert torch.equal(both, t.main & ((deviation < -sigma) | (deviation > 2 * sigma)))
    lowering = ClipV(mu=1.0, sides="entropy_lowering", max_frac=1.0).drop(t)
    assert torch.equal(lowering, t.main & (t.advantage.sign() * deviation > sigma))
    assert (t.advantage[lowering] > 0).any()
    capped = ClipV(mu=1.0, sides="entropy_lowering", max_frac=0.02).drop(t)
    assert int(capped.sum()) == int(0.02 * int(t.main.sum())) < int(lowering.sum())
    assert not (capped & ~lowering).any()


def test_deviations_that_are_all_alike_are_all_kept() -> None:
    t = random_table()
    assert not ClipV(mu=1e-3).drop(replace(t, N=t.S + 0.5)).any()
