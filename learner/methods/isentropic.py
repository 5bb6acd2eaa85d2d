"""Isentropic: hold the entropy at a target by balancing what raises it and what lowers it.

First-order theory gives every token's contribution to the next change of entropy (measure.py),

    dH_i = η c_i (S_i - N_i)        up = Σ of the positive ones, down = -Σ of the negative ones

and OPEFO's balance makes them cancel: raising tokens weigh 1 + λ, lowering ones 1 - λ, with
λ = (down - up) / (up + down). Here the balance is not 0 but what a controller wants:

    λ = clip((ΔH* + down - up) / (up + down), ±lambda_max)

λ near 1 silences half of what was learned, so it is bounded, and what it cannot supply comes from
an entropy bonus b, bounded too. Its first-order push needs no further statistic: a bonus moves a
token's entropy by η b Σ_v S_v², of which q (H + ln q)² is an unbiased estimate from the token
sampled.

The controller wants a change a step of p_gain · e + ∫, e = target - H, the integral i_gain · Σ e
at rest while the answer is saturated or the target far away. Adam and shared weights rescale
predictions, so the gain g between predicted and realised change, and the drift a that no prediction
explains, are fitted as the run goes (calibrate.py): ΔH* = (p_gain · e + ∫ - a) / g.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import msgspec

from common.config import NaturalInt, NotNegative, Positive, need
from common.errors import ConfigError
from learner.methods.base import Governed, Method, State, finite, refuse_above
from learner.methods.calibrate import REACH, Gain

if TYPE_CHECKING:
    from torch import Tensor

    from learner.table import Table

_NEAR = 0.2  # error, as a share of the target, within which it is integrated
_LEAK = 0.95  # of the integral, a step, while there is nothing to do


class Flows(NamedTuple):
    """Per unit of learning rate, as a mean per token."""

    raises: Tensor  # bool [T]: weights may tilt it
    lowers: Tensor  # bool [T]: the same
    both: float  # size of what may be tilted
    up: float  # of all tokens
    down: float


class Isentropic(Method, frozen=True, kw_only=True, tag="isentropic"):
    """`mode`: what is forbidden to the entropy

        floor     to fall below the target. Above it (and a brake zone) this is plain GRPO; the
                  answer only ever raises entropy (λ >= 0)
        hold      to leave the target, either way
        ceiling   to rise above it: the mirror image of floor, without a bonus

    `allocation`: where the bonus goes; every choice is 1 on average

        uniform   everywhere
        quiet     where the advantage says little: exp(-|A| / mean |A|)
        open      where the policy is undecided: H / mean H
        early     at the beginning of answers: falls to e^-2 of it towards their end

    The preset "opefo" is OPEFO (entropy-flow balance) alone: ΔH* = 0 and no other knob.
    lambda_max = 0 without a bonus is exactly GRPO; zero error is not: it is the balanced flow.
    """

    needs_table: ClassVar[bool] = True

    target: Positive = 0.5
    unit: Literal["start", "nats"] = "start"  # start: times the entropy before the first step
    mode: Literal["floor", "hold", "ceiling"] = "floor"
    preset: Literal["opefo"] | None = None
    changes: tuple[tuple[NaturalInt, Positive], ...] = ()  # (step, target from that step on)
    lambda_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    bonus_max: NotNegative = 1.0
    tilted: Literal["all", "good"] = "all"  # the tokens that λ weighs; good: those with A > 0
    allocation: Literal["uniform", "quiet", "open", "early"] = "quiet"
    p_gain: Positive = 0.08  # share of the error to close in a step
    i_gain: NotNegative = 0.001
    brake: NotNegative = 0.5  # floor, ceiling: share of the target before it where λ may brake

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
        return self.preset is None and self.lambda_max == 0 and self.bonus_max == 0

    # ---- every update ------------------------------------------------------------------------

    def govern(self, table: Table | None, c: Tensor | None, state: State) -> Governed:
        assert table is not None
        assert c is not None
        change = finite(self, "dH", c * (table.S - table.N), table.main, table)
        which = table.main if self.tilted == "all" else table.advantage > 0
        flows, entropy = _flows(change, which), _mean(table.H, table)
        target = self.target_at(table.when[1]) * self._unit(state, entropy)
        error = target - entropy
        numbers = {"target": target, "error": error, "up": flows.up, "down": flows.down}
        if self.preset == "opefo" and flows.both > 0:
            balance = (flows.down - flows.up) / flows.both
            return Governed(_weight(flows, balance), numbers=numbers | {"lambda": balance})
        if flows.up + flows.down == 0 or self._is_idle(error / target):
            return Governed(numbers=numbers | {"lambda": 0.0, "saturated": 0.0, "active": 0.0})
        return self._answer(table, flows, self._wanted(error, flows, entropy, state), numbers)

    def target_at(self, step: int) -> float:
        """In the method's unit."""
        return [self.target, *(target for at, target in self.changes if at <= step)][-1]

    def _unit(self, state: State, entropy: float) -> float:
        if self.unit == "nats":
            return 1.0
        return float(entropy if state["start"] is None else state["start"])

    def _is_idle(self, error: float) -> bool:
        """`error`: as a share of the target, negative above it."""
        if self.mode == "floor":
            return error < -self.brake
        return self.mode == "ceiling" and error > self.brake

    def _wanted(self, error: float, flows: Flows, entropy: float, state: State) -> float:
        """ΔH* of one update per unit of learning rate: what the predictions shall add up to."""
        change = self.p_gain * error + state["integral"]
        gain = Gain.of(state["gain"])
        if gain is None:  # nothing seen yet: what both flows together do is a guess
            flow = flows.up + flows.down
            return change * flow / (REACH * entropy) if entropy > 0 else 0.0
        return float((change - gain.drift) / (gain.slope * state["rate"]))

    def _answer(
        self, table: Table, flows: Flows, wanted: float, numbers: dict[str, float]
    ) -> Governed:
        least = 0.0 if self.mode == "floor" else -self.lambda_max
        most = 0.0 if self.mode == "ceiling" else self.lambda_max
        short = wanted + flows.down - flows.up
        tilt = min(max(short / flows.both, least), most) if flows.both > 0 else 0.0
        missing = short - tilt * flows.both
        bonus, push, where = 0.0, 0.0, None
        if missing > 0 and self.bonus_max > 0 and self.mode != "ceiling":
            where = self._allocate(table)
            each = _mean(_bonus_push(table) if where is None else where * _bonus_push(table), table)
            bonus = min(missing / each, self.bonus_max) if each > 0 else self.bonus_max
            push = bonus * each
        left = missing - push
        saturated = (
            0.0 if abs(left) <= 1e-6 * (flows.up + flows.down) else 1.0 if left > 0 else -1.0
        )
        numbers |= {"lambda": tilt, "push": push, "wanted": wanted, "saturated": saturated}
        weight = None if tilt == 0 else _weight(flows, tilt)
        return Governed(weight, bonus, where, numbers | {"active": 1.0})

    def _allocate(self, table: Table) -> Tensor | None:
        """float [T]: how much of the bonus each token gets, 1 on average; None: all 1."""
        if self.allocation == "uniform":
            return None
        if self.allocation == "quiet":
            size = table.advantage.abs()
            share = (-size / max(_mean(size, table), 1e-12)).exp()
        elif self.allocation == "open":
            share = table.H
        else:
            share = (-2 * _progress(table)).exp()
        return share.masked_fill(~table.main, 0.0) / max(_mean(share, table), 1e-12)

    # ---- every step --------------------------------------------------------------------------

    def initial(self) -> State:
        return {
            "start": None,  # entropy before the first step
            "target": None,
            "integral": 0.0,
            "gain": None,  # Gain, as a dict
            "rate": 0.0,  # learning rate · updates of the last step
            "last": None,  # its (predicted change, entropy before it)
        }

    def observe(self, state: State, facts: Mapping[str, float]) -> State:
        entropy, own = facts["entropy"], _own(facts)
        start = entropy if state["start"] is None else state["start"]
        self._check_reachable(own["target"], facts["max_entropy"])
        rate = facts["lr"] * facts["updates"]
        predicted = facts["entropy_predicted"] + rate * own.get("push", 0.0)
        gain = Gain.of(state["gain"])
        if gain is None:
            flow = rate * (own["up"] + own["down"])
            gain = Gain.guess(entropy, flow)
        elif state["last"] is not None:
            gain.add(state["last"][0], entropy - state["last"][1], same_tokens=False)
        last: tuple[float, float] | None = (predicted, entropy)
        if gain is not None and "entropy_realised" in facts:
            gain.add(predicted, facts["entropy_realised"], same_tokens=True)
            last = None
        return {
            "start": start,
            "target": own["target"],
            "integral": self._integrate(state, own),
            "gain": None if gain is None else gain.state(),
            "rate": rate,
            "last": last,
        }

    def _check_reachable(self, target: float, max_entropy: float) -> None:
        if self.preset is None and target > max_entropy:
            raise ConfigError(
                f"methods: 'isentropic': target = {self.target:g} times the starting entropy is "
                f"{target:.3f} nats, above the largest entropy of this vocabulary, "
                f"{max_entropy:.3f}; take less"
            )

    def _integrate(self, state: State, own: Mapping[str, float]) -> float:
        integral, target, error = state["integral"], own["target"], own["error"]
        if state["target"] is not None and state["target"] != target:
            return 0.0
        if not own.get("active", 0.0):
            return float(_LEAK * integral)
        near = abs(error) <= _NEAR * target  # on a long way it would only learn to overshoot
        if near and own["saturated"] * error <= 0:  # saturated: more of it would change nothing
            integral += self.i_gain * error
        bound = self.p_gain * target / 2  # it may stand for an error of half the target
        return float(min(max(integral, -bound), bound))


def _own(facts: Mapping[str, float]) -> dict[str, float]:
    mark = "methods/isentropic/"
    return {key.removeprefix(mark): v for key, v in facts.items() if key.startswith(mark)}


def _mean(values: Tensor, table: Table) -> float:
    chosen = values[table.main].double()
    return float(chosen.mean()) if len(chosen) else 0.0


def _flows(change: Tensor, which: Tensor) -> Flows:
    """`change` [T]: c (S - N), 0 where it does not count. `which` bool [T]: may be tilted."""
    up, down = change.double().clamp(min=0).sum(), -change.double().clamp(max=0).sum()
    both = change[which].double().abs().sum()
    raises, lowers = which & (change > 0), which & (change < 0)
    return Flows(raises, lowers, float(both), float(up), float(down))


def _weight(flows: Flows, tilt: float) -> Tensor:
    """float32 [T]: 1 + tilt where the entropy is raised, 1 - tilt where it is lowered."""
    return 1 + tilt * (flows.raises.float() - flows.lowers.float())


def _bonus_push(table: Table) -> Tensor:
    """float [T]: Σ_v S_v² of each token, estimated from the one sampled."""
    return table.logp.exp() * (table.H + table.logp).square()


def _progress(table: Table) -> Tensor:
    """float [T]: how far into its answer a token is, 0…1."""
    rows = int(table.row.max()) + 1
    far = table.position.new_full((rows,), 1 << 40)
    first = far.scatter_reduce(0, table.row, table.position, "amin")
    last = (-far).scatter_reduce(0, table.row, table.position, "amax")
    length = (last - first).clamp(min=1)
    return (table.position - first[table.row]).to(table.H.dtype) / length[table.row]
