"""KL-Cov: golden numbers, which tokens it chooses, and when it is inert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common import recipe
from common.errors import DataError
from learner.config import LearnerConfig
from learner.loss import surrogate
from learner.methods.compose import Factors, Methods
from learner.methods.kl_cov import KlCov
from learner.methods.top_entropy import TopEntropy
from learner.table import Table
from tests.tables import golden, make_table, random_table, with_surrogate
from tests.test_methods import bits, train

DTYPES = [torch.float64, torch.float32]
UNCLIPPED = LearnerConfig(loss="decoupled_ppo", clip_low=None, clip_high=None)
GV7: dict[str, Any] = {
    "lp": [-0.02, -0.12, -0.5, -1.4, -3.1, -5.8, -0.03, -0.3],
    "logp": [-0.01, -0.1, -0.55, -1.5, -3, -6, -0.02, -0.3],
    "advantage": [1, 1, -1, -1, 1, -1, -1, 1],
    "mask": [True] * 7 + [False],
}


def moved(dtype: torch.dtype = torch.float64, **columns: Any) -> Table:
    return make_table(**{**GV7, **columns}, config=UNCLIPPED, dtype=dtype)


def factors(method: KlCov, table: Table) -> Factors:
    return Methods([method]).factors(table, lambda weight: torch.zeros_like(table.logp), {})


def losses(method: KlCov, table: Table, logp: Tensor) -> Tensor:
    """Of the main tokens: the surrogate and the pull of the chosen."""
    base = surrogate(logp, table.lp, table.lb, table.advantage, UNCLIPPED)
    extra = method.extra_loss(replace(table, logp=logp), method.plan(table, table.main))
    return (base if extra is None else base + extra)[table.main]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_numbers_come_out(dtype: torch.dtype) -> None:
    t = moved(dtype)
    method = KlCov(ratio=0.2, anchor="proximal")
    golden(method.covariance(t, t.main)[:7], "GV7.C", dtype)
    golden((t.logp - t.lp).exp()[:7], "GV7.ratio", dtype)
    golden(method.plan(t, t.main).nonzero().squeeze(1).double(), "GV7.klsel", dtype)
    logp = t.logp.clone().requires_grad_()
    each = losses(method, t, logp)
    golden(each.mean(), "GV7.klcov", dtype)
    (slope,) = torch.autograd.grad(each.sum(), logp)
    golden(slope[:7], "GV7.klcov dL/dl", dtype)


def test_at_least_one_token_is_chosen_and_never_one_that_is_not_alive() -> None:
    t = random_table()
    assert int(KlCov(ratio=1e-9).plan(t, t.main).sum()) == 1
    n = int(t.main.sum())
    chosen = KlCov(ratio=0.1).plan(t, t.main) > 0
    assert int(chosen.sum()) == int(0.1 * n)
    assert not (chosen & ~t.main).any()
    alive = t.main & (t.advantage > 0)
    assert not ((KlCov(ratio=0.1).plan(t, alive) > 0) & ~alive).any()


def test_the_covariance_ignores_constants_and_its_mean_is_the_covariance() -> None:
    t = random_table()
    c = KlCov().covariance(t, t.main)[t.main]
    shifted = replace(t, logp=t.logp - 3, advantage=t.advantage + 5)
    assert torch.allclose(KlCov().covariance(shifted, t.main)[t.main], c)
    pair = torch.stack([t.logp, t.advantage])[:, t.main]
    assert torch.allclose(c.mean(), torch.cov(pair, correction=0)[0, 1])


def test_where_the_policy_has_not_moved_the_gradient_is_the_unclipped_policy_gradient() -> None:
    t = moved(lp=GV7["logp"])
    logp = t.logp.clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses(KlCov(ratio=0.5, anchor="proximal"), t, logp).sum(), logp)
    assert torch.allclose(slope[:7], -t.advantage[:7])


@pytest.mark.parametrize(
    ("anchor", "updates", "inert"),
    [
        ("auto", 1, 0.0),  # the behaviour policy is older
        ("auto", 2, 1.0),  # the proximal one, not left yet; later updates leave it
        ("proximal", 1, 1.0),
        ("behaviour", 2, 0.0),
    ],
)
def test_the_log_has_the_share_of_tokens_that_are_not_pulled(
    anchor: Any, updates: int, inert: float
) -> None:
    t = replace(moved(lp=GV7["logp"], lb=-9.0), updates=updates)
    effects = factors(KlCov(ratio=0.5, anchor=anchor), t).effects
    assert effects["methods/kl_cov/inert"] == inert
    assert effects["methods/kl_cov/chosen"] == 3
    assert effects["methods/kl_cov/negative"] == pytest.approx(1 / 3)


def test_beta_falls_in_a_straight_line_when_it_is_annealed() -> None:
    found = [
        KlCov(beta=2.0, anneal=4).beta_at(replace(moved(), when=(0, step, 0))) for step in range(6)
    ]
    assert found == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_masked_tokens_never_matter_not_even_when_they_are_not_numbers() -> None:
    t, method = random_table(), KlCov(ratio=0.1)
    nothing = torch.full_like(t.logp, float("nan"))
    filled = {k: torch.where(t.main, getattr(t, k), nothing) for k in ("logp", "lp", "advantage")}
    broken = replace(t, **filled)
    assert torch.equal(method.plan(broken, t.main), method.plan(t, t.main))
    extra = method.extra_loss(broken, method.plan(t, t.main))
    assert extra is not None
    assert torch.isfinite(extra).all()


def test_a_covariance_that_is_no_number_is_refused_with_its_token() -> None:
    t = random_table()
    at = int(t.main.nonzero()[7])
    logp = t.logp.clone()
    logp[at] = float("nan")
    with pytest.raises(DataError, match=rf"'kl_cov', C: nan .* ticket {int(t.ticket[at])}"):
        factors(KlCov(), replace(t, logp=logp))


def test_without_beta_it_is_the_unclipped_baseline_bit_for_bit() -> None:
    open_clip = {"clip_low": None, "clip_high": None, "loss": "decoupled_ppo"}
    plain = bits(train([], **open_clip)[0])
    assert bits(train([KlCov(beta=0.0)], **open_clip)[0]) == plain
    assert bits(train([KlCov(beta=1e-30, ratio=0.1)], **open_clip)[0]) == plain
    assert bits(train([KlCov(ratio=0.1)], **open_clip)[0]) != plain


def test_the_pull_has_the_importance_weight_of_its_token_as_released() -> None:
    t = random_table()
    config = LearnerConfig(
        loss="decoupled_ppo", clip_low=None, clip_high=None, correction="truncate"
    )
    weighty = with_surrogate(replace(t, lb=t.lp + torch.linspace(-0.5, 0.5, 400).double()), config)
    method = KlCov(ratio=0.2, anchor="proximal")
    plan = method.plan(weighty, t.main)
    chosen = plan > 0
    assert torch.equal(chosen, method.plan(t, t.main) > 0)
    assert weighty.w is not None
    assert torch.equal(plan[chosen], weighty.w[chosen])
    extra = method.extra_loss(weighty, plan)
    assert extra is not None
    assert torch.allclose(extra, plan * (t.logp - t.lp).abs())


def test_micro_scope_has_its_own_means_and_its_own_choice() -> None:
    t = random_table(size=400)  # 80 rollouts of 5 tokens
    own = KlCov(ratio=0.1, scope="micro", micro_rollouts=40).plan(t, t.main)
    for half in (t.row < 40, t.row >= 40):
        on = t.main & half
        assert torch.equal(own * half, KlCov(ratio=0.1).plan(t, on))
    assert not torch.equal(own, KlCov(ratio=0.1).plan(t, t.main))


def test_the_released_preset_is_micro_scope_and_the_proximal_anchor() -> None:
    t = replace(random_table(), updates=1, lb=random_table().lp - 0.2)
    released = KlCov(ratio=0.1, preset="released")
    named = KlCov(ratio=0.1, scope="micro", anchor="proximal")
    plan = released.plan(t, t.main)
    assert torch.equal(plan, named.plan(t, t.main))
    pulls = [m.extra_loss(t, plan) for m in (released, named, KlCov(ratio=0.1))]
    assert torch.equal(pulls[0], pulls[1])  # type: ignore[arg-type]
    assert not torch.equal(pulls[0], pulls[2])  # type: ignore[arg-type]


def test_neither_order_nor_micro_batches_matter() -> None:
    pair = (KlCov(ratio=0.1), TopEntropy(keep=0.5))
    assert bits(train(pair)[0]) == bits(train(pair[::-1])[0])
    ends = [train(pair, steps=1, tokens_per_micro=n)[1].metrics for n in (16, 10_000)]
    for name in ("loss", "grad_norm", "methods/kl_cov/inert"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3)


def test_its_recipe_takes_the_surrogate_without_a_clip() -> None:
    config = recipe.load_all("kl_cov")["learner"]
    assert isinstance(config, LearnerConfig)
    assert (config.clip_low, config.clip_high) == (None, None)
    assert isinstance(config.methods[0], KlCov)
