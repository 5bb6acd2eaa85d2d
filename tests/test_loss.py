from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from learner.config import LearnerConfig
from learner.loss import clipped, correction, ratio, scale, surrogate
from tests.tables import golden

# The vectors GV14 of the entropy-control literature notes; see tests/golden/entropy.json
L = torch.tensor([-1.0, -0.5, -2.0, -0.2], dtype=torch.float64)
LP = torch.tensor([-1.1, -0.5, -1.8, -0.25], dtype=torch.float64)
LB = torch.tensor([-1.0, -1.4, -1.7, -0.25], dtype=torch.float64)
A = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64)


def token_losses(**fields: Any) -> Tensor:
    return surrogate(L, LP, LB, A, LearnerConfig(**fields))


def close(found: Tensor, wanted: Any) -> bool:
    return torch.allclose(found, torch.tensor(wanted, dtype=found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_golden_ratios_and_losses_come_out(dtype: torch.dtype) -> None:
    l, lp, lb, a = (x.to(dtype) for x in (L, LP, LB, A))  # noqa: E741

    def losses(**fields: Any) -> Tensor:
        return surrogate(l, lp, lb, a, LearnerConfig(**{"loss": "decoupled_ppo", **fields}))

    golden(ratio(l, lp), "GV14.r", dtype)
    golden(losses(), "GV14.ppo", dtype)
    capped = losses(correction="truncate")
    golden(capped, "GV14.TIS", dtype)
    golden(capped.mean(), "GV14.TIS mean", dtype)
    golden(losses(correction="mask").mean(), "GV14.MIS mean", dtype)
    wide = LearnerConfig(loss="decoupled_ppo", correction="truncate", correction_high=99.0)
    golden(correction(lp, lb, wide), "GV14.w", dtype)
    golden(losses(loss="ppo"), "GV14.bypass", dtype)  # the behaviour policy is "old"


def test_reinforce_is_the_weighted_log_probability() -> None:
    assert torch.equal(token_losses(loss="reinforce"), -A * L)
    capped = token_losses(loss="reinforce", correction="truncate", correction_high=1.0)
    assert torch.allclose(capped, -(LP - LB).exp().clamp(max=1) * A * L)


def test_the_decoupled_loss_matches_the_published_example() -> None:
    config = LearnerConfig(
        loss="decoupled_ppo", clip_high=0.2, correction="truncate", correction_high=5.0
    )
    point = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -1.2, -1.5)]
    for advantage, objective in ((0.8, 1.295864), (-0.8, -1.318977)):
        loss = surrogate(*point, torch.tensor([advantage]), config)
        assert close(-loss, [objective])


def test_each_side_of_the_clip_can_be_left_open_and_the_dual_clip_bounds_bad_tokens() -> None:
    l, old = torch.tensor([1.0, -1.0, 3.0]), torch.zeros(3)  # noqa: E741
    advantage = torch.tensor([1.0, -1.0, -1.0])

    def loss(**fields: Any) -> Tensor:
        return surrogate(l, old, old, advantage, LearnerConfig(**fields))

    open_top = loss(clip_high=None)
    assert close(open_top[:2], [-(torch.e), 0.8])
    open_bottom = loss(clip_low=None)
    assert close(open_bottom[:2], [-1.28, torch.e**-1])
    assert close(loss(clip_low=None, clip_high=None), [-torch.e, torch.e**-1, torch.e**3])
    assert close(loss(dual_clip=3.0)[2], 3.0)


def test_a_clipped_token_is_one_without_a_gradient() -> None:
    l = torch.tensor([0.5, -0.5, 0.5, -0.5, 2.0, 0.0], requires_grad=True)  # noqa: E741
    advantage = torch.tensor([1.0, 1, -1, -1, -1, 1])
    config = LearnerConfig(dual_clip=3.0)
    zero = torch.zeros(6)
    (c,) = torch.autograd.grad(surrogate(l, zero, zero, advantage, config).sum(), l)
    assert clipped(l.detach().exp(), advantage, config).tolist() == (c == 0).tolist()
    assert (c == 0).tolist() == [True, False, False, True, True, False]


def test_the_gradient_by_the_log_probability_is_minus_w_r_a_of_the_alive() -> None:
    l = L.clone().requires_grad_()  # noqa: E741
    config = LearnerConfig(loss="decoupled_ppo", correction="truncate", clip_high=0.1)
    (c,) = torch.autograd.grad(surrogate(l, LP, LB, A, config).sum(), l)
    r, w = (L - LP).exp(), (LP - LB).exp().clamp(max=2.0)
    alive = torch.tensor([0.0, 1, 1, 1])  # the first is above 1.1
    assert torch.allclose(c, -w * r * A * alive)


LOSSES = torch.tensor([0.5, 1, 1, 2, 3, 4, 10])
ROW = torch.tensor([0, 0, 1, 1, 1, 1, 2])


@pytest.mark.parametrize(
    ("how", "total"),
    [("token_mean", 3.071429), ("seq_mean", 4.416667), ("constant", 0.895833)],
)
def test_the_three_aggregations_give_the_published_totals(how: Any, total: float) -> None:
    everything = torch.ones(7, dtype=torch.bool)
    assert close((scale(everything, ROW, how, 8) * LOSSES).sum(), total)


@pytest.mark.parametrize("how", ["token_mean", "seq_mean", "constant"])
def test_masked_tokens_and_empty_rollouts_count_for_nothing(how: Any) -> None:
    mask = torch.tensor([True, True, True, True, False, False, False])
    rest = scale(mask, ROW, how, 8)
    assert (rest[4:] == 0).all()
    short = scale(mask[:4], ROW[:4], how, 8)
    assert torch.allclose(rest[:4], short)
    nothing = scale(torch.zeros(7, dtype=torch.bool), ROW, how, 8)
    assert (nothing * LOSSES).sum() == 0


def test_a_huge_ratio_stays_finite() -> None:
    l, old = torch.tensor([0.0], requires_grad=True), torch.tensor([-1e4])  # noqa: E741
    loss = surrogate(l, old, old, torch.tensor([-1.0]), LearnerConfig())
    assert torch.isfinite(loss).all()


def test_a_correction_on_top_of_ppo_is_refused() -> None:
    with pytest.raises(ConfigError, match="decoupled_ppo"):
        LearnerConfig(correction="truncate").check()
