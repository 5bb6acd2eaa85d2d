"""80/20: golden numbers and who is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.methods.base import quantile
from learner.methods.top_entropy import TopEntropy
from tests.tables import GOLDEN, golden, make_table, random_table

H = [0.01, 0.02, 0, 0.5, 1.2, 0.03, 0.7, 0.05, 2, 0.1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_golden_threshold_and_mask_come_out(dtype: torch.dtype) -> None:
    t = make_table([-1.0] * 10, 1.0, H=H, dtype=dtype)
    golden(quantile(t.H, 0.8), "GV13.8020 tau", dtype)
    golden((~TopEntropy().drop(t)).double(), "GV13.8020 mask", dtype)


def test_the_quantile_is_the_linear_one() -> None:
    values = torch.randn(37, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.0, 0.05, 0.5, 0.8, 0.999, 1.0):
        assert quantile(values, share) == pytest.approx(float(values.quantile(share)), abs=1e-12)
    assert quantile(values[:1], 0.8) == values[0]


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.99])
def test_the_share_asked_for_is_kept_and_it_is_the_top(keep: float) -> None:
    t = random_table(size=2000)
    dropped = TopEntropy(keep=keep).drop(t)
    kept = t.main & ~dropped
    assert int(kept.sum()) / int(t.main.sum()) == pytest.approx(keep, abs=2e-3)
    assert t.H[kept].min() > t.H[dropped].max()


def test_equal_entropies_are_all_kept() -> None:
    t = replace(random_table(), H=torch.full((400,), 0.3).double())
    assert not TopEntropy().drop(t).any()


def test_masked_tokens_enter_no_quantile() -> None:
    t = make_table([-1.0] * 12, 1.0, H=[*H, 50.0, 60.0], mask=[True] * 10 + [False] * 2)
    assert (~TopEntropy().drop(t))[:10].double().tolist() == GOLDEN["GV13.8020 mask"]
    nobody = make_table([-1.0] * 3, 1.0, H=1.0, mask=False)
    assert not TopEntropy().drop(nobody).any()


def test_the_paper_divides_by_the_tokens_kept() -> None:
    t = make_table([-1.0] * 10, 1.0, H=H)
    alive = t.main & ~TopEntropy().drop(t)
    assert TopEntropy().weigh(t, alive) is None
    factor = TopEntropy(denominator="kept").weigh(t, alive)
    assert factor is not None
    loss = torch.arange(10).double()
    assert float((loss * factor)[alive].sum() / 10) == pytest.approx(float(loss[alive].mean()))
