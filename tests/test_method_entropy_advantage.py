"""Entropy advantage: golden numbers and the bounds of its weight."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from learner.config import LearnerConfig
from learner.loss import surrogate
from learner.methods.entropy_advantage import EntropyAdvantage
from tests.tables import PPO, golden, make_table, random_table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_golden_advantages_come_out(dtype: torch.dtype) -> None:
    t = make_table([-1.0] * 4, [1, -1, 0.4, -2], H=[0, 0.5, 2, 4], dtype=dtype)
    weight = EntropyAdvantage().weigh(t, t.main)
    golden(weight * t.advantage, "GV13.entropy-adv", dtype)


def test_the_weighted_loss_is_the_loss_of_the_shaped_advantage() -> None:
    t = random_table()
    shaped = t.advantage + (0.4 * t.H).minimum(t.advantage.abs() / 2)
    weight = EntropyAdvantage().weigh(t, t.main)
    plain = surrogate(t.logp, t.lp, t.lb, t.advantage, PPO)
    wanted = surrogate(t.logp, t.lp, t.lb, shaped, PPO)
    assert torch.allclose((weight * plain)[t.main], wanted[t.main])


@pytest.mark.parametrize("kappa", [1.01, 2.0, 10.0])
def test_the_sign_of_the_advantage_survives_any_entropy(kappa: float) -> None:
    t = replace(random_table(), H=torch.linspace(0, 1e6, 400).double())
    method = EntropyAdvantage(alpha=3.0, kappa=kappa)
    weight = method.weigh(t, t.main)
    assert (weight > 0).all()
    good, bad = t.main & (t.advantage > 0), t.main & (t.advantage < 0)
    assert (weight[good] >= 1).all()
    assert (weight[good] <= 1 + 1 / kappa).all()
    assert (weight[bad] <= 1).all()
    assert (weight[bad] >= 1 - 1 / kappa).all()


def test_an_advantage_of_zero_stays_zero_and_finite() -> None:
    t = make_table([-1.0] * 3, [0.0, 1e-300, -1e-300], H=2.0)
    weight = EntropyAdvantage().weigh(t, t.main)
    assert weight[0] == 1
    assert torch.isfinite(weight).all()


def test_kappa_must_be_above_one() -> None:
    rows = {"methods": [{"type": "entropy_advantage", "kappa": 1.0}]}
    with pytest.raises(msgspec.ValidationError, match="> 1"):
        msgspec.convert(rows, LearnerConfig)
