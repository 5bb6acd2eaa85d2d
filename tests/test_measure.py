"""What a step says about the entropy: by hand on small tables, and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from common.metrics import known
from learner.config import LearnerConfig
from learner.loss import Rows
from learner.measure import (
    Law,
    Metrics,
    add,
    by_lag,
    entropy_change,
    entropy_forecast,
    idle_alarm,
    off_policy_alarm,
    parts,
)
from learner.methods.aepo import Aepo
from learner.methods.base import Method
from learner.methods.clip_b import ClipB
from learner.methods.compose import Factors, Methods
from learner.methods.effect import scaled
from learner.methods.entropy_bonus import EntropyBonus
from learner.methods.isentropic import Isentropic
from learner.methods.kl_cov import KlCov
from learner.methods.steer import Steer
from learner.methods.top_entropy import TopEntropy
from learner.slopes import Shares, coefficients, credit
from learner.table import Table
from tests.tables import PPO, make_table, random_table, with_surrogate

# four tokens, one a quadrant: l > -H is "likely"; two lags
L = [-0.1, -2.0, -0.2, -3.0]
H = [0.5, 0.5, 0.5, 0.5]
N = [0.1, 0.1, 0.1, 0.1]
A = [1.0, 1.0, -1.0, -1.0]
LAG = [0, 0, 1, 1]


def small(**columns: Any) -> Table:
    own: dict[str, Any] = {"logp": L, "advantage": A, "H": H, "N": N, "lag": LAG}
    return make_table(**{**own, **columns})


def by_hand(c: Sequence[float], lr: float) -> list[float]:
    S = [math.exp(x) * (h + x) for x, h in zip(L, H, strict=True)]
    return [lr * x * (s - n) for x, s, n in zip(c, S, N, strict=True)]


# ---- predicted and realised --------------------------------------------------------------------


def test_the_forecast_is_the_sum_by_hand_in_all_its_parts() -> None:
    c = [-0.25, -0.25, 0.25, 0.25]
    found = entropy_forecast(small(), torch.tensor(c).double(), 0.1)
    each = by_hand(c, 0.1)
    assert [x > 0 for x in each] == [False, True, True, False]
    assert found["entropy_predicted"] == pytest.approx(sum(each))
    assert found["entropy_predicted_up"] == pytest.approx(each[1] + each[2])
    assert found["entropy_predicted_down"] == pytest.approx(each[0] + each[3])
    names = ("A+ likely", "A+ unlikely", "A- likely", "A- unlikely")
    assert found["entropy_quadrants"] == pytest.approx(dict(zip(names, each, strict=True)))
    lags = found["entropy_predicted_by_lag"]
    assert isinstance(lags, dict)
    assert lags["0/total"] == pytest.approx(each[0] + each[1])
    assert lags["1/up"] == pytest.approx(each[2])
    assert lags["1/A- unlikely"] == pytest.approx(each[3])
    assert lags["1/A+ likely"] == 0.0


def test_what_happened_is_told_in_the_same_parts_as_a_mean_over_the_main_tokens() -> None:
    t = small(mask=[True, True, True, False])
    found = entropy_change(t, t.H + torch.tensor([0.3, -0.6, 0.9, 99.0]).double())
    assert found["entropy_realised"] == pytest.approx(0.2)
    assert found["entropy_realised_up"] == pytest.approx(0.4)
    assert found["entropy_realised_down"] == pytest.approx(-0.2)
    quadrants = found["entropy_realised_quadrants"]
    assert isinstance(quadrants, dict)
    assert quadrants["A- likely"] == pytest.approx(0.3)
    lags = found["entropy_realised_by_lag"]
    assert isinstance(lags, dict)
    assert (lags["0/total"], lags["1/total"]) == pytest.approx((-0.1, 0.3))
    assert all(known(name) for name in found)


def test_parts_add_up_over_lags_and_over_quadrants() -> None:
    t = random_table()
    change = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    whole, lags = parts(change, t, t.main)
    assert whole["total"] == pytest.approx(float(change[t.main].sum()))
    for name, value in whole.items():
        assert sum(lags[f"{lag}/{name}"] for lag in range(3)) == pytest.approx(value)
    assert sum(v for k, v in whole.items() if k.startswith("A")) == pytest.approx(whole["total"])


def test_updates_add_up() -> None:
    one: Metrics = {"x": 1.0, "d": {"0": 1.0}}
    assert add({}, one) == one
    assert add(one, {"x": 2.0, "d": {"0": 1.0, "1": 5.0}}) == {"x": 3.0, "d": {"0": 2.0, "1": 5.0}}


def test_the_running_correlation_and_slope_are_those_of_the_pairs() -> None:
    law = Law()
    pairs = [(1.0, 2.5), (2.0, 3.0), (-1.0, -1.0), (0.5, 1.5)]
    for i, pair in enumerate(pairs):
        assert (law.metrics() == {}) == (i < 3)
        law.add(*pair)
    x, y = torch.tensor(pairs).double().T
    assert law.metrics()["entropy_correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    )
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert law.metrics()["entropy_slope"] == pytest.approx(float(slope))


# ---- what each method adds ---------------------------------------------------------------------


def shares_of(t: Table) -> Shares:
    main = t.main.double() / max(1, int(t.main.sum()))
    aux = t.mask & t.aux
    return Shares(main, main + aux.double() / max(1, int(aux.sum())))


def credited(
    methods: Sequence[Method],
    t: Table,
    of_groups: Mapping[str, Tensor] | None = None,
    states: Mapping[str, Any] | None = None,
) -> tuple[Metrics, Tensor, Factors]:
    """… and c under all of them, and their factors."""
    every, shares = Methods(methods), shares_of(t)

    def c(weight: Tensor | None, table: Table = t) -> Tensor:
        return coefficients(table, shares.main, PPO, weight, Rows())

    factors = every.factors(t, c, states or every.initial())
    product = torch.ones_like(t.logp)
    for factor in (of_groups or {}).values():
        product = product * factor
    bare = replace(t, advantage=t.advantage / product)
    found = credit(every, factors, of_groups or {}, t, lambda: c(None, bare), shares, 0.1)
    return found, c(factors.weight), factors


def total(found: Metrics, name: str) -> float:
    value = found[f"methods/{name}/predicted"]
    assert isinstance(value, dict)
    return value["total"]


def test_what_a_drop_takes_out_of_the_prediction_is_the_dropped_tokens_part() -> None:
    t = small(H=[0.5, 0.5, 0.1, 0.5])
    found, _, _ = credited([TopEntropy(keep=0.9)], t)
    S = math.exp(-0.2) * (0.1 - 0.2)
    assert total(found, "top_entropy") == pytest.approx(-0.1 * 0.25 * (S - 0.1))
    lags = found["methods/top_entropy/predicted_by_lag"]
    assert isinstance(lags, dict)
    assert lags["0/total"] == 0.0
    assert all(known(name) for name in found)


@pytest.mark.parametrize("methods", [[Steer()], [ClipB(mu=0.5)], [Isentropic(preset="opefo")]])
def test_the_prediction_is_that_of_the_bare_loss_and_what_the_method_adds(methods: Any) -> None:
    t = random_table()
    found, c, _ = credited(methods, t)
    bare = coefficients(t, shares_of(t).main, PPO, None, Rows())
    whole = [entropy_forecast(t, x, 0.1)["entropy_predicted"] for x in (bare, c)]
    assert total(found, methods[0].name) == pytest.approx(whole[1] - whole[0])  # type: ignore[operator]


def test_beside_others_a_method_adds_what_would_change_were_it_alone_left_out() -> None:
    t = random_table()
    pair = (Steer(), ClipB(mu=0.3))
    found, c, factors = credited(pair, t)
    for m, other in (pair, pair[::-1]):
        without = coefficients(t, shares_of(t).main, PPO, factors.own[other.name], Rows())
        ends = [entropy_forecast(t, x, 0.1)["entropy_predicted"] for x in (c, without)]
        assert total(found, m.name) == pytest.approx(ends[0] - ends[1])  # type: ignore[operator]


def test_a_factor_of_groups_is_credited_even_where_it_is_zero() -> None:
    t = random_table()
    factor = torch.where(t.group % 2 == 0, 2.0, 0.5).double()
    louder = with_surrogate(replace(t, advantage=t.advantage * factor))
    found, c, _ = credited([], louder, {"adora": factor})
    bare = coefficients(t, shares_of(t).main, PPO, None, Rows())
    ends = [entropy_forecast(t, x, 0.1)["entropy_predicted"] for x in (c, bare)]
    assert total(found, "adora") == pytest.approx(ends[0] - ends[1])  # type: ignore[operator]
    silent = credit(
        Methods([]), Factors(), {"adora": 0 * factor}, t, lambda: bare, shares_of(t), 0.1
    )
    assert total(silent, "adora") == pytest.approx(-ends[1])  # type: ignore[operator]


def test_the_pull_of_kl_cov_is_credited_through_the_log_prob() -> None:
    t = random_table()
    method = KlCov(ratio=0.1, anchor="proximal")
    found, _, factors = credited([method], t)
    chosen = factors.plans["kl_cov"]
    c = shares_of(t).main * chosen * (t.logp - t.lp).sign()
    assert total(found, "kl_cov") == pytest.approx(float((0.1 * c * (t.S - t.N)).sum()))


@pytest.mark.parametrize("how", ["method", "governor"])
def test_a_bonus_is_credited_with_what_it_does_to_the_entropy(how: str) -> None:
    """Plain gradient ascent on c · mean H over logits of their own: to first order."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 6, generator=rng, dtype=torch.float64)
    p, log_p = z.softmax(1), z.log_softmax(1)
    token = torch.multinomial(p, 1, generator=rng)
    own = -(p * log_p).sum(1)
    S = p * (own[:, None] + log_p)
    t = make_table(log_p.gather(1, token)[:, 0], 0.0, H=own, N=(p * S).sum(1))
    shares = shares_of(t)
    methods = Methods([EntropyBonus(coefficient=0.5)] if how == "method" else [])
    factors = Factors() if how == "method" else Factors(bonus=0.5, governor="entropy_bonus")
    found = credit(methods, factors, {}, t, lambda: t.logp, shares, 0.1)
    exact = 0.1 * 0.5 * float(S.square().sum(1).mean())
    assert total(found, "entropy_bonus") == pytest.approx(exact, rel=0.02)
    assert total(found, "entropy_bonus") > 0


def test_warm_right_answers_are_credited_with_more_entropy_and_cold_ones_with_less() -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 6, generator=rng, dtype=torch.float64) * 1.5
    p, log_p = z.softmax(1), z.log_softmax(1)
    own = -(p * log_p).sum(1)
    N = (p**2 * (own[:, None] + log_p)).sum(1)
    signs = []
    for temperature in (1.3, 0.7):
        token = torch.multinomial((z / temperature).softmax(1), 1, generator=rng)
        t = make_table(log_p.gather(1, token)[:, 0], 1.0, H=own, N=N, aux=True)
        methods, none = Methods([Aepo(alpha=1.0)]), torch.zeros_like(own)
        found = credit(methods, Factors(), {}, t, none.clone, shares_of(t), 1.0)
        signs.append(math.copysign(1, total(found, "aepo")))
    assert signs == [1, -1]


def test_the_factors_of_groups_are_told_by_their_quantiles_and_by_lag() -> None:
    import numpy as np

    t = random_table(lag=torch.arange(400) // 40 % 2)  # of the groups: rows of 5 tokens, by 4
    column = torch.where(t.group % 2 == 0, 1.0, 0.0)
    silenced = replace(t, advantage=t.advantage * column)
    found = scaled("adora", np.array([1.0, 1.0, 2.0, 2.0]), column, t.advantage, silenced)
    factor = found["methods/adora/factor"]
    assert isinstance(factor, dict)
    assert (factor["min"], factor["q50"], factor["max"], factor["mean"]) == (1, 1.5, 2, 1.5)
    assert found["methods/adora/affected"] == 0.5
    touched = t.main & (column == 0)
    bad = touched & (t.advantage < 0)  # before the factor took the sign away
    assert found["methods/adora/negative"] == pytest.approx(int(bad.sum()) / int(touched.sum()))
    for key, part, whole in (
        ("factor", t.main & (column == 1), t.main),
        ("affected", touched, t.main),
        ("negative", bad, touched),
    ):
        lags = found[f"methods/adora/{key}_by_lag"]
        assert isinstance(lags, dict)
        for lag in (0, 1):
            on = t.lag == lag
            share = int((part & on).sum()) / int((whole & on).sum())
            assert lags[str(lag)] == pytest.approx(share)
    assert scaled("adora", np.zeros(0), column, t.advantage, t) == {}


def test_what_kl_cov_has_chosen_is_told_by_lag() -> None:
    t = random_table()
    t = replace(t, lp=torch.where(t.lag == 1, t.logp, t.lp))
    _, _, factors = credited([KlCov(ratio=0.2, anchor="proximal")], t)
    chosen = factors.plans["kl_cov"] > 0
    bad, still = t.advantage < 0, t.lag == 1
    for key, part, whole in (
        ("chosen", chosen, t.main),
        ("inert", chosen & still, chosen),
        ("negative", chosen & bad, chosen),
    ):
        lags = factors.effects[f"methods/kl_cov/{key}_by_lag"]
        assert isinstance(lags, dict)
        for lag in range(3):
            on = t.lag == lag
            share = int((part & on).sum()) / int((whole & on).sum())
            assert lags[str(lag)] == pytest.approx(share)


# ---- off-policyness ----------------------------------------------------------------------------


def drawn(temperature: float, size: int = 20_000) -> Table:
    """Tokens drawn at a temperature from policies that are trained at 1."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(size, 8, generator=rng, dtype=torch.float64) * 2
    behaviour, log_p = (z / temperature).log_softmax(1), z.log_softmax(1)
    token = torch.multinomial(behaviour.exp(), 1, generator=rng)
    own = -(log_p.exp() * log_p).sum(1)
    N = (log_p.exp() ** 2 * (own[:, None] + log_p)).sum(1)
    logp, lb = (x.gather(1, token)[:, 0] for x in (log_p, behaviour))
    return make_table(logp, 1.0, lp=logp, lb=lb, H=own, N=N)


def drift(t: Table, **fields: Any) -> Metrics:
    own: dict[str, Any] = {"loss": "decoupled_ppo", **fields}
    return by_lag(t, LearnerConfig(**own)) | {"tokens": float(len(t.logp))}


def test_on_policy_and_under_exact_weights_the_drift_is_none_and_uncorrected_it_has_its_sign() -> (
    None
):
    on_policy, flat, sharp = drawn(1.0), drawn(1.5), drawn(0.6)
    assert abs(drift(on_policy)["off_policy"]) < 0.02  # type: ignore[arg-type]
    assert drift(flat)["off_policy"] < -0.1  # type: ignore[operator]
    assert drift(sharp)["off_policy"] > 0.1  # type: ignore[operator]
    exact = {"correction": "truncate", "correction_high": 1e9}
    assert abs(drift(flat, **exact)["off_policy"]) < 0.02  # type: ignore[arg-type]
    assert abs(drift(flat, loss="ppo")["off_policy"]) < 0.02  # type: ignore[arg-type]
    assert drift(flat, loss="reinforce")["off_policy"] < -0.1  # type: ignore[operator]


def test_the_alarm_rings_beyond_its_limit_and_beyond_chance_only() -> None:
    assert off_policy_alarm(drift(drawn(1.0))) == []
    (line,) = off_policy_alarm(drift(drawn(1.5)))
    assert "right answers push the entropy up; lower max_lag" in line
    (line,) = off_policy_alarm(drift(drawn(0.6)))
    assert "right answers push the entropy down" in line
    assert off_policy_alarm({"off_policy": 0.3, "tokens": 100.0}) == []  # 4 / √100 = 0.4
    assert off_policy_alarm({"off_policy": 0.09, "tokens": 1e6}) == []
    assert off_policy_alarm({}) == []


def test_a_method_that_does_nothing_is_told_to_people() -> None:
    t = random_table(scale=1.0)
    idle = Methods([ClipB()]).factors(t, lambda weight: t.logp, {}).effects
    (line,) = idle_alarm(idle)
    assert line.startswith("clip_b drops no token")
    still = replace(t, lp=t.logp)
    inert = Methods([KlCov(ratio=0.2, anchor="proximal")]).factors(still, lambda w: t.logp, {})
    (line,) = idle_alarm(inert.effects)
    assert line.startswith("kl_cov pulls none of the tokens it has chosen")
    for method in (ClipB(mu=0.1), KlCov(ratio=0.2, anchor="proximal"), Steer()):
        assert idle_alarm(Methods([method]).factors(t, lambda w: t.logp, {}).effects) == []
    assert idle_alarm({"entropy": 0.0}) == []


def test_the_discriminators_spread_and_mean_are_those_of_the_tokens_of_each_lag() -> None:
    t = random_table()
    found = by_lag(t, msgspec.structs.replace(PPO, correction="truncate"))
    r, w = (t.logp - t.lp).exp(), (t.lp - t.lb).exp().clamp(max=2.0)
    for lag in range(3):
        on = t.main & (t.lag == lag)
        spread, mean = found["discriminator_std"], found["discriminator_drift"]
        assert isinstance(spread, dict)
        assert isinstance(mean, dict)
        assert spread[str(lag)] == pytest.approx(float(t.S[on].std(correction=0)))
        assert mean[str(lag)] == pytest.approx(float((w * r * (t.S - t.N))[on].mean()))
    assert found["discriminator_std_all"] == pytest.approx(float(t.S[t.main].std(correction=0)))
    assert all(known(name) for name in found)


def test_nothing_to_measure_is_no_error() -> None:
    t = random_table(mask=False)
    found = by_lag(t, PPO)
    assert "off_policy" not in found
    assert entropy_change(t, t.H)["entropy_realised"] == 0.0


def test_affected_weights_and_signs_are_told_by_lag() -> None:
    t = random_table()
    effects = Methods([Steer()]).factors(t, lambda weight: t.logp, {}).effects
    own = Steer().weigh(t, t.main)
    lags, bad, touched = (
        effects[f"methods/steer/{k}"]
        for k in ("weight_by_lag", "negative_by_lag", "affected_by_lag")
    )
    assert isinstance(lags, dict)
    assert isinstance(bad, dict)
    assert isinstance(touched, dict)
    for lag in range(3):
        on = t.main & (t.lag == lag)
        assert lags[f"{lag}/mean"] == pytest.approx(float(own[on].mean()))
        assert lags[f"{lag}/q05"] == pytest.approx(float(own[on].quantile(0.05)))
        moved = on & (own != 1)
        assert touched[str(lag)] == pytest.approx(int(moved.sum()) / int(on.sum()))
        share = int((moved & (t.advantage < 0)).sum()) / int(moved.sum())
        assert bad[str(lag)] == pytest.approx(share)
