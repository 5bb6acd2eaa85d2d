"""Isentropic: hold the entropy at a target by balancing what raises it and what lowers it.

What is held is the mean entropy of the tokens trained on, the one that is logged as `entropy`: the
policy's own, over the whole vocabulary, at the answers of the groups that have something to teach.

A token's update moves it in two ways. It moves the token's own distribution (measure.py), and it
makes the choice more or less frequent, and with it what follows (prefixes.py): a habit of long,
sure answers takes entropy away although no distribution need change. To first order

    dH_i = η c_i (S_i - N_i - q_i F_i)     F: entropy ahead of the choice, against the others'
    up = Σ of the positive ones, down = -Σ of the negative ones

OPEFO's balance makes both cancel: raising tokens weigh 1 + λ, lowering ones 1 - λ, with
λ = (down - up) / (up + down). Here the sum is not to be 0 but ΔH* = u* · mass, u* the share that a
controller wants of all that is left to move (the mass: up (1 + λ) + down (1 - λ) + pushes); and
three means supply it, each bounded, weights or price first (`first`), the bonus last:

    weights  λ = clip((ΔH* + down - up - price's push) / (up + down), ±lambda_max)
    price    of entropy, p: a choice's advantage A becomes A + p F.  Push: η p q F²
    bonus    b on every token's own entropy.  Push: η b Σ_v S_v², of which q (H + ln q)² is an
             unbiased estimate from the token sampled

Weights slow what is learned and let it be learned, but a λ near 1 silences most of it, and what is
left of the entropy gathers in a few rich answers. The price holds more evenly and costs more: it
bends the very choices that pay. A bonus makes sure tokens unsure. All weights are divided by the
mass, as a share of the flows: else a step that follows small ones would be far larger than Adam's
second moment expects.

As long as entropy has a price, it is moved to where there is nothing to lose: a `spread`, times the
price (at most 1), on the entropy of tokens that are lost already, in wrong answers that have left
every right one of their group; and `sharpen`, likewise, against that of right answers' tokens, so
that what lost ones learn does not leak into these. Rich wrong answers hold the entropy while fewer
are wrong, until weights alone hold it and the price is 0: a spread that stays on makes them so rich
and so few that no batch can tell the entropy. It acts slowly, so it is no part of the balance; the
drift's fit sees what it does.

The controller is proportional and integral, on top of what is estimated as the run goes
(calibrate.py): u* is the share that rests the entropy, and (p_gain · e + ∫) / slope more, e being
how far the entropy will be from the target, in logarithms, once what was already decided has come.
The integral, i_gain · Σ of the error as it is measured, rests while the answer is saturated or the
target far away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import msgspec

from common.config import NaturalInt, NotNegative, Positive, need
from common.errors import ConfigError
from learner.methods.base import Governed, Method, State, finite, known, refuse_above
from learner.methods.calibrate import Filter

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table

_LEFT = 0.2  # mass, as a share of the flows, below which a step is not scaled up to a whole one
_MOST = 0.9  # share of the flows that is ever wanted
_FAR = 0.5  # errors are cut to it, as a logarithm: haste overshoots
_NEAR = 0.2  # the integral adds up no larger ones, as a share of the target …
_LEAK = 0.95  # … and keeps so much of itself a step
_BEND = 3.0  # a price changes no advantage by more than so many times itself


class Flows(NamedTuple):
    """Per unit of learning rate, as a mean per token."""

    change: Tensor  # float64 [T]: of each token, 0 where it does not count
    up: float
    down: float

    @property
    def both(self) -> float:
        return self.up + self.down


class Answer(NamedTuple):
    """How much of each means, and the wanted change that none of them supplies."""

    price: float
    tilt: float
    bonus: float
    left: float


class Isentropic(Method, frozen=True, kw_only=True, tag="isentropic"):
    """`mode`: what is forbidden to the entropy

        floor     to fall below the target. Above it (and a brake zone) this is plain GRPO; the
                  answer only ever raises entropy (λ >= 0)
        hold      to leave the target, either way. From far above it goes down about as GRPO does
        ceiling   to rise above it: the mirror image of floor, by weights alone

    The preset "opefo" is OPEFO (entropy-flow balance) alone: ΔH* = 0, F left out, no other knob.
    With the three bounds 0 it is exactly GRPO; zero error is not: it is the balanced flow.
    """

    needs_table: ClassVar[bool] = True

    target: Positive = 0.5
    unit: Literal["start", "nats"] = "start"  # start: times the entropy before the first step
    mode: Literal["floor", "hold", "ceiling"] = "floor"
    preset: Literal["opefo"] | None = None
    changes: tuple[tuple[NaturalInt, Positive], ...] = ()  # (step, target from that step on)
    spread: NotNegative = 1.0  # at a price of 1, of a bonus on lost tokens; 0: no sharpening either
    sharpen: NotNegative = 0.3  # … and against the entropy of right answers' tokens
    first: Literal["weights", "price"] = "weights"  # which of them answers before the other
    price_max: NotNegative = 3.0
    lambda_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    bonus_max: NotNegative = 1.0
    p_gain: Positive = 0.4  # share of the error ahead to close in a step
    i_gain: NotNegative = 0.01  # … and of the measured one, added up over twenty steps
    brake: NotNegative = 1.0  # floor, ceiling: share of the target before it where it may brake

    def check(self) -> None:
        steps = [step for step, _ in self.changes]
        need(
            steps == sorted(set(steps)),
            f"methods: isentropic.changes: steps {steps} must rise",
        )

    def fits(self, max_entropy: float) -> None:
        if self.preset is None and self.unit == "nats":
            for target in (self.target, *(target for _, target in self.changes)):
                refuse_above(self, "target", target, max_entropy)

    @property
    def neutral(self) -> bool:
        return self.preset is None and not any((self.price_max, self.lambda_max, self.bonus_max))

    # ---- every update ------------------------------------------------------------------------

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
        assert table is not None
        assert c is not None
        state = self.initial() | state
        change = finite(self, "dH", c * (table.S - table.N), table.main, table)
        before = table.H if table.H0 is None else table.H0  # the step, whichever update this is
        entropy = _mean(before, table)
        target = self.target_at(table.when[1]) * self._unit(state, entropy)
        numbers = {"target": target, "error": target - entropy}
        if self.preset == "opefo":
            return _balanced(_flows(change), numbers)
        at, ahead = self._ahead(table)
        led = (c * -table.logp.exp() * ahead).masked_fill(~table.main, 0.0)
        flows = _flows(change + led)
        numbers |= {"up": flows.up, "down": flows.down, "paths": float(led.double().sum())}
        numbers["lag"] = _mean(table.lag.float(), table)
        noise = _noise(table, before, entropy)
        if noise is not None:
            numbers["noise"] = noise
        numbers |= {"lambda": 0.0, "saturated": 0.0, "active": 0.0}
        if flows.both == 0 or entropy <= 0:
            return Governed(numbers=numbers)
        numbers |= {"mass": 1.0, "share": (flows.up - flows.down) / flows.both}
        course = Filter.of(state["fit"])
        course.see(entropy, noise, round(numbers["lag"]))
        heading, rest = course.heading(state["beta"]), course.rest(state["beta"])
        numbers |= {
            "heading": math.exp(heading),
            "slope": course.slope,
            "lift": course.lift,
            "rest": rest,
        }
        error = math.log(target) - heading
        if self._is_idle(error):
            return Governed(numbers=numbers)
        share = self.asked(course, error, state)
        numbers |= {"asked": share, "wanted": min(max(share, -_MOST), _MOST)}
        return self._spread(self._answer(table, c, ahead, flows, numbers), table, at)

    def asked(self, course: Filter, error: float, state: State) -> float:
        """The share of all that is left to move. `error`: of the logarithm, where it is heading."""
        near = min(max(error, -_FAR), _FAR)
        close = (self.p_gain * near + state["integral"]) / course.slope
        return course.rest(state["beta"]) + float(close)

    def target_at(self, step: int) -> float:
        """In the method's unit."""
        return [self.target, *(target for at, target in self.changes if at <= step)][-1]

    def _unit(self, state: State, entropy: float) -> float:
        if self.unit == "nats":
            return 1.0
        return float(entropy if state["start"] is None else state["start"])

    @staticmethod
    def _ahead(table: Table) -> tuple[Tensor, Tensor]:
        """[T]: prefixes, and the entropy ahead of the choices made at them."""
        from learner.methods.prefixes import entropy_ahead, prefixes

        at = prefixes(table)
        return at, entropy_ahead(table, at).to(table.H.dtype)

    def _is_idle(self, error: float) -> bool:
        """`error`: of the logarithm, negative above the target."""
        zone = math.log1p(self.brake)
        return (self.mode == "floor" and error < -zone) or (self.mode == "ceiling" and error > zone)

    def _spread(self, found: Governed, table: Table, at: Tensor) -> Governed:
        """The same answer, with entropy moved to lost tokens by as much as it has a price."""
        from learner.methods.prefixes import lost

        price = min(found.numbers["price"], 1.0)
        if not self.spread or not price:
            return found
        there, right = lost(table, at), table.main & (table.advantage > 0)
        moved = self.spread * there.float() - self.sharpen * right.float()
        where = price * moved + found.bonus
        share = int(there.sum()) / int(table.main.sum())
        return Governed(found.weight, 1.0, where, dict(found.numbers) | {"lost": share})

    def _answer(
        self, table: Table, c: Tensor, ahead: Tensor, flows: Flows, numbers: dict[str, float]
    ) -> Governed:
        moves = table.main & (c != 0)  # what a clip stops, a price cannot move either
        q = table.logp.exp()
        by_price = _mean((q * ahead.square()).masked_fill(~moves, 0.0), table)
        by_bonus = _mean(q * (table.H + table.logp).square(), table)
        net = flows.up - flows.down
        wanted = numbers["wanted"]
        # of net - wanted · mass, which shall be 0, and in which every mean is linear
        short = wanted * flows.both - net
        found = self._supply(
            short, (1 - wanted) * by_price, flows.both - wanted * net, (1 - wanted) * by_bonus
        )
        missing = found.left if abs(found.left) > 1e-6 * flows.both else numbers["asked"] - wanted
        push = found.price * by_price + found.bonus * by_bonus
        numbers |= {
            "price": found.price,
            "lambda": found.tilt,
            "push": push,
            "saturated": math.copysign(1.0, missing) if missing else 0.0,
            "active": 1.0,
        }
        mass = flows.both + found.tilt * net + push
        net += found.tilt * flows.both + push
        even = max(mass / flows.both, _LEFT)
        numbers |= {"mass": mass / flows.both / even, "share": net / mass if mass > 0 else 0.0}
        weight = None
        if found.price or found.tilt or even != 1:
            bend = (found.price * ahead / table.advantage).masked_fill(~moves, 0.0)
            tilt = found.tilt * flows.change.sign()
            weight = (1 + tilt + bend.clamp(-_BEND, _BEND)) / even
            weight = weight.masked_fill(~table.main, 1.0).float()
        return Governed(weight, found.bonus / even, numbers=numbers)

    def _supply(self, short: float, by_price: float, by_weights: float, by_bonus: float) -> Answer:
        """`by_…`: what 1 of each adds to what is short."""
        price = tilt = bonus = 0.0
        least = 0.0 if self.mode == "floor" else -self.lambda_max
        most = 0.0 if self.mode == "ceiling" else self.lambda_max
        if self.first == "weights":
            tilt = min(max(short / by_weights, least), most)
            short -= tilt * by_weights
        if short > 0 and self.mode != "ceiling":
            price = min(short / by_price, self.price_max) if by_price > 0 else 0.0
            short -= price * by_price
        if self.first == "price":
            tilt = min(max(short / by_weights, least), most)
            short -= tilt * by_weights
        if short > 0 and self.mode != "ceiling":
            bonus = min(short / by_bonus, self.bonus_max) if by_bonus > 0 else self.bonus_max
            short -= bonus * by_bonus
        return Answer(price, tilt, bonus, short)

    # ---- every step --------------------------------------------------------------------------

    def initial(self) -> State:
        return {
            "start": None,  # entropy before the first step
            "beta": 0.0,  # of the optimizer's first moment, over a step
            "fit": Filter().state(),
            "target": None,
            "integral": 0.0,
        }

    def observe(self, state: State, facts: Mapping[str, float]) -> State:
        state = self.initial() | state
        entropy, own = known(self, facts, "entropy"), _own(facts)
        start = state["start"]
        if start is None and entropy > 0:  # a batch may have nothing to train on
            start = entropy
        self._check_reachable(start or 0.0, facts["max_entropy"])
        beta = facts["momentum"] ** facts["updates"]
        course = Filter.of(state["fit"])
        if "share" in own:  # else there was nothing to learn from
            course.see(entropy, own.get("noise"), round(own["lag"]))
            course.learn(known(self, facts, "correct"))
            course.step(own["share"], own["mass"], facts["lr"] / facts["lr_full"], beta)
        return {
            "start": start,
            "beta": beta,
            "fit": course.state(),
            "target": own["target"],
            "integral": self._integrate(state, own),
        }

    def _check_reachable(self, start: float, max_entropy: float) -> None:
        """Raises ConfigError; for targets of later steps too, which need not be waited for."""
        if self.preset is not None or self.unit == "nats":
            return
        for target in (self.target, *(target for _, target in self.changes)):
            if target * start > max_entropy:
                raise ConfigError(
                    f"methods: 'isentropic': target = {target:g} times the starting entropy is "
                    f"{target * start:.3f} nats, above the largest entropy of this vocabulary, "
                    f"{max_entropy:.3f}; take less"
                )

    def _integrate(self, state: State, own: Mapping[str, float]) -> float:
        integral, target, error = state["integral"], own["target"], own["error"]
        if state["target"] is not None and state["target"] != target:
            return 0.0
        integral *= _LEAK  # else what the way to the target added up would keep it away for long
        near = abs(error) <= _NEAR * target
        if own.get("active", 0.0) and near and own["saturated"] * error <= 0:
            integral += self.i_gain * error / target
        bound = self.p_gain * _FAR
        return float(min(max(integral, -bound), bound))


def _own(facts: Mapping[str, float]) -> dict[str, float]:
    mark = "methods/isentropic/"
    return {key.removeprefix(mark): v for key, v in facts.items() if key.startswith(mark)}


def _mean(values: Tensor, table: Table) -> float:
    chosen = values[table.main].double()
    return float(chosen.mean()) if len(chosen) else 0.0


def _noise(table: Table, H: Tensor, entropy: float) -> float | None:
    """Standard error of the mean entropy as a share of it, from what its groups have; None of less
    than two groups: answers to one prompt say nothing of others.
    """
    import torch

    group, H = table.group[table.main], H[table.main].double()
    there = torch.bincount(group) > 0
    n = int(there.sum())
    if n < 2 or entropy <= 0:
        return None
    excess = torch.bincount(group, H - entropy)[there]
    square = excess.square().sum() * n / (n - 1)
    return float(square.sqrt()) / len(H) / entropy


def _flows(change: Tensor) -> Flows:
    """`change` [T]: per unit of learning rate, 0 where it does not count."""
    change = change.double()
    return Flows(change, float(change.clamp(min=0).sum()), -float(change.clamp(max=0).sum()))


def _balanced(flows: Flows, numbers: dict[str, float]) -> Governed:
    """OPEFO."""
    numbers |= {"up": flows.up, "down": flows.down}
    if flows.both == 0:
        return Governed(numbers=numbers | {"lambda": 0.0, "saturated": 0.0, "active": 0.0})
    tilt = (flows.down - flows.up) / flows.both
    return Governed((1 + tilt * flows.change.sign()).float(), numbers=numbers | {"lambda": tilt})
