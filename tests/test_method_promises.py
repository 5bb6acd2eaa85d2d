"""What every method that drops or weighs tokens promises, whatever its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import msgspec
import pytest
import torch

from common import recipe
from common.errors import DataError
from common.metrics import known
from learner.config import LearnerConfig
from learner.methods.base import Method
from learner.methods.clip_b import ClipB
from learner.methods.clip_cov import ClipCov
from learner.methods.clip_v import ClipV
from learner.methods.compose import Factors, Methods
from learner.methods.entropy_advantage import EntropyAdvantage
from learner.methods.random_drop import RandomDrop
from learner.methods.steer import Steer
from learner.methods.top_entropy import TopEntropy
from learner.state import TrainState
from learner.step import StepReport
from learner.table import Table
from tests.tables import random_table, with_surrogate
from tests.test_methods import bits
from tests.test_methods import train as train_with

# each at a strength that shows on a small batch
STRONG: tuple[Method, ...] = (
    Steer(),
    ClipCov(ratio=0.05, low=0.1),
    ClipB(mu=0.1),
    ClipV(mu=0.1, max_frac=0.2),
    TopEntropy(),
    EntropyAdvantage(),
    RandomDrop(ratio=0.05),
)
VARIANTS: tuple[Method, ...] = (
    *STRONG,
    Steer(form="released", map="linear"),
    Steer(form="centred", map="asymmetric", max_quantile=0.99),
    ClipB(mu=0.7, sides="two_sided", denominator="kept"),
    ClipV(mu=0.7, sides="entropy_lowering", denominator="kept"),
    TopEntropy(denominator="kept"),
    RandomDrop(ratio=0.05, advantage="any"),
)
OFF: tuple[Method, ...] = (
    Steer(lambda_min=1.0),
    Steer(form="released", map="linear", lambda_min=1.0, lambda_max=1.0),
    ClipCov(ratio=0.0),
    ClipB(mu=float("inf")),
    ClipV(mu=float("inf")),
    TopEntropy(keep=1.0),
    EntropyAdvantage(alpha=0.0),
    RandomDrop(ratio=0.0),
)
ALMOST_OFF: tuple[Method, ...] = (
    Steer(floor=1e30),
    ClipCov(low=1e9, high=1e10),
    ClipB(mu=1e9),
    ClipV(mu=1e9),
    TopEntropy(keep=1 - 1e-12),
    EntropyAdvantage(alpha=1e-30),
)


def train(methods: Sequence[Method], **fields: Any) -> tuple[TrainState, StepReport]:
    """The made-up log-probs of the test batch are far from the model's: ratios to lp, not to lb."""
    return train_with(methods, loss="decoupled_ppo", **fields)


def name_of(method: Method) -> str:
    return repr(method)[:60]


def factors(methods: Sequence[Method], table: Table) -> Factors:
    return Methods(methods).factors(table, lambda weight: torch.zeros_like(table.logp), {})


def weight(methods: Sequence[Method], table: Table) -> torch.Tensor:
    found = factors(methods, table).weight
    assert found is not None
    return found


every_variant = pytest.mark.parametrize("method", VARIANTS, ids=name_of)


# ---- what may and may not matter ---------------------------------------------------------------


@every_variant
def test_it_does_something(method: Method) -> None:
    t = random_table()
    assert (weight([method], t)[t.main] != 1).any()


@every_variant
def test_masked_and_aux_tokens_never_matter_not_even_when_they_are_not_numbers(
    method: Method,
) -> None:
    t = random_table(aux=torch.arange(400) >= 350)
    nothing = torch.full_like(t.logp, float("nan"))
    filled = {
        name: torch.where(t.main, getattr(t, name), nothing)
        for name in ("logp", "lp", "old", "lb", "H", "N", "push")
    }
    assert torch.equal(weight([method], replace(t, **filled))[t.main], weight([method], t)[t.main])
    assert (t.mask & ~t.main).any()
    alone = t.take(t.main.nonzero().squeeze(1))
    assert torch.allclose(weight([method], alone), weight([method], t)[t.main], rtol=1e-12)


@every_variant
def test_the_order_of_the_lines_does_not_matter(method: Method) -> None:
    t = random_table()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    moved = weight([method], t.take(order))
    assert torch.allclose(moved, weight([method], t)[order], rtol=1e-12)


@every_variant
def test_no_gradient_flows_through_what_it_says(method: Method) -> None:
    t = random_table()
    leaves = {k: getattr(t, k).clone().requires_grad_() for k in ("logp", "lp", "H", "N")}
    found = weight([method], replace(t, **leaves))
    assert not found.requires_grad
    assert torch.equal(found, weight([method], t))


@every_variant
def test_a_batch_without_a_token_to_train_on_is_fine(method: Method) -> None:
    t = random_table(mask=False)
    found = factors([method], t)
    assert found.weight is None or torch.isfinite(found.weight).all()
    for key, value in found.effects.items():
        assert value in (0.0, {}), key


@pytest.mark.parametrize(
    ("method", "column", "statistic"),
    [
        (Steer(), "H", "Ω"),
        (Steer(form="released"), "old", "Ω"),
        (Steer(form="centred"), "N", "Ω"),
        (ClipCov(), "logp", "l"),
        (ClipCov(), "advantage", "A"),
        (ClipB(), "H", "S"),
        (ClipV(), "N", "D"),
        (TopEntropy(), "H", "H"),
        (EntropyAdvantage(), "H", "H"),
    ],
    ids=name_of,
)
def test_a_statistic_that_is_no_number_is_refused_with_its_token(
    method: Method, column: str, statistic: str
) -> None:
    t = random_table()
    broken = getattr(t, column).clone()
    at = int(t.main.nonzero()[17])
    broken[at] = float("nan")
    if column == "old":
        broken[at] = float("-inf")  # clamped by the released code, so a number
        assert torch.isfinite(weight([method], replace(t, old=broken))).all()
        broken[at] = float("nan")
    where = f"{int(t.position[at])} of rollout {int(t.rollout[at])} of ticket {int(t.ticket[at])}"
    with pytest.raises(DataError, match=f"'{method.name}', {statistic}: nan at position {where}"):
        factors([method], replace(t, **{column: broken}))


# ---- composition -------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", list(combinations(STRONG, 2)), ids=lambda p: name_of(p[0]))
def test_two_of_them_give_the_same_bits_in_either_order(pair: tuple[Method, Method]) -> None:
    t = random_table()
    both = weight(pair, t)
    assert torch.equal(both, weight(pair[::-1], t))
    dropped = [weight([m], t) == 0 for m in pair]
    assert torch.equal(both == 0, dropped[0] | dropped[1])


def test_what_one_drops_does_not_enter_the_extremes_of_another() -> None:
    t = random_table()
    steer, drop = Steer(), TopEntropy(keep=0.5)
    survivors = t.main & ~drop.drop(t)
    both = weight([steer, drop], t)
    assert both[survivors].min() == 0.7
    assert torch.allclose(both[survivors], steer.weigh(t, survivors)[survivors])


@pytest.fixture(scope="module")
def plain() -> bytes:
    return bits(train([])[0])


@pytest.mark.parametrize("method", OFF, ids=name_of)
def test_at_its_neutral_knob_it_is_left_out(method: Method) -> None:
    assert method.neutral
    method.check()


def test_neutral_knobs_are_the_empty_list_bit_for_bit(plain: bytes) -> None:
    by_name = {m.name: m for m in OFF}
    assert len(by_name) == 7
    assert bits(train(tuple(by_name.values()))[0]) == plain


@pytest.mark.parametrize("method", ALMOST_OFF, ids=name_of)
def test_next_to_its_neutral_knob_it_is_the_empty_list_bit_for_bit(
    method: Method, plain: bytes
) -> None:
    assert not method.neutral
    assert bits(train([method])[0]) == plain


@pytest.mark.parametrize("method", STRONG, ids=name_of)
def test_it_reaches_the_gradient_and_says_what_it_did(method: Method, plain: bytes) -> None:
    state, report = train([method])
    assert bits(state) != plain
    own = {k: v for k, v in report.metrics.items() if k.startswith(f"methods/{method.name}/")}
    assert own
    assert all(known(key) for key in own)


def test_neither_order_nor_micro_batches_change_what_all_of_them_do_together() -> None:
    forward, _ = train(STRONG, updates_per_batch=2)
    backward, _ = train(STRONG[::-1], updates_per_batch=2)
    assert bits(forward) == bits(backward)
    ends = [train(STRONG, steps=1, tokens_per_micro=n)[1].metrics for n in (16, 10_000)]
    for name in ("loss", "grad_norm", "entropy_predicted", "methods/clip_b/dropped"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3), name


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "sapo", "reinforce"])
def test_it_works_with_every_loss(loss: Any) -> None:
    config = LearnerConfig(loss=loss)
    t = with_surrogate(random_table(), config)
    found = weight(STRONG, t)
    assert torch.isfinite(found).all()
    assert (found[t.main] != 1).any()


# ---- what it says ------------------------------------------------------------------------------


def test_the_effects_count_tokens_and_signs() -> None:
    t = random_table()
    found = factors([ClipV(mu=0.7, max_frac=1.0), Steer()], t)
    dropped = ClipV(mu=0.7, max_frac=1.0).drop(t)
    n = int(t.main.sum())
    assert found.effects["methods/clip_v/dropped"] == int(dropped.sum()) / n
    assert found.effects["methods/clip_v/negative"] == 1.0
    by_lag = found.effects["methods/clip_v/dropped_by_lag"]
    assert isinstance(by_lag, dict)
    for lag, share in by_lag.items():
        on = t.main & (t.lag == int(lag))
        assert share == pytest.approx(int((dropped & on).sum()) / int(on.sum()))
    alive = t.main & ~dropped
    own = Steer().weigh(t, alive)[alive]
    quantiles = found.effects["methods/steer/weight"]
    assert isinstance(quantiles, dict)
    assert quantiles["min"] == 0.7
    assert quantiles["q50"] == pytest.approx(float(own.quantile(0.5)))
    assert found.effects["methods/steer/affected"] == pytest.approx(
        float((own != 1).double().mean())
    )


# ---- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STRONG, ids=lambda m: m.name)
def test_each_has_a_recipe_and_its_defaults_are_a_bare_type(method: Method) -> None:
    (of_recipe,) = recipe.load_all(method.name)["learner"].methods  # type: ignore[attr-defined]
    assert type(of_recipe) is type(method)
    rows = {"methods": [{"type": method.name}]}
    (bare,) = msgspec.convert(rows, LearnerConfig).methods
    assert bare == type(method)()
