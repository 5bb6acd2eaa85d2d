"""STEER: golden numbers, and what the paper's weights promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from learner.config import LearnerConfig
from learner.loss import surrogate
from learner.methods.steer import Steer
from learner.table import Table
from tests.tables import GOLDEN, PPO, golden, make_table, random_table, with_surrogate

DTYPES = [torch.float64, torch.float32]
Q = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
H = [2, 1.5, 1, 0.5, 0.2]


def on_policy(dtype: torch.dtype = torch.float64) -> Table:
    """GV5"""
    return make_table(Q.log(), [1, -1, 2, -0.5, 1], H=H, dtype=dtype)


def clip_active(dtype: torch.dtype = torch.float64) -> Table:
    """GV6"""
    r = torch.tensor([1, 1.3, 0.75, 1.1, 1.35], dtype=torch.float64)
    return make_table(Q.log(), [1, 1, -1, -0.5, -1], lp=Q.log() - r.log(), H=H, dtype=dtype)


def weights(table: Table, **knobs: Any) -> Tensor:
    return Steer(**knobs).weigh(table, table.main)


# ---- golden numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_weights_come_out(dtype: torch.dtype) -> None:
    t = on_policy(dtype)
    golden(Steer().omega(t), "GV5.omega", dtype)
    golden(Steer(form="released").omega(t).abs(), "GV5.released", dtype)
    golden(weights(t), "GV5.w.7", dtype)
    golden(weights(t, lambda_min=0.8), "GV5.w.8", dtype)
    golden(weights(t, form="released"), "GV5.w_rel.8", dtype)
    golden(weights(t, form="released", lambda_min=0.7), "GV5.w_rel.7", dtype)
    golden(weights(t, form="released", map="linear"), "GV5.linear released", dtype)
    golden(weights(t, map="linear", lambda_min=0.8, lambda_max=1.2), "GV5.linear theorem", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_weights_under_an_active_clip_come_out(dtype: torch.dtype) -> None:
    t = clip_active(dtype)
    golden(Steer().omega(t), "GV6.omega", dtype)
    golden(weights(t), "GV6.w", dtype)
    golden(Steer(form="released").omega(t).abs(), "GV6.released metric", dtype)
    golden(weights(t, form="released"), "GV6.released w.8", dtype)
    base = surrogate(t.logp, t.lp, t.lb, t.advantage, PPO)
    golden(base, "GV6.base", dtype)
    golden(torch.stack([base.mean(), (weights(t) * base).mean()]), "GV6.loss[unw,w]", dtype)
    golden((weights(t, form="released") * base).mean(), "GV6.released loss", dtype)


def test_the_floor_of_the_released_code_keeps_small_predictions_harmless() -> None:
    # one token a rollout with q (1-q) (ln q + H) = f: advantages that make |Ω| 0.001 and 0.01
    t = make_table([-1.0, -1.0], [1.0, 1.0], H=2.0)
    f = float(Steer(form="released").omega(t)[0].abs())
    t = make_table([-1.0, -1.0], [0.001 / f, 0.01 / f], H=2.0)
    golden(weights(t, form="released"), "GV5.floor")
    assert float(weights(t)[1]) == 0.7  # the theorem form has no floor


# ---- invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["theorem", "released", "centred"])
@pytest.mark.parametrize("map", ["exp", "linear", "asymmetric"])
def test_weights_stay_in_their_bounds_and_the_extreme_token_has_exactly_the_smallest(
    form: Any, map: Any
) -> None:
    for seed in range(5):
        t = random_table(seed, dtype=torch.float32)
        steer = Steer(form=form, map=map, floor=0.0)
        low, high = steer.bounds
        w = steer.weigh(t, t.main)
        counted = t.main if form == "released" else t.main & ~t.stopped
        assert (w[counted] >= torch.tensor(low)).all()
        assert (w[counted] <= torch.tensor(high)).all()
        assert (w[~counted] == 1).all()
        omega = steer.omega(t).masked_fill(~counted, 0 if map != "asymmetric" else 1e9)
        extreme = omega.argmin() if map == "asymmetric" else omega.abs().argmax()
        assert w[extreme] == torch.tensor(low)


def test_the_order_of_the_weights_is_the_reverse_of_the_order_of_the_predictions() -> None:
    t = random_table()
    counted = t.main & ~t.stopped
    for knobs in ({}, {"form": "centred"}, {"map": "linear"}):
        steer = Steer(**knobs)
        size = steer.omega(t)[counted].abs()
        w = steer.weigh(t, t.main)[counted][size.argsort()]
        assert (w.diff() <= 0).all()


def test_the_asymmetric_map_spares_what_raises_the_entropy() -> None:
    t = random_table()
    w, omega = weights(t, map="asymmetric", form="centred"), Steer(form="centred").omega(t)
    counted = t.main & ~t.stopped
    assert (w[counted][omega[counted].argsort()].diff() >= 0).all()
    # the sign is that of the exact first-order change, c = -push
    assert torch.equal(omega, -t.push * (t.S - t.N))  # type: ignore[operator]


def test_nothing_to_learn_or_nothing_to_lose_leaves_all_weights_at_one() -> None:
    still = with_surrogate(replace(random_table(), advantage=torch.zeros(400).double()))
    assert (weights(still) == 1).all()
    log_v = torch.full((6,), 12.0).double().log()
    uniform = make_table(-log_v, [1.0, -1, 2, -2, 1, 1], H=log_v)
    assert (weights(uniform) == 1).all()
    assert (weights(uniform, form="centred") == 1).all()


def test_a_clipped_token_has_weight_one_and_does_not_move_the_others() -> None:
    t = clip_active()
    w = weights(t)
    assert w[1] == w[2] == 1
    # the same tokens with advantages a thousand times as large, still clipped
    louder = with_surrogate(
        replace(t, advantage=t.advantage * torch.tensor([1, 1000, 1000, 1, 1]).double())
    )
    assert torch.equal(weights(louder), w)
    # the released code counts them
    assert not torch.allclose(weights(louder, form="released"), weights(t, form="released"))


def test_a_token_without_importance_weight_does_not_move_the_others() -> None:
    from learner.methods.compose import Methods

    wild = replace(on_policy(), advantage=torch.tensor([1, -1, 2, -0.5, 1e6]).double())
    masked = replace(with_surrogate(wild), w=torch.tensor([1, 1, 1, 1, 0]).double())
    factors = Methods([Steer()]).factors(masked, lambda weight: masked.logp, {})
    assert factors.weight is not None
    assert torch.allclose(factors.weight[:4], weights(on_policy())[:4])


def test_a_factor_common_to_all_advantages_changes_no_weight_without_a_floor() -> None:
    t = random_table()
    small = with_surrogate(replace(t, advantage=t.advantage / 1024))
    assert torch.equal(weights(t), weights(small))
    assert not torch.allclose(weights(t, form="released"), weights(small, form="released"))


def test_a_quantile_in_the_place_of_the_maximum_keeps_an_outlier_from_owning_it() -> None:
    advantage = torch.ones(200)
    advantage[7] = 1e4
    t = make_table(torch.linspace(-3, -0.1, 200), advantage, H=1.5)
    assert weights(t).median() > 0.999
    capped = weights(t, max_quantile=0.99)
    assert capped.median() < 0.95
    assert capped[7] == capped.min() == 0.7
    assert torch.equal(weights(t, max_quantile=1.0), weights(t))


def test_the_importance_weight_enters_only_when_asked_for() -> None:
    config = LearnerConfig(loss="decoupled_ppo", correction="truncate")
    t = with_surrogate(replace(random_table(), lb=random_table().lp - 0.3), config)
    assert t.w is not None
    assert torch.allclose(t.w, torch.tensor(0.3).double().exp())
    plain, both = Steer().omega(t), Steer(omega_includes_is=True).omega(t)
    assert torch.equal(both, plain * t.w)
    assert torch.equal(plain, Steer().omega(with_surrogate(t, PPO)))


def test_micro_scope_takes_its_extremes_of_a_few_rollouts_at_a_time() -> None:
    t = random_table(size=80)  # 16 rollouts of 5 tokens
    for form in ("theorem", "released"):
        own = weights(t, form=form, scope="micro", micro_rollouts=8)
        halves = [t.take(slice(0, 40)), t.take(slice(40, 80))]
        assert torch.equal(own, torch.cat([weights(h, form=form) for h in halves]))
        assert not torch.equal(own, weights(t, form=form))
        assert torch.equal(
            weights(t, form=form, scope="micro", micro_rollouts=16), weights(t, form=form)
        )


def test_the_weighted_gradient_is_the_weight_times_the_gradient() -> None:
    t = random_table()
    leaf = t.logp.clone().requires_grad_()
    moving = replace(t, logp=leaf)
    with torch.no_grad():
        lam = Steer().weigh(moving, t.main)
    assert not lam.requires_grad
    loss = (lam * surrogate(leaf, t.lp, t.lb, t.advantage, PPO) * t.main).sum() / t.main.sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    assert t.push is not None
    assert torch.allclose(slope, -lam * t.push * t.main / t.main.sum())


def test_the_prediction_is_that_of_moving_the_sampled_logit_alone() -> None:
    """GV2, step α: -α (1-q) S, which leaves out Σ_{v≠a} p_v S_v of the exact change."""
    S = torch.tensor(GOLDEN["GV1.S"], dtype=torch.float64)
    p = torch.tensor(GOLDEN["GV1.p"], dtype=torch.float64)
    t = make_table(p.log(), 1.0, H=GOLDEN["GV1.H"], N=GOLDEN["GV1.N"])
    for alpha in (0.01, 0.001):
        golden(alpha * Steer().omega(t), f"GV2.grpo.steer.{alpha}")
        golden(alpha * Steer(form="centred").omega(t), f"GV2.grpo.pred.{alpha}")
    rest = torch.tensor([float((p * S).sum() - p[a] * S[a]) for a in range(4)]).double()
    difference = Steer(form="centred").omega(t) - Steer().omega(t)
    assert torch.allclose(difference, rest, atol=1e-5)


# ---- the edges of the knobs --------------------------------------------------------------------


def test_one_live_token_or_none_is_fine() -> None:
    one = make_table([-1.0], [1.0], H=2.0)
    assert weights(one).tolist() == [0.7]
    assert weights(one, map="linear", lambda_min=0.6).tolist() == [0.8]  # all alike: the middle
    none = make_table([-1.0, -2.0], [1.0, 1.0], H=1.0, mask=False)
    for map in ("exp", "linear", "asymmetric"):
        assert weights(none, map=map).tolist() == [1, 1]


def test_presets_bring_their_published_bounds() -> None:
    assert Steer().bounds == (0.7, 1)
    assert Steer(form="released").bounds == (0.8, 1)
    assert Steer(form="released", map="linear").bounds == (0.8, 1.2)
    assert Steer(map="asymmetric").bounds == (0.9, 1)


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"lambda_min": 1.1}, "steer.lambda_min = 1.1 is above lambda_max = 1"),
        ({"lambda_max": 1.2}, 'steer.lambda_max = 1.2: the map "exp" ends at 1'),
    ],
)
def test_bounds_that_cannot_be_are_refused(knobs: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Steer(**knobs).check()


def test_the_entropy_may_be_that_of_the_start_of_the_step_as_the_released_code_caches_it() -> None:
    now = replace(random_table(), updates=2)
    later = replace(now, H0=now.H + 0.2, N0=now.N - 0.1)
    for form in ("theorem", "centred"):
        assert torch.equal(weights(later, form=form), weights(now, form=form))
    cached = replace(now, H=now.H + 0.2, N=now.N - 0.1)
    for knobs in (
        {"form": "released"},
        {"form": "theorem", "entropy_from": "proximal"},
        {"form": "centred", "entropy_from": "proximal"},
    ):
        current = {**knobs, "entropy_from": "current"}
        assert torch.equal(weights(later, **knobs), weights(cached, **current))
        assert not torch.equal(weights(later, **knobs), weights(later, **current))
