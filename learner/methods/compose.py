"""Several methods as one. The only place that loops over methods; their order never matters.

Answers are combined in the order of the methods' names, so that not even the last bit depends on
the recipe. Every answer is checked: its shape, that it is finite, that it carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from common import wire
from common.errors import DataError
from learner.methods import effect
from learner.methods.base import Ask, Method, State, check, finite, overrides, refuse_blind
from learner.table import Table


class Factors(msgspec.Struct, frozen=True):
    """What the methods say about one update."""

    weight: Tensor | None = None  # float32 [T]; None: all 1
    bonus: float = 0.0  # coefficient of an entropy bonus
    where: Tensor | None = None  # float32 [T]: its factor at every token; None: all 1
    plans: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}  # each method's factor in `weight`
    governor: str = ""  # whose bonus it is
    effects: dict[str, effect.Value] = {}  # what each did, methods/NAME/…


class Methods:
    """The methods of a run that do something, and the hooks over all of them.

    Raises ConfigError when they cannot work together.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        check(methods)
        self._all = tuple(sorted((m for m in methods if not m.neutral), key=lambda m: m.name))
        self.needs_table = any(m.needs_table for m in self._all)
        self.has_extra = any(overrides(m, "extra_loss") for m in self._all)

    def fits(self, max_entropy: float, statistics: str = "HN") -> None:
        """Raises ConfigError for what a policy cannot serve that has entropies up to `max_entropy`
        and whose head gives these `statistics`.
        """
        for m in self._all:
            refuse_blind(m, statistics)
            m.fits(max_entropy)

    def initial(self) -> dict[str, State]:
        return {m.name: m.initial() for m in self._all}

    @torch.no_grad()
    def scale_groups(self, groups: Sequence[wire.Group]) -> dict[str, np.ndarray]:
        """float64 [G] of every method that has something to say about them."""
        own = {}
        for m in self._with("scale_groups"):
            factor = m.scale_groups(groups)
            if factor is not None:
                own[m.name] = np.asarray(factor, np.float64)
                _check_factor(m, own[m.name], groups)
        return own

    def group_numbers(self, groups: Sequence[wire.Group]) -> dict[str, effect.Value]:
        return {
            key: value
            for m in self._with("group_numbers")
            for key, value in _named(m, m.group_numbers(groups)).items()
        }

    @torch.no_grad()
    def factors(
        self,
        table: Table | None,
        coefficients: Callable[[Tensor | None], Tensor],
        states: Mapping[str, State],
    ) -> Factors:
        """Drop, weigh what is alive, plan, then govern. `coefficients` gives c under a weight."""
        weight, plans, governor = None, {}, ""
        effects: dict[str, effect.Value] = {}
        each: dict[str, Tensor] = {}
        if table is not None:
            weight, alive = self._weight(table, each, effects)
            for m in self._with("plan"):
                plan = m.plan(table, alive)
                if plan is not None:
                    plans[m.name] = _checked(m, "plan", plan, table)
                    effects |= _named(m, m.numbers(table, plan))
        bonus, where = 0.0, None
        for m in self._with("govern"):
            c = coefficients(weight) if table is not None and m.needs_table else None
            answer = m.govern(table, c, states.get(m.name) or m.initial())
            if answer is None:
                continue
            bonus, where, governor = answer.bonus, answer.where, m.name
            effects |= _named(m, answer.numbers)
            if where is not None:
                assert table is not None, f"{m.name!r} governs tokens without `needs_table`"
                _checked(m, "govern", where, table)
            if answer.weight is not None:
                assert table is not None, f"{m.name!r} governs tokens without `needs_table`"
                own = _checked(m, "govern", answer.weight, table)
                effects |= effect.weighed(m.name, own, table, alive)
                weight = own if weight is None else weight * own
                each[m.name] = each[m.name] * own if m.name in each else own
        return Factors(weight, bonus, where, plans, each, governor, effects)

    def _weight(
        self, table: Table, each: dict[str, Tensor], effects: dict[str, effect.Value]
    ) -> tuple[Tensor | None, Tensor]:
        """The product of the weights, 0 where dropped (None: all 1), and who is alive.

        Notes every method's factor in `each`, and what it did in `effects`.
        """
        dropped = None
        for m in self._with("drop"):
            mask = m.drop(table)
            if mask is not None:
                mask = _checked(m, "drop", mask, table).bool()
                effects |= effect.dropped(m.name, mask, table)
                each[m.name] = (~mask).float()
                dropped = mask if dropped is None else dropped | mask
        alive, weight = table.main, None
        if table.w is not None:
            alive = alive & (table.w > 0)
        if dropped is not None:
            alive, weight = alive & ~dropped, (~dropped).float()
        for m in self._with("weigh"):
            own = m.weigh(table, alive)
            if own is not None:
                own = _checked(m, "weigh", own, table)
                effects |= effect.weighed(m.name, own, table, alive)
                weight = own if weight is None else weight * own
                each[m.name] = each[m.name] * own if m.name in each else own
        return weight, alive

    def extra_loss(self, table: Table, plans: Mapping[str, Tensor]) -> Tensor | None:
        """float32 [T], with gradient; None where no method adds anything."""
        total: Tensor | None = None
        for _, own in self.extra_losses(table, plans):
            total = own if total is None else total + own
        return total

    def extra_losses(
        self, table: Table, plans: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """float32 [T], with gradient, of every method that adds something."""
        for m in self._with("extra_loss"):
            own = m.extra_loss(table, plans.get(m.name))
            if own is not None:
                _checked(m, "extra_loss", own.detach(), table)
                yield m.name, own

    def ask(self, stats: Mapping[str, float], states: Mapping[str, State]) -> Ask | None:
        for m in self._with("ask"):
            return m.ask(stats, states.get(m.name) or m.initial())
        return None

    def observe(self, states: Mapping[str, State], facts: Mapping[str, float]) -> dict[str, State]:
        return {m.name: m.observe(states.get(m.name) or m.initial(), facts) for m in self._all}

    def _with(self, hook: str) -> list[Method]:
        return [m for m in self._all if overrides(m, hook)]


def _named(method: Method, numbers: Mapping[str, effect.Value]) -> dict[str, effect.Value]:
    return {f"methods/{method.name}/{key}": value for key, value in numbers.items()}


def _checked(method: Method, hook: str, answer: Tensor, table: Table) -> Tensor:
    where = f"method {method.name!r}, {hook}"
    if answer.shape != table.logp.shape:
        raise DataError(f"{where}: shape {tuple(answer.shape)} for {len(table.logp)} tokens")
    if answer.requires_grad:
        raise DataError(f"{where}: the answer carries a gradient; detach it")
    finite(method, hook, answer, torch.ones_like(table.mask), table)
    return answer


def _check_factor(
    method: Method, factor: np.ndarray[Any, Any], groups: Sequence[wire.Group]
) -> None:
    where = f"method {method.name!r}, scale_groups"
    if factor.shape != (len(groups),):
        raise DataError(f"{where}: shape {factor.shape} for {len(groups)} groups")
    bad = np.flatnonzero(~np.isfinite(factor))
    if bad.size:
        raise DataError(f"{where}: {factor[bad[0]]} for ticket {groups[bad[0]].ticket}")
