"""The seam: a throw-away method for every hook, and the rules by which methods compose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from common import wire
from common.config import RunConfig
from common.errors import ConfigError, DataError
from learner import model as models
from learner.config import LearnerConfig
from learner.methods.base import Ask, Governed, Method, State, check
from learner.methods.entropy_bonus import EntropyBonus
from learner.model import Policy
from learner.state import TrainState, state_of
from learner.step import StepReport, train_step
from learner.table import Table
from tests.builders import make_group, make_ticket, tiny_model
from tests.test_step import a_batch

# ---- one throw-away method a hook --------------------------------------------------------------


class Louder(Method, frozen=True, kw_only=True, tag="louder"):
    factor: float = 2.0

    def scale_groups(self, groups: Sequence[wire.Group]) -> np.ndarray:
        return np.array([self.factor if g.ticket % 2 else 1.0 for g in groups])


class DropUnlikely(Method, frozen=True, kw_only=True, tag="drop_unlikely"):
    needs_table: ClassVar[bool] = True
    below: float = -3.0

    def drop(self, table: Table) -> Tensor:
        return table.logp < self.below


class DropSome(Method, frozen=True, kw_only=True, tag="drop_some"):
    needs_table: ClassVar[bool] = True
    n: int = 5

    def drop(self, table: Table) -> Tensor:
        return table.draw(self.name, self.n, table.advantage > 0)


class Halve(Method, frozen=True, kw_only=True, tag="halve"):
    needs_table: ClassVar[bool] = True

    def weigh(self, table: Table, alive: Tensor) -> Tensor:
        return torch.where(alive & (table.H[alive].mean() < table.H), 0.5, 1.0)


class Quench(Method, frozen=True, kw_only=True, tag="quench"):
    """Twice the loss where it lowers entropy, given what all others leave of it."""

    needs_table: ClassVar[bool] = True

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
        assert table is not None
        assert c is not None
        lowers = c * (table.S - table.N) < 0
        return Governed(torch.where(lowers, 2.0, 1.0), bonus=state.get("bonus", 0.0))


class Thermostat(Method, frozen=True, kw_only=True, tag="thermostat"):
    """A bonus that grows by one thousandth a step; sees no table."""

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
        assert table is None
        return Governed(bonus=state["bonus"])

    def initial(self) -> State:
        return {"bonus": 0.0}

    def observe(self, state: State, facts: Mapping[str, float]) -> State:
        assert facts["entropy"] > 0
        return {"bonus": state["bonus"] + 1e-3}


class Uneven(Method, frozen=True, kw_only=True, tag="uneven"):
    """A bonus on the entropy of first tokens, and half as much against that of the others."""

    needs_table: ClassVar[bool] = True

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
        assert table is not None
        return Governed(bonus=0.5, where=torch.where(table.position == 0, 1.0, -0.5))


class PullUp(Method, frozen=True, kw_only=True, tag="pull_up"):
    """An extra loss on the three least likely tokens of the batch."""

    needs_table: ClassVar[bool] = True

    def plan(self, table: Table, alive: Tensor) -> Tensor:
        plan = torch.zeros_like(table.logp)
        plan[table.logp.argsort()[:3]] = 1.0
        return plan

    def extra_loss(self, table: Table, plan: Tensor | None) -> Tensor:
        assert plan is not None
        return -plan * table.logp


class Curious(Method, frozen=True, kw_only=True, tag="curious"):
    """Asks for warmer aux samples, and trains on the rewarded ones."""

    def ask(self, stats: Mapping[str, float], state: State) -> Ask:
        return Ask(groups=2, temperature=1.0 + stats.get("entropy", 0.0) / 10)

    def extra_loss(self, table: Table, plan: Tensor | None) -> Tensor:
        return -(table.aux & (table.advantage > 0)).float() * table.logp


class Broken(Method, frozen=True, kw_only=True, tag="broken"):
    needs_table: ClassVar[bool] = True
    how: str = "nan"

    def weigh(self, table: Table, alive: Tensor) -> Tensor:
        weight = torch.ones_like(table.logp)
        if self.how == "nan":
            weight[3] = float("nan")
        if self.how == "shape":
            return weight[1:]
        return weight.requires_grad_() if self.how == "gradient" else weight


def train(
    methods: Sequence[Method],
    steps: int = 2,
    items: Any = a_batch,
    lr: float = 1e-3,
    **fields: Any,
) -> tuple[TrainState, StepReport]:
    # constructed, not decoded: test methods are not part of AnyMethod
    base = {"warmup_steps": 0, "threads": 1, "tokens_per_micro": 60, "realised_every": 0}
    settings = LearnerConfig(lr=lr, methods=tuple(methods), **{**base, **fields})  # type: ignore[arg-type]
    state = state_of(Policy(tiny_model(), settings), RunConfig(), settings)
    for seed in range(steps):
        report = train_step(state, items(seed), settings)
    return state, report


def bits(state: TrainState) -> bytes:
    return b"".join(bytes(b.data) for b in models.snapshot(state.model, "fp32"))


EVERY = (
    Louder(),
    DropUnlikely(),
    DropSome(),
    Halve(),
    Quench(),
    PullUp(),
    EntropyBonus(),
    Curious(),
)


@pytest.fixture(scope="module")
def plain() -> bytes:
    return bits(train([])[0])


# ---- each hook does something, neutral knobs do nothing ----------------------------------------


@pytest.mark.parametrize(
    "method",
    [Louder(), DropUnlikely(), DropSome(), Halve(), Quench(), Thermostat(), PullUp()],
    ids=lambda m: m.name,
)
def test_every_hook_reaches_the_gradient(method: Method, plain: bytes) -> None:
    assert bits(train([method])[0]) != plain


def test_a_table_that_nobody_uses_changes_no_bit(plain: bytes) -> None:
    assert bits(train([DropUnlikely(below=-1e9)])[0]) == plain
    assert bits(train([Louder(factor=1.0)])[0]) == plain


def test_the_entropy_bonus_at_zero_is_the_empty_list_and_above_raises_entropy(
    plain: bytes,
) -> None:
    assert bits(train([EntropyBonus(coefficient=0.0)])[0]) == plain
    _, without = train([], steps=8)
    _, with_bonus = train([EntropyBonus(coefficient=1.0)], steps=8)
    assert with_bonus.metrics["entropy"] > without.metrics["entropy"]


@pytest.mark.parametrize("method", [EntropyBonus(coefficient=0.5), Uneven()])
def test_the_bonus_differentiates_the_mean_entropy_of_where_it_is(method: Method) -> None:
    """With advantages of zero the step is gradient ascent on H, by the coefficient."""
    from learner.batch import flatten
    from tests.test_model import padded

    def still(seed: int) -> Any:
        return [i._replace(group=make_group([1, 1, 1, 1], ticket=i.ticket.id)) for i in a_batch()]

    settings = LearnerConfig(methods=(method,), warmup_steps=0, lr=1.0, grad_clip=1e9)  # type: ignore[arg-type]
    state = state_of(Policy(tiny_model(), settings), RunConfig(), settings)
    state.optimizer = torch.optim.SGD(state.masters.values(), lr=1.0)
    net = tiny_model()
    net.set_attn_implementation("sdpa")
    batch = flatten(still(0), 0)
    where = torch.where(batch.static.position == 0, 1.0, -0.5)
    H = padded(net, batch)[1] * (where if isinstance(method, Uneven) else 1.0)
    (0.5 * H.mean()).backward()
    before = {n: m.detach().clone() for n, m in state.masters.items()}
    train_step(state, still(0), settings)
    for name, parameter in net.named_parameters():
        moved = state.masters[name].detach() - before[name]
        assert torch.allclose(moved, parameter.grad, atol=1e-4), name


def test_a_dropped_token_leaves_the_sum_and_stays_in_the_denominator() -> None:
    class Keep(DropSome, frozen=True, kw_only=True, tag="keep"):
        def drop(self, table: Table) -> Tensor:
            return table.row != 1

    def loss_of(items: Any) -> tuple[float, float]:
        _, report = train([Keep()], 1, lambda seed: items, loss="reinforce", advantage="dr_grpo")
        loss, tokens = report.metrics["loss"], report.metrics["tokens"]
        assert isinstance(loss, float)
        assert isinstance(tokens, float)
        return loss * tokens, tokens

    # dr_grpo gives row 1 the advantage 1/2 in its group alone and among all four groups
    whole, tokens = loss_of(a_batch())
    first, fewer = loss_of(a_batch()[:1])
    assert fewer < tokens == sum(r.length for i in a_batch() for r in i.group.rollouts)
    assert whole == pytest.approx(first, rel=1e-4)
    assert whole != 0


def test_govern_comes_last_and_sees_what_the_others_left() -> None:
    seen: list[Tensor] = []

    class Watch(Quench, frozen=True, kw_only=True, tag="watch"):
        def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
            assert table is not None
            assert c is not None
            seen.append(c[table.draw("drop_some", 5, table.advantage > 0)])
            return Governed()

    train([Watch(), DropSome()], steps=1)
    assert (seen[0] == 0).all()
    train([Watch()], steps=1)
    assert (seen[1] != 0).all()


def test_aux_rows_meet_extra_losses_only() -> None:
    def with_aux(seed: int) -> Any:
        aux = make_group([1, 0, 1, 0], ticket=100, kind="aux")
        ticket = make_ticket(100, kind="aux", n=4)
        return [*a_batch(seed), a_batch()[0]._replace(ticket=ticket, group=aux)]

    _, alone = train([], steps=1)
    _, beside = train([], steps=1, items=with_aux)
    for name in ("loss", "grad_norm", "entropy", "tokens", "reward", "ess_share"):
        assert beside.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-4), name
    _, curious = train([Curious()], steps=1, items=with_aux)
    assert curious.metrics["grad_norm"] != pytest.approx(alone.metrics["grad_norm"], rel=1e-2)
    entropy = curious.metrics["entropy"]
    assert isinstance(entropy, float)
    assert curious.ask == Ask(groups=2, temperature=1.0 + entropy / 10)


def test_states_are_observed_once_a_step_and_used_in_the_next() -> None:
    state, report = train([Thermostat()], steps=4)
    assert state.methods_state == {"thermostat": {"bonus": pytest.approx(4e-3)}}
    assert report.metrics["entropy_bonus"] == pytest.approx(3e-3)


# ---- composition -------------------------------------------------------------------------------


def test_the_order_of_the_list_changes_no_bit() -> None:
    forward, backward = train(EVERY), train(EVERY[::-1])
    assert bits(forward[0]) == bits(backward[0])
    assert forward[1].metrics["loss"] == backward[1].metrics["loss"]


def test_factors_do_not_depend_on_micro_batches() -> None:
    ends = [train(EVERY, steps=1, tokens_per_micro=n)[1].metrics for n in (16, 10_000)]
    for name in ("loss", "grad_norm", "entropy_predicted"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3)


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ((Quench(), Thermostat()), "'quench' and 'thermostat' both want to govern"),
        ((EntropyBonus(), EntropyBonus()), "'entropy_bonus' is listed twice"),
    ],
)
def test_lists_that_cannot_work_are_refused_at_the_start(
    pair: tuple[Method, ...], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        check(pair)
    with pytest.raises(ConfigError, match=line):
        train(pair)


def test_two_that_ask_are_refused_and_a_blind_drop_as_well() -> None:
    class Other(Curious, frozen=True, kw_only=True, tag="other"):
        pass

    class Blind(Method, frozen=True, kw_only=True, tag="blind"):
        def drop(self, table: Table) -> Tensor:
            return table.mask

    with pytest.raises(ConfigError, match="'curious' and 'other' both want to ask"):
        check((Curious(), Other()))
    with pytest.raises(ConfigError, match="'blind' has `drop` but not `needs_table`"):
        check((Blind(),))


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("nan", r"method 'broken', weigh: nan at position \d+ of rollout \d+ of ticket \d+"),
        ("shape", r"method 'broken', weigh: shape \(\d+,\) for \d+ tokens"),
        ("gradient", "method 'broken', weigh: the answer carries a gradient"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused_by_name(how: str, line: str) -> None:
    with pytest.raises(DataError, match=line):
        train([Broken(how=how)])


# ---- recipes -----------------------------------------------------------------------------------


def test_the_table_of_a_recipe_is_the_struct() -> None:
    rows = {"methods": [{"type": "entropy_bonus", "coefficient": 0.01}]}
    assert msgspec.convert(rows, LearnerConfig).methods == (EntropyBonus(coefficient=0.01),)
    for wrong in ({"type": "entropy_bonas"}, {"type": "entropy_bonus", "coef": 1.0}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"methods": [wrong]}, LearnerConfig)


def test_recipes_are_read_without_torch() -> None:
    code = "import sys, learner.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
