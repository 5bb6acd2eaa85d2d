"""Clip_B: golden numbers, the three kinds of sides, and when it is idle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.methods.base import moments
from learner.methods.clip_b import ClipB
from learner.methods.clip_v import ClipV
from tests.tables import GOLDEN, golden, random_table
from tests.test_method_clip_v import paper

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_statistics_and_masks_come_out(dtype: torch.dtype) -> None:
    t = paper(dtype)
    golden(t.S, "GV9.S", dtype)
    mean, sigma = moments(t.S, t.main)
    golden(torch.tensor([mean, sigma]), "GV9.S mean,std", dtype)
    golden((t.S - mean) / sigma, "GV9.z", dtype)
    golden((~ClipB(mu=1.0).drop(t)).double(), "GV9.clipB mu1 neg-only", dtype)
    both = ClipB(mu=1.0, sides="two_sided").drop(t)
    golden((~both).double(), "GV9.clipB mu1/1 two-sided all", dtype)


def test_the_golden_losses_of_both_denominators_come_out() -> None:
    t = paper()
    loss = torch.tensor([0.2, -0.4, 0.6, -0.8, 1, -1.2], dtype=torch.float64)
    method = ClipB(mu=1.0, denominator="kept")
    keep = ~method.drop(t)
    factor = method.weigh(t, t.main & keep)
    assert factor is not None
    assert ClipB(mu=1.0).weigh(t, t.main & keep) is None
    found = [loss.mean(), (loss * keep).mean(), (loss * keep * factor).mean()]
    golden(torch.stack(found), "GV9.loss[none,num,both]")
    assert GOLDEN["GV9.loss[none,num,both]"] == [-0.1, -0.133333, -0.16]


def test_tokens_with_positive_advantage_are_kept() -> None:
    for seed in range(5):
        t = random_table(seed)
        dropped = ClipB(mu=0.5).drop(t)
        assert dropped.any()
        assert (t.advantage[dropped] < 0).all()


def test_the_mask_does_not_change_when_a_constant_is_added_to_every_discriminator() -> None:
    t = random_table()
    # S = q (H + l): raising H by k / q raises S by k
    moved = replace(t, H=t.H + 0.3 / t.logp.exp())
    assert torch.allclose(moved.S, t.S + 0.3)
    for mu in (0.3, 0.7, 1.1):
        assert torch.equal(ClipB(mu=mu).drop(moved), ClipB(mu=mu).drop(t))


def test_discriminators_that_are_all_alike_are_all_kept() -> None:
    t = random_table()
    alike = replace(t, H=0.2 / t.logp.exp() - t.logp)
    for sides in ("neg_low", "two_sided", "entropy_lowering"):
        assert not ClipB(mu=1e-3, sides=sides).drop(alike).any()


@pytest.mark.parametrize("sides", ["neg_low", "two_sided", "entropy_lowering"])
def test_a_larger_mu_never_drops_more(sides: str) -> None:
    t = random_table(3)
    shares = [int(ClipB(mu=mu / 4, sides=sides).drop(t).sum()) for mu in range(1, 20)]  # type: ignore[arg-type]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0


def test_the_entropy_lowering_side_also_takes_likely_tokens_with_positive_advantage() -> None:
    t = random_table()
    dropped = ClipB(mu=1.0, sides="entropy_lowering").drop(t)
    mean, sigma = moments(t.S, t.main)
    for sign in (-1, 1):
        of_sign = dropped & (t.advantage.sign() == sign)
        assert of_sign.any()
        assert (sign * (t.S[of_sign] - mean) > sigma).all()


def test_the_upper_side_of_two_has_its_own_width() -> None:
    t = random_table()
    lower = ClipB(mu=1.0, mu_plus=1e9, sides="two_sided").drop(t)
    upper = ClipB(mu=1e9, mu_plus=1.0, sides="two_sided").drop(t)
    assert lower.any()
    assert upper.any()
    assert not (lower & upper).any()
    assert torch.equal(lower | upper, ClipB(mu=1.0, sides="two_sided").drop(t))


def test_it_is_idle_while_the_entropy_is_high() -> None:
    """S ≥ -0.2239, so nothing can go until mu σ < 0.2239 + mean S."""
    t = random_table(scale=1.0)
    mean, sigma = moments(t.S, t.main)
    assert t.S.min() > GOLDEN["GV1.S_lower_bound"] - 1e-6
    assert 2.5 * sigma > 0.2239 + mean
    assert not ClipB().drop(t).any()


@pytest.mark.parametrize(
    "method", [ClipB(mu=0.5), ClipV(mu=0.5, max_frac=1.0)], ids=lambda m: m.name
)
def test_all_updates_of_a_step_drop_what_the_first_one_drops(method: ClipB | ClipV) -> None:
    first = random_table()
    first = replace(first, logp=first.lp)
    moved = random_table(seed=1)
    later = replace(first, logp=moved.logp, H=moved.H, N=moved.N, H0=first.H, N0=first.N)
    assert method.drop(first).any()
    assert torch.equal(method.drop(later), method.drop(first))
    assert not torch.equal(method.drop(replace(later, H0=None, N0=None)), method.drop(first))


def test_the_released_preset_takes_the_engines_log_prob_and_the_kept_denominator() -> None:
    t = random_table()
    t = replace(t, lb=t.logp - torch.linspace(0, 1, 400).double())
    released = ClipB(mu=0.5, preset="released")
    assert torch.allclose(released.discriminator(t), t.lb.exp() * (t.H + t.lb))
    named = ClipB(mu=0.5, log_prob="behaviour", denominator="kept")
    assert torch.equal(released.drop(t), named.drop(t))
    assert released.weigh(t, t.main) is not None
    assert not torch.equal(released.drop(t), ClipB(mu=0.5).drop(t))
    assert ClipB(preset="released", denominator="original").weigh(t, t.main) is None
    assert ClipV(preset="released").weigh(t, t.main) is not None
    assert ClipV().weigh(t, t.main) is None
