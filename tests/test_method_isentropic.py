"""Isentropic: the balance, the controller, the calibration."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common import recipe
from common.config import RunConfig
from common.errors import ConfigError, DataError
from learner import checkpoint
from learner.config import LearnerConfig
from learner.methods.adaptive_entropy import AdaptiveEntropy
from learner.methods.base import Governed, State
from learner.methods.calibrate import Filter
from learner.methods.isentropic import Isentropic
from learner.methods.prefixes import entropy_ahead, prefixes
from learner.methods.steer import Steer
from learner.model import Policy
from learner.state import state_of
from learner.step import train_step
from learner.table import Table
from tests.builders import tiny_model
from tests.tables import GOLDEN, four_answers, golden, make_table, random_table, two_answers
from tests.test_methods import bits, train
from tests.test_step import a_batch

OPEFO = Isentropic(preset="opefo")


def slopes(table: Table) -> Tensor:
    """c of the plain surrogate under a token mean."""
    assert table.push is not None
    return -table.push / int(table.main.sum())


def answer(method: Isentropic, table: Table, state: State | None = None) -> Governed:
    return method.govern(table, slopes(table), state or method.initial())


def changes(table: Table) -> Tensor:
    """What each token does to the entropy: in its own place, and by where its choice leads."""
    own = slopes(table) * (table.S - table.N)
    led = (
        -slopes(table)
        * table.logp.exp()
        * entropy_ahead(table, prefixes(table)).to(table.logp.dtype)
    )
    return (own + led).masked_fill(~table.main, 0.0)


def predicted(table: Table, weight: Tensor | None, law: Any = changes) -> float:
    return float((law(table) * (1 if weight is None else weight)).sum())


def own_changes(table: Table) -> Tensor:
    return (slopes(table) * (table.S - table.N)).masked_fill(~table.main, 0.0)


def holding(target: float, **knobs: Any) -> Isentropic:
    return Isentropic(target=target, unit="nats", **knobs)


def entropy(table: Table) -> float:
    return float(table.H[table.main].mean())


# ---- the balance -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opefo_balances_the_flows_with_the_golden_factor(dtype: torch.dtype) -> None:
    q = torch.tensor([0.0320586, 0.25, 0.980187, 0.471684, 0.00340103, 0.000744582]).double()
    N = torch.tensor([0.168817, 0, 0.0945386, 0.0183016, 0.0548578, 0.00372792]).double()
    t = make_table(q.log(), [-1, 1, -1, 1, -1, 1], H=GOLDEN["GV9.H"], N=N, dtype=dtype)
    dH = -1e-3 * slopes(t) * 6 * (t.S - t.N)  # a loss of -A l a token
    golden(-dH, "GV9.dH", torch.float32)  # N and q are rounded to six digits
    found = answer(OPEFO, t)
    assert found.numbers["lambda"] == pytest.approx(GOLDEN["GV9.opefo"], rel=1e-4)
    assert found.weight is not None
    assert predicted(t, found.weight, own_changes) == pytest.approx(0, abs=1e-6)


def test_raising_tokens_weigh_more_and_lowering_ones_less() -> None:
    t = random_table()
    found = answer(holding(entropy(t) + 1e-9, mode="hold", price_max=0.0, bonus_max=0.0), t)
    tilt, raises = found.numbers["lambda"], changes(t) > 0
    assert found.weight is not None
    assert 0 < abs(tilt) <= 0.5
    moves = t.main & (t.push != 0)
    up, down = found.weight[moves & raises], found.weight[moves & ~raises]
    assert torch.allclose(up / up[0], torch.tensor(1.0))
    assert torch.allclose(down / up[0], torch.tensor((1 - tilt) / (1 + tilt)))
    assert (found.weight[~t.main] == 1).all()
    flows = changes(t).abs()  # a step stays as large as it was
    assert float((flows * found.weight).sum()) == pytest.approx(float(flows.sum()))


def test_at_the_target_the_prediction_is_balanced_not_that_of_grpo() -> None:
    t = random_table()
    found = answer(holding(entropy(t), mode="hold", lambda_max=1.0, price_max=0.0), t)
    assert predicted(t, None) != pytest.approx(0, abs=1e-4)
    assert predicted(t, found.weight) == pytest.approx(0, abs=1e-6)


def test_price_then_weights_then_bonus_supply_what_is_wanted_each_up_to_its_bound() -> None:
    t = random_table(group=torch.zeros(400))
    assert t.push is not None
    t = replace(t, push=-changes(t).sign() * t.push)  # all of it lowers the entropy
    first = answer(holding(entropy(t), first="price", price_max=1e9), t).numbers
    assert first["price"] > 0
    assert (first["lambda"], first["saturated"]) == (0, 0)
    assert predicted(t, None) + first["push"] == pytest.approx(0, abs=1e-6)
    own: dict[str, Any] = {"first": "price", "price_max": first["price"] / 10, "spread": 0.0}
    second = answer(holding(entropy(t), lambda_max=1.0, **own), t)
    assert second.numbers["price"] == own["price_max"]
    assert 0 < second.numbers["lambda"] < 1
    assert second.bonus == 0
    third = answer(holding(entropy(t), lambda_max=0.1, bonus_max=1e9, **own), t)
    assert third.numbers["lambda"] == 0.1
    assert third.bonus > 0
    supplied = 0.1 * float(changes(t).abs().sum()) + third.numbers["push"]
    assert predicted(t, None) + supplied == pytest.approx(0, abs=1e-6)
    last = answer(holding(entropy(t), lambda_max=0.1, bonus_max=1e-6, **own), t)
    assert last.numbers["saturated"] == 1.0
    assert 0 < last.bonus < 1e-6  # divided by what it adds to the step, like all weights


def test_weights_may_answer_first_and_the_price_supplies_what_they_leave() -> None:
    t = random_table(group=torch.zeros(400))
    assert t.push is not None
    t = replace(t, push=-changes(t).sign() * t.push)  # all of it lowers the entropy
    whole = answer(holding(entropy(t), first="weights", lambda_max=1.0), t).numbers
    assert 0 < whole["lambda"] <= 1
    assert whole["price"] == 0
    flows = float(changes(t).abs().sum())
    assert predicted(t, None) + whole["lambda"] * flows == pytest.approx(0, abs=1e-6)
    half = {"first": "weights", "lambda_max": whole["lambda"] / 2, "price_max": 1e9}
    found = answer(holding(entropy(t), **half), t).numbers
    assert found["lambda"] == half["lambda_max"]
    assert found["price"] > 0
    supplied = found["lambda"] * flows + found["push"]
    assert predicted(t, None) + supplied == pytest.approx(0, abs=1e-6)


def test_the_sampled_token_estimates_what_a_bonus_does_without_bias() -> None:
    log_p = torch.tensor([2.0, 1.0, 0.0, -1.0]).double().log_softmax(0)
    p = log_p.exp()
    H = -(p * log_p).sum()
    each = p * (H + log_p) ** 2  # of the token drawn
    S = p * (H + log_p)
    assert torch.allclose((p * each).sum(), (S**2).sum())


# ---- where choices lead -------------------------------------------------------------------------


def test_a_price_favours_the_choices_that_lead_to_more_entropy() -> None:
    t = four_answers()
    t = replace(t, push=t.advantage * 1.0)
    found = answer(holding(9.0, lambda_max=0.0, bonus_max=0.0, spread=0.0), t)
    assert found.weight is not None
    assert found.bonus == 0
    plain = found.weight[[2, 5, 8, 9]]  # nothing comes after these, or nothing else could
    assert torch.allclose(plain, plain[0])
    change = ((found.weight / plain[0] - 1) * t.advantage)[[0, 3, 6, 10]]  # of the advantage
    assert (change.sign() == entropy_ahead(t, prefixes(t))[[0, 3, 6, 10]].sign()).all()


# ---- what is spread where there is nothing to lose ----------------------------------------------


@pytest.mark.parametrize("price_max", [0.25, 3.0])
def test_entropy_with_a_price_moves_from_right_answers_to_lost_tokens(price_max: float) -> None:
    t, knobs = two_answers(), {"lambda_max": 0.0, "bonus_max": 0.0, "price_max": price_max}
    found = answer(holding(9.0, spread=2.0, sharpen=0.6, **knobs), t)
    by = min(price_max, 1.0)
    assert found.numbers["price"] == price_max
    assert found.bonus == 1.0
    assert found.where is not None
    assert found.where.tolist() == pytest.approx([-0.6 * by] * 3 + [0.0, 0.0] + [2.0 * by] * 2)
    assert found.numbers["lost"] == pytest.approx(2 / 7)
    assert answer(holding(9.0, spread=0.0, **knobs), t).where is None


def test_without_a_price_no_entropy_is_moved() -> None:
    t = two_answers()
    weights = answer(holding(9.0, price_max=0.0, bonus_max=0.0), t)
    assert (weights.numbers["active"], weights.where) == (1.0, None)
    idle = answer(holding(0.01), t)
    assert (idle.numbers["active"], idle.where) == (0.0, None)
    assert answer(holding(9.0, mode="ceiling"), t).where is None


# ---- the three modes ---------------------------------------------------------------------------


def test_a_floor_is_grpo_above_its_brake_zone_and_never_lowers_the_entropy() -> None:
    t = random_table()
    for share in (0.1, 0.45):
        idle = answer(holding(share * entropy(t)), t)
        assert (idle.weight, idle.bonus) == (None, 0.0)
    for share in (0.55, 1.0, 2.0):
        assert answer(holding(share * entropy(t)), t).numbers["lambda"] >= 0


def test_a_ceiling_is_grpo_below_it_and_never_raises_the_entropy() -> None:
    t = random_table()
    idle = answer(holding(10 * entropy(t), mode="ceiling"), t)
    assert (idle.weight, idle.bonus) == (None, 0.0)
    found = answer(holding(0.1 * entropy(t), mode="ceiling"), t)
    assert found.numbers["lambda"] < 0
    assert found.bonus == 0


# ---- the controller ----------------------------------------------------------------------------


def facts(error: float = 0.0, target: float = 1.0, **own: float) -> dict[str, float]:
    numbers = {"target": target, "error": error, "up": 1.0, "down": 1.0, "lambda": 0.1}
    numbers |= {"push": 0.0, "price": 0.0, "saturated": 0.0, "active": 1.0, "lag": 0.0}
    numbers |= {"share": 0.1, "mass": 1.0, **own}
    return {f"methods/isentropic/{k}": v for k, v in numbers.items()} | {
        "entropy": target - error,
        "correct": 0.5,
        "entropy_predicted": 0.0,
        "lr": 0.1,
        "lr_full": 0.1,
        "momentum": 0.9,
        "updates": 1.0,
        "max_entropy": 9.0,
    }


def integral(*steps: dict[str, float], i_gain: float = 0.01) -> float:
    method = holding(1.0, i_gain=i_gain)
    state = method.initial()
    for step in steps:
        state = method.observe(state, step)
    return float(state["integral"])


def test_the_integral_adds_up_small_errors_and_rests_while_saturated_or_far_away() -> None:
    assert integral(facts(0.1)) == pytest.approx(0.001)
    assert integral(facts(0.1), facts(0.1)) == pytest.approx(0.00195)
    for rests in (facts(0.1, saturated=1.0), facts(0.25), facts(-0.25), facts(0.1, active=0.0)):
        assert integral(facts(0.1), rests) == pytest.approx(0.00095)
    assert integral(facts(0.1), facts(-0.1, saturated=1.0)) == pytest.approx(-0.00005)


def test_the_integral_forgets_and_is_bounded() -> None:
    assert integral(*[facts(0.19)] * 500) == pytest.approx(0.01 * 0.19 * 20)
    assert abs(integral(*[facts(0.1)] * 20, *[facts(0.5)] * 60)) < 0.001
    assert integral(*[facts(0.19)] * 500, i_gain=1.0) == pytest.approx(0.2)  # p_gain · 0.5


def test_a_new_target_starts_a_new_integral() -> None:
    assert integral(facts(0.1), facts(0.1, target=0.9)) == 0.0


def test_targets_change_at_the_steps_that_were_named() -> None:
    method = Isentropic(target=0.5, changes=((3, 1.0), (7, 0.25)))
    assert [method.target_at(t) for t in (0, 2, 3, 6, 7, 99)] == [0.5, 0.5, 1, 1, 0.25, 0.25]
    with pytest.raises(ConfigError, match=r"steps \[7, 3\] must rise"):
        Isentropic(changes=((7, 1.0), (3, 0.5))).check()


def test_a_relative_target_is_that_of_the_first_step() -> None:
    t = random_table()
    method = Isentropic(target=0.5)
    assert answer(method, t).numbers["target"] == pytest.approx(0.5 * entropy(t))
    started = method.initial() | {"start": 3.0}
    assert answer(method, t, started).numbers["target"] == 1.5


def test_what_was_right_of_all_that_was_looked_at_is_remembered() -> None:
    method = holding(1.0)
    for right in (0.3, 0.8):
        state = method.observe(method.initial(), facts() | {"correct": right})
        assert state["fit"]["right"] == pytest.approx(math.log(right / (1 - right)))


def test_what_is_wanted_rests_the_entropy_and_closes_a_share_of_the_error_ahead() -> None:
    t = random_table()
    H, c = entropy(t), changes(t)
    up, down = float(c.clamp(min=0).sum()), -float(c.clamp(max=0).sum())
    method = holding(1.1 * H, mode="hold", lambda_max=1.0, first="weights", p_gain=0.1)
    for moment in (0.0, -0.2):  # what the optimizer still carries
        course = Filter(slope=0.3, drift=-0.03, moment=0.5 * moment, mass=0.5, begun=1.0)
        course.see(H, 0.02, 0)
        state = method.initial() | {"fit": course.state(), "beta": 0.9, "integral": 0.002}
        found = answer(method, t, state).numbers
        coming = 9 * 0.3 * (moment - 0.1)
        share = 0.1 + (0.1 * max(min(math.log(1.1) - coming, 0.5), -0.5) + 0.002) / 0.3
        assert found["share"] == pytest.approx(share, rel=1e-4)
        tilt = found["lambda"]
        assert found["wanted"] == pytest.approx(share, rel=1e-4)
        rises, falls = up * (1 + tilt), down * (1 - tilt)
        assert rises - falls == pytest.approx(share * (rises + falls), rel=1e-4)


def test_more_than_any_answer_could_give_counts_as_saturated() -> None:
    t = random_table(group=torch.zeros(400))
    knobs: dict[str, Any] = {"mode": "hold", "lambda_max": 1.0, "price_max": 1e9}
    found = answer(holding(2 * entropy(t), p_gain=1.0, **knobs), t).numbers
    assert (found["wanted"], found["saturated"]) == (0.9, 1.0)
    assert found["share"] == pytest.approx(0.9)
    assert answer(holding(2 * entropy(t), p_gain=0.1, **knobs), t).numbers["saturated"] == 0.0


def test_every_update_of_a_batch_answers_the_entropy_before_the_first() -> None:
    t = random_table()
    method = holding(1.0, mode="hold")
    first, second = answer(method, t), answer(method, replace(t, H=0.5 * t.H, H0=t.H))
    for name in ("error", "noise", "heading"):
        assert second.numbers[name] == first.numbers[name], name


def test_a_first_batch_without_tokens_is_no_start() -> None:
    method = Isentropic(target=0.5)
    nothing = {"methods/isentropic/" + k: 0.0 for k in ("target", "error", "saturated", "active")}
    nothing |= {"entropy": 0.0, "lr": 0.1, "lr_full": 0.1, "momentum": 0.9, "updates": 1.0}
    state = method.observe(method.initial(), nothing | {"max_entropy": 9.0})
    assert state["start"] is None
    t = random_table()
    assert answer(method, t, state).numbers["target"] == pytest.approx(0.5 * entropy(t))


def test_the_noise_of_a_batch_is_that_of_the_mean_over_its_groups() -> None:
    t = random_table()
    found = answer(holding(1.0, mode="hold"), t).numbers
    rng = torch.Generator().manual_seed(0)
    groups = t.group[t.main].unique()
    means = []
    for _ in range(2000):
        drawn = groups[torch.randint(len(groups), (len(groups),), generator=rng)]
        H = torch.cat([t.H[t.main & (t.group == g)] for g in drawn])
        means.append(float(H.mean()))
    spread = torch.tensor(means).std() / entropy(t)
    assert found["noise"] == pytest.approx(float(spread), rel=0.3)
    alone = replace(t, group=torch.zeros_like(t.group))
    assert "noise" not in answer(holding(1.0, mode="hold"), alone).numbers


# ---- in a step ---------------------------------------------------------------------------------


def test_without_weights_and_bonus_it_is_the_empty_list_bit_for_bit() -> None:
    plain = bits(train([], realised_every=1)[0])
    off = Isentropic(price_max=0.0, lambda_max=0.0, bonus_max=0.0)
    assert off.neutral
    assert bits(train([off], realised_every=1)[0]) == plain
    high = holding(1e-6)  # far below: a floor that has nothing to do
    assert bits(train([high], realised_every=1)[0]) == plain
    assert bits(train([holding(3.0, mode="hold")], realised_every=1)[0]) != plain
    assert bits(train([OPEFO], realised_every=1)[0]) != plain


@pytest.mark.parametrize("lambda_max", [0.5, 0.0])
def test_neither_order_nor_micro_batches_matter(lambda_max: float) -> None:
    pair = (holding(3.2, lambda_max=lambda_max), Steer())
    own: dict[str, Any] = {"loss": "decoupled_ppo", "updates_per_batch": 2}
    assert bits(train(pair, **own)[0]) == bits(train(pair[::-1], **own)[0])
    ends = [train(pair, steps=1, tokens_per_micro=n, **own)[1].metrics for n in (16, 10_000)]
    assert (ends[0]["methods/isentropic/price"] > 0) == (lambda_max == 0)
    for name in ("loss", "grad_norm", "entropy_bonus", "methods/isentropic/lambda"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3), name


def test_no_gradient_flows_through_the_weights() -> None:
    t = random_table()
    leaves = {k: getattr(t, k).clone().requires_grad_() for k in ("logp", "H", "N")}
    with torch.no_grad():
        found = answer(holding(2 * entropy(t)), replace(t, **leaves))
    assert found.weight is not None
    assert not found.weight.requires_grad


def test_masked_tokens_never_matter_and_a_broken_one_is_refused_by_name() -> None:
    t = random_table()
    nothing = torch.full_like(t.logp, float("nan"))
    filled = {k: torch.where(t.main, getattr(t, k), nothing) for k in ("logp", "H", "N", "push")}
    method = holding(2 * entropy(t))
    found, clean = answer(method, replace(t, **filled)), answer(method, t)
    assert found.numbers == clean.numbers
    assert found.weight is not None
    assert torch.isfinite(found.weight).all()
    assert found.where is not None
    assert clean.where is not None
    assert torch.equal(found.where, clean.where)
    at = int(t.main.nonzero()[3])
    H = t.H.clone()
    H[at] = float("nan")
    with pytest.raises(DataError, match=rf"'isentropic', dH: nan .* ticket {int(t.ticket[at])}"):
        answer(method, replace(t, H=H))


def test_a_batch_without_a_token_to_train_on_is_fine() -> None:
    t = random_table(mask=False)
    for method in (OPEFO, Isentropic(), holding(1.0, mode="hold")):
        found = method.govern(t, torch.zeros_like(t.logp), method.initial())
        assert (found.weight, found.bonus) == (None, 0.0)


def test_its_state_is_checkpointed_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = LearnerConfig(methods=(Isentropic(target=1.05, mode="hold"),), realised_every=2)

    def fresh() -> Any:
        return state_of(Policy(tiny_model(), config), RunConfig(), config)

    whole, first, second = fresh(), fresh(), fresh()
    for seed in range(6):
        train_step(whole, a_batch(seed), config)
    for seed in range(3):
        train_step(first, a_batch(seed), config)
    checkpoint.save(tmp_path / "c", first, b"")
    checkpoint.load(tmp_path / "c", second)
    assert second.methods_state["isentropic"]["fit"]["level"] is not None
    for seed in range(3, 6):
        train_step(second, a_batch(seed), config)
    assert second.methods_state == whole.methods_state
    assert bits(second) == bits(whole)


def test_a_state_of_an_earlier_filter_goes_on_with_a_fresh_one() -> None:
    method = holding(1.0)
    earlier = {"start": 2.0, "beta": 0.9, "filter": {"level": -1.0, "trend": 0.1}, "integral": 0.01}
    state = method.observe(earlier, facts())
    assert set(state) == set(method.initial())
    assert (state["start"], state["fit"]["level"]) == (2.0, 0.0)


def test_impossible_targets_and_a_second_owner_are_refused() -> None:
    def start(*methods: Any) -> Any:
        config = LearnerConfig(methods=methods, warmup_steps=0)
        config.check()
        return state_of(Policy(tiny_model(), config), RunConfig(), config), config

    above = math.log(32) + 0.1
    with pytest.raises(ConfigError, match=r"'isentropic': target = 3\.56574 nats is above"):
        start(holding(above))
    with pytest.raises(ConfigError, match=r"'isentropic': target = 3\.56574 nats is above"):
        start(holding(1.0, changes=((5, above),)))
    state, config = start(Isentropic(target=50.0, mode="hold"))
    with pytest.raises(ConfigError, match="target = 50 times the starting entropy is"):
        train_step(state, a_batch(), config)
    later = Isentropic(target=0.5, changes=((30, 1.0), (40, 50.0)))
    state, config = start(later)
    with pytest.raises(ConfigError, match="target = 50 times the starting entropy is"):
        train_step(state, a_batch(), config)
    with pytest.raises(DataError, match="'isentropic', observe: entropy is nan"):
        later.observe(later.initial(), facts() | {"entropy": float("nan")})
    with pytest.raises(ConfigError, match="both want to govern"):
        start(Isentropic(), AdaptiveEntropy())


def test_its_recipes_are_the_method_and_the_preset() -> None:
    for name, preset in (("isentropic", None), ("opefo", "opefo")):
        (found,) = recipe.load_all(name)["learner"].methods  # type: ignore[attr-defined]
        assert isinstance(found, Isentropic)
        assert found.preset == preset
