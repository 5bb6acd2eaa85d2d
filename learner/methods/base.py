"""The seam where methods plug in: a frozen struct, its fields the knobs, its functions the hooks.

A method overrides the hooks it has something to say in; the others are neutral, so that methods
compose:

    scale_groups   product      once a step
    drop           union        once an update, first
    weigh          product      once an update, of the tokens still alive
    govern         one owner    once an update, last
    extra_loss     sum          every micro-batch, on a plan that was made on the whole table
    ask            one owner    after a step
    observe        own state    after a step

Everything but `extra_loss` runs without gradient and sees the whole batch, whatever the micro-
batches and ranks are. A method sees tables and groups only: it reaches no model, no
configuration, no other method. This module never imports torch, so that recipes are read without
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec

from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from common import wire
    from learner.methods.effect import Value
    from learner.table import Table

State = dict[str, Any]  # what JSON can hold


class Governed(NamedTuple):
    """The answer of `govern`: factors of the tokens' losses, and an entropy bonus."""

    weight: Tensor | None = None  # float32 [T]
    bonus: float = 0.0  # its coefficient
    where: Tensor | None = None  # float32 [T]: how much of it each token gets; None: all 1
    numbers: Mapping[str, float] = {}  # for the log, and for `observe`, as methods/NAME/KEY


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """How the next aux tickets shall be: number of groups and sampling temperature."""

    groups: int
    temperature: float


class Method(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"
):
    needs_table: ClassVar[bool] = False  # a table of l, lp, H, N before the first gradient

    @property
    def name(self) -> str:
        return str(type(self).__struct_config__.tag)

    @property
    def statistics(self) -> str:
        """Which sums over the whole vocabulary it reads: "", "H" or "HN"."""
        return "HN" if self.needs_table else ""

    @property
    def neutral(self) -> bool:
        """True when the knobs make the method do nothing; it is then left out altogether."""
        return False

    def check(self) -> None:
        """Raises ConfigError for knobs that cannot work together."""

    def fits(self, max_entropy: float) -> None:
        """Raises ConfigError for knobs that no policy with entropies up to log V can serve."""

    def scale_groups(self, groups: Sequence[wire.Group]) -> np.ndarray | None:
        """float [G]: factors of the advantages of the batch's main groups, by ticket id."""
        return None

    def group_numbers(self, groups: Sequence[wire.Group]) -> Mapping[str, float]:
        """What the log shall say of these groups, as methods/NAME/KEY."""
        return {}

    def drop(self, table: Table) -> Tensor | None:
        """bool [T]: tokens to take out of the loss (True: out). The denominator stays."""
        return None

    def weigh(self, table: Table, alive: Tensor) -> Tensor | None:
        """float [T]: factors of the losses.

        `alive` bool [T]: trained on, with an importance weight above 0, and not dropped.
        """
        return None

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed | None:
        """The set-point's answer, given c_i = dLoss/dl_i [T] under all other factors.

        Without `needs_table` both are None: then only the state decides.
        """
        return None

    def plan(self, table: Table, alive: Tensor) -> Tensor | None:
        """[T]: what `extra_loss` wants to know that only the whole table tells."""
        return None

    def numbers(self, table: Table, plan: Tensor) -> Mapping[str, Value]:
        """What the log shall say of a plan, as methods/NAME/KEY."""
        return {}

    def extra_loss(self, table: Table, plan: Tensor | None) -> Tensor | None:
        """float [T]: a loss added to each token's, under the same denominators.

        `table` holds the tokens of (part of) a micro-batch, `logp` and `H` with gradient; `plan`
        their part of the plan. Aux tokens have no other loss; their denominator is (aux rollouts
        · length).
        """
        return None

    def ask(self, stats: Mapping[str, float], state: State) -> Ask | None:
        """What to generate beside the main tickets next, given the last step's metrics.

        Before the first step there are none but `n_aux`, the number of groups there is room for.
        """
        return None

    def initial(self) -> State:
        """The state before the first step."""
        return {}

    def observe(self, state: State, facts: Mapping[str, float]) -> State:
        """The next state, given the step's metrics (those that are the same on every machine)."""
        return state


def finite(method: Method, what: str, values: Tensor, on: Tensor, table: Table) -> Tensor:
    """`values` [T] with 0 outside the bool column `on`.

    Raises DataError, naming the token, when one inside is not finite.
    """
    inside = values.masked_fill(~on, 0.0)
    bad = (~inside.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"method {method.name!r}, {what}: {float(values[i])} at position "
            f"{int(table.position[i])} of rollout {int(table.rollout[i])} of ticket "
            f"{int(table.ticket[i])}"
        )
    return inside


def known(method: Method, facts: Mapping[str, float], name: str) -> float:
    """A number of the last step. Raises DataError when it is none."""
    value = facts[name]
    if not math.isfinite(value):
        raise DataError(f"method {method.name!r}, observe: {name} is {value} after the step")
    return value


def moments(values: Tensor, on: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation of `values` [T] where `on`, in float64; 0 of none."""
    chosen = values[on].double()
    if not len(chosen):
        return 0.0, 0.0
    return float(chosen.mean()), float(chosen.std(correction=0))


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of `values` [n], n > 0, interpolated linearly; of any number of values."""
    return quantiles(values, (share,))[0]


def quantiles(values: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Several of them."""
    ordered = values.sort().values
    found = []
    for share in shares:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        found.append(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
    return found


def blocks(table: Table, on: Tensor, rollouts: int | None) -> Iterator[Tensor]:
    """bool columns that split `on` into runs of so many rollouts; None: `on` as it is.

    They stand for the micro-batches of codes that take their statistics of one at a time.
    """
    if rollouts is None:
        yield on
        return
    block = table.row // rollouts
    for number in sorted(set(block[on].tolist())):
        yield on & (block == number)


def kept(dropped: Tensor, table: Table) -> Tensor:
    """float [T]: one factor, tokens / tokens that are not dropped.

    It turns the mean over all main tokens (`token_mean`) into the mean over the kept ones.
    """
    tokens = int(table.main.sum())
    factor = tokens / max(1, tokens - int(dropped.sum()))
    return table.logp.new_full(table.logp.shape, factor)


def overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)


def asks(method: Method) -> bool:
    """Whether aux groups are generated for it."""
    return overrides(method, "ask") and not method.neutral


def refuse_blind(method: Method, given: str) -> None:
    """Raises ConfigError for sums over the vocabulary that the policy's head does not give."""
    missing = " and ".join(name for name in method.statistics if name not in given)
    if missing:
        raise ConfigError(
            f"methods: {method.name!r} reads {missing} of the whole vocabulary, which the head of "
            "this policy does not give; take one that does, or leave the method out"
        )


def refuse_above(method: Method, what: str, target: float, max_entropy: float) -> None:
    """Raises ConfigError for an entropy that no policy over this vocabulary has."""
    if target > max_entropy:
        raise ConfigError(
            f"methods: {method.name!r}: {what} = {target:g} nats is above the largest entropy of "
            f"this vocabulary, {max_entropy:.3f}; take less"
        )


def check(methods: Sequence[Method]) -> None:
    """Refuse a list that cannot work together: raises ConfigError naming the culprits."""
    for method in methods:
        method.check()
    names = sorted(m.name for m in methods)
    twice = [a for a, b in pairwise(names) if a == b]
    if twice:
        raise ConfigError(f"methods: {twice[0]!r} is listed twice; keep one")
    for hook in ("govern", "ask"):
        owners = sorted(m.name for m in methods if overrides(m, hook))
        if len(owners) > 1:
            raise ConfigError(
                f"methods: {' and '.join(map(repr, owners))} both want to {hook}; keep one"
            )
    for method in methods:
        blind = [h for h in ("drop", "weigh", "plan") if overrides(method, h)]
        if blind and not method.needs_table:
            raise ConfigError(f"methods: {method.name!r} has `{blind[0]}` but not `needs_table`")
