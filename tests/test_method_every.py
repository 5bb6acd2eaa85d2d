"""What every method, loss and estimator promises, one at a time, through a whole step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.metrics import known
from learner.config import LearnerConfig
from learner.item import Item
from learner.methods.adaptive_entropy import AdaptiveEntropy
from learner.methods.adora import Adora
from learner.methods.aepo import Aepo
from learner.methods.base import Method, check
from learner.methods.clip_cov import ClipCov
from learner.methods.compose import Methods
from learner.methods.entropy_bonus import EntropyBonus
from learner.methods.isentropic import Isentropic
from learner.methods.kl_cov import KlCov
from learner.methods.random_drop import RandomDrop
from learner.model import Policy
from learner.state import TrainState, state_of
from learner.step import StepReport, train_step
from tests.builders import make_group, make_rollout, make_segment, make_ticket, tiny_model
from tests.every import ALMOST_NEUTRAL, EVERY, METHODS, NEUTRAL, OPEN, Setting, a_mixed_batch
from tests.tables import make_table, random_table
from tests.test_methods import bits

TOLD = ("loss", "grad_norm", "entropy_predicted_up", "discriminator_std_all", "off_policy")


def named(settings: tuple[Setting, ...]) -> Any:
    return pytest.mark.parametrize("setting", settings, ids=lambda s: s.name.replace(" ", "-"))


def begin(setting: Setting, **fields: Any) -> tuple[TrainState, LearnerConfig]:
    """Two updates a step, so that ratios move; the realised change is measured."""
    base: dict[str, Any] = {"loss": "decoupled_ppo", "updates_per_batch": 2, "warmup_steps": 0}
    base |= {"lr": 1e-3, "threads": 1, "tokens_per_micro": 60, "realised_every": 1, "max_lag": 2}
    settings = LearnerConfig(methods=setting.methods, **{**base, **setting.fields, **fields})  # type: ignore[arg-type]
    settings.check()
    state = state_of(Policy(tiny_model(), settings), RunConfig(), settings)
    state.t = 1
    return state, settings


def train(
    setting: Setting, steps: int = 1, items: Any = a_mixed_batch, **fields: Any
) -> tuple[TrainState, StepReport]:
    state, settings = begin(setting, **fields)
    for seed in range(steps):
        report = train_step(state, items(seed), settings)
    return state, report


def alike(one: StepReport, other: StepReport, rel: float = 1e-3) -> None:
    """The same numbers but for the rounding of float32 sums; the same ones to begin with."""
    assert one.metrics.keys() == other.metrics.keys()
    for name, value in one.metrics.items():
        if name in TOLD or name.startswith("methods/"):
            scale = _size(value)
            assert other.metrics[name] == pytest.approx(value, rel=rel, abs=rel * scale), name


def _size(value: float | dict[str, float]) -> float:
    numbers = value.values() if isinstance(value, dict) else [value]
    return max((abs(x) for x in numbers), default=0.0)


# ---- what may and may not matter ---------------------------------------------------------------


@named(METHODS)
def test_it_reaches_the_gradient_and_says_what_it_did(setting: Setting) -> None:
    twice: dict[str, Any] = {"steps": 2, "items": lambda seed: a_mixed_batch()}
    state, report = train(setting, **twice)  # some know of the entropy after the first only
    plain, _ = train(setting._replace(methods=()), **twice)
    assert bits(state) != bits(plain)
    mark = f"methods/{setting.methods[0].name}/"
    own = {k: v for k, v in report.metrics.items() if k.startswith(mark)}
    assert all(known(key) for key in own)
    assert f"{mark}predicted" in own
    assert _size(own[f"{mark}predicted"]) > 0


@named(EVERY)
def test_micro_batches_do_not_matter(setting: Setting) -> None:
    alike(train(setting, tokens_per_micro=16)[1], train(setting, tokens_per_micro=10_000)[1])


@named(EVERY)
def test_the_order_in_which_groups_come_changes_no_bit(setting: Setting) -> None:
    forward, _ = train(setting)
    backward, _ = train(setting, items=lambda seed: a_mixed_batch(seed)[::-1])
    assert bits(forward) == bits(backward)


@named(METHODS)
def test_the_order_of_the_methods_changes_no_bit(setting: Setting) -> None:
    beside: tuple[Method, ...] = (RandomDrop(ratio=0.1), EntropyBonus(coefficient=0.01), Adora())
    names = {m.name for m in setting.methods}
    all_of_them = (*setting.methods, *(m for m in beside if m.name not in names))
    forward, there = train(setting._replace(methods=all_of_them))
    backward, back = train(setting._replace(methods=all_of_them[::-1]))
    assert bits(forward) == bits(backward)
    assert {k: v for k, v in there.metrics.items() if not k.endswith("_s")} == {
        k: v for k, v in back.metrics.items() if not k.endswith("_s")
    }


@pytest.fixture(scope="module")
def plain() -> dict[bool, bytes]:
    """The empty list, by whether the surrogate has no clip."""
    return {is_open: bits(train(Setting("", (), OPEN if is_open else {}))[0]) for is_open in (0, 1)}  # type: ignore[misc]


@named(NEUTRAL)
def test_at_its_neutral_knob_it_is_the_empty_list_bit_for_bit(
    setting: Setting, plain: dict[bool, bytes]
) -> None:
    (method,) = setting.methods
    assert method.neutral
    method.check()
    assert bits(train(setting)[0]) == plain[bool(setting.fields)]


@named(ALMOST_NEUTRAL)
def test_next_to_its_neutral_knob_it_runs_and_is_the_empty_list_bit_for_bit(
    setting: Setting, plain: dict[bool, bytes]
) -> None:
    assert not setting.methods[0].neutral
    assert bits(train(setting)[0]) == plain[bool(setting.fields)]


# ---- gradients ---------------------------------------------------------------------------------


@named(METHODS)
def test_no_gradient_flows_through_anything_but_the_loss_it_adds(setting: Setting) -> None:
    table = random_table(aux=torch.arange(400) >= 350)
    leaves = {k: getattr(table, k).clone().requires_grad_() for k in ("logp", "lp", "H", "N")}
    methods = Methods(setting.methods)
    live = replace(table, **leaves)
    found = methods.factors(live, lambda weight: -torch.ones_like(table.logp), methods.initial())
    for tensor in (found.weight, found.where, *found.plans.values(), *found.own.values()):
        assert tensor is None or not tensor.requires_grad
    extra = methods.extra_loss(live, found.plans)
    if extra is not None:
        slopes = torch.autograd.grad(extra.sum(), list(leaves.values()), allow_unused=True)
        by_lp, by_N = slopes[1], slopes[3]
        assert by_N is None
        assert by_lp is None or setting.name == "aepo"  # whose lp is the table's, a constant


# ---- bad input ---------------------------------------------------------------------------------


@named(EVERY)
def test_a_batch_without_a_token_to_train_on_has_a_finite_loss_of_zero(setting: Setting) -> None:
    def masked(seed: int) -> list[Item]:
        rollouts = (make_rollout(0.0, segments=(make_segment([5, 6], mask=[0, 0]),)),) * 2
        return [Item(make_ticket(), make_group([0, 0], rollouts=rollouts))]

    state, report = train(setting, items=masked)
    assert (report.metrics["loss"], report.metrics["grad_norm"]) == (0.0, 0.0)
    untouched = state_of(Policy(tiny_model(), LearnerConfig()), RunConfig(), LearnerConfig())
    assert bits(state) == bits(untouched)


def test_what_masked_tokens_came_with_never_reaches_the_loss() -> None:
    def items(seed: int, logp: float = -1.0) -> list[Item]:
        found = a_mixed_batch(seed)
        for rollout in found[0].group.rollouts:
            rollout.segments[0].logps[:1] = logp
        mask = [make_segment([7, 8, 9], [logp] * 3, version=1, mask=[0, 1, 0])]
        mask[0].logps[1] = -1.0
        rollouts = tuple(make_rollout(r, segments=tuple(mask)) for r in (1.0, 0.0))
        return [*found[1:], Item(make_ticket(200), make_group([1, 0], 200, rollouts=rollouts))]

    for setting in (METHODS[5], EVERY[-5], EVERY[-3], EVERY[-1]):
        ends = [
            train(setting, items=lambda seed, logp=logp: items(seed, logp))[0]
            for logp in (-1.0, float("nan"))
        ]
        assert bits(ends[0]) == bits(ends[1])


class LogProbsOnly(Policy):
    """A policy whose head sums nothing over the vocabulary."""

    statistics = ""


@pytest.mark.parametrize("methods", [s.methods for s in METHODS], ids=lambda m: m[0].name)
def test_a_head_without_the_statistics_that_a_method_reads_is_refused(
    methods: tuple[Method, ...],
) -> None:
    config = LearnerConfig(methods=methods)  # type: ignore[arg-type]
    policy = LogProbsOnly(tiny_model(), config)
    reads = methods[0].statistics
    if isinstance(methods[0], (ClipCov, KlCov, RandomDrop, Adora)):
        assert reads == ""
        state_of(policy, RunConfig(), config)
        return
    line = rf"methods: '{methods[0].name}' reads {' and '.join(reads)} of the whole vocabulary"
    with pytest.raises(ConfigError, match=line):
        state_of(policy, RunConfig(), config)


def test_two_set_points_in_one_recipe_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'adaptive_entropy' and 'isentropic' both want to gov"):
        LearnerConfig(methods=(Isentropic(), AdaptiveEntropy())).check()
    check((Isentropic(), Aepo(), Adora()))


def test_an_entropy_that_is_no_number_is_refused_with_its_token_by_those_that_follow_it() -> None:
    t = make_table([-1.0, -2.0, -3.0], 1.0, H=[0.5, float("nan"), 0.5])
    where = r"H: nan at position 1 of rollout 1 of ticket 0"
    with pytest.raises(DataError, match=f"'adaptive_entropy', {where}"):
        AdaptiveEntropy().govern(t, t.logp, AdaptiveEntropy().initial())
    with pytest.raises(DataError, match=r"'entropy_bonus', extra_loss: nan at position 1 of rol"):
        Methods([EntropyBonus()]).extra_loss(t, {})
    for method in (Aepo(), AdaptiveEntropy()):
        with pytest.raises(DataError, match=f"'{method.name}', observe: entropy is nan"):
            method.observe(method.initial(), {"entropy": float("nan")})
    masked = make_table([-1.0, -2.0], 1.0, H=[0.5, float("nan")], mask=[True, False])
    extra = Methods([EntropyBonus(coefficient=1.0)]).extra_loss(masked, {})
    assert extra is not None
    assert extra.tolist() == [-0.5, 0.0]
