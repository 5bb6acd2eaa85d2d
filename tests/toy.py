"""A bandit without a model: every state has logits of its own, so that theory is exact in it.

64 states with 12 arms, 3 of them good; 8 pulls a state a step, and some plain gradient descent on
them. Entropy falls under GRPO as it does in language models, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.loss import surrogate
from learner.methods.base import Method
from learner.methods.compose import Factors, Methods
from learner.table import Table
from tests.tables import make_table

STATES, ARMS, GOOD, PULLS = 64, 12, 3, 8
PPO = LearnerConfig(loss="decoupled_ppo", clip_low=0.2, clip_high=0.28)


@dataclass
class Bandit:
    methods: Sequence[Method] = ()
    seed: int = 0
    lr: float = 20.0
    updates: int = 4
    config: LearnerConfig = PPO
    aux_temperature: float | None = None  # a second set of pulls, at what the methods ask for
    realised: bool = True  # measure the change on the same pulls
    entropy: list[float] = field(default_factory=list)  # over all states, at the start of each step
    facts: dict[str, float] = field(default_factory=dict)  # of the last step

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.seed)
        self.z = torch.randn(STATES, ARMS, generator=self.rng, dtype=torch.float64)
        order = torch.rand(STATES, ARMS, generator=self.rng).argsort(1)
        self.good = torch.zeros(STATES, ARMS, dtype=torch.bool)
        self.good.scatter_(1, order[:, :GOOD], True)
        self.all = Methods(self.methods)
        self.states = self.all.initial()
        self.steps = 0

    def run(self, steps: int) -> Bandit:
        for _ in range(steps):
            self.entropy.append(_entropy(self.z))
            self._step()
        return self

    @property
    def success(self) -> float:
        return float((self.z.softmax(1) * self.good).sum(1).mean())

    def _step(self) -> None:
        state = torch.arange(STATES).repeat_interleave(PULLS)
        arm, advantage = self._pull(1.0)
        aux = torch.zeros_like(state, dtype=torch.bool)
        if self.aux_temperature is not None:
            more, _ = self._pull(self.aux_temperature)
            reward = self.good.gather(1, more).double()
            state, arm = torch.cat([state, state]), torch.cat([arm.reshape(-1), more.reshape(-1)])
            advantage = torch.cat([advantage.reshape(-1), reward.reshape(-1)])
            aux = torch.cat([aux, ~aux])
        arm, advantage = arm.reshape(-1), advantage.reshape(-1)
        lp = self._look(state, arm)[0].detach()
        before, predicted, effects = _mean_entropy(self.z, state[~aux]), 0.0, {}
        for update in range(self.updates):
            logp, H, N = self._look(state, arm)
            table = make_table(logp, advantage, lp=lp, H=H, N=N, aux=aux, config=self.config)
            table = replace(table, when=(self.seed, self.steps, update))
            factors, gradient, c = self._gradient(state, arm, table)
            predicted += self.lr * float((c * (table.S - table.N))[~aux].sum())
            effects = factors.effects
            self.z = self.z - self.lr * gradient
        self.facts = {"t": float(self.steps), "entropy": before, "lr": self.lr}
        self.facts |= {"updates": float(self.updates), "max_entropy": math.log(ARMS)}
        self.facts |= {"lr_full": self.lr, "momentum": 0.0}
        self.facts |= {"entropy_predicted": predicted, "n_aux": 1.0}
        self.facts["correct"] = float((advantage > 0)[~aux].double().mean())
        self.facts |= {k: v for k, v in effects.items() if isinstance(v, float)}
        if self.realised:
            self.facts["entropy_realised"] = _mean_entropy(self.z, state[~aux]) - before
        self.states = self.all.observe(self.states, self.facts)
        ask = self.all.ask(self.facts, self.states)
        if ask is not None:
            self.aux_temperature = ask.temperature
        self.steps += 1

    def _pull(self, temperature: float) -> tuple[Tensor, Tensor]:
        p = (self.z / temperature).softmax(1)
        arm = torch.multinomial(p, PULLS, replacement=True, generator=self.rng)
        reward = self.good.gather(1, arm).double()
        centred = reward - reward.mean(1, keepdim=True)
        return arm, centred / (reward.std(1, keepdim=True) + 1e-6)

    def _look(self, state: Tensor, arm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = self.z[state].log_softmax(1)
        p = log_p.exp()
        H = -(p * log_p).sum(1)
        N = (p.square() * (H[:, None] + log_p)).sum(1)
        return log_p.gather(1, arm[:, None]).squeeze(1), H, N

    def _gradient(self, state: Tensor, arm: Tensor, table: Table) -> tuple[Factors, Tensor, Tensor]:
        main, share = ~table.aux, 1.0 / int((~table.aux).sum())

        def loss_of(logp: Tensor, weight: Any) -> Tensor:
            losses = surrogate(logp, table.lp, table.lb, table.advantage, self.config)
            return share * main * (losses if weight is None else losses * weight)

        def coefficients(weight: Tensor | None) -> Tensor:
            leaf = table.logp.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(loss_of(leaf, weight).sum(), leaf)[0]

        factors = self.all.factors(
            table if self.all.needs_table else None, coefficients, self.states
        )
        z = self.z.detach().requires_grad_()
        log_p = z[state].log_softmax(1)
        H = -(log_p.exp() * log_p).sum(1)
        logp = log_p.gather(1, arm[:, None]).squeeze(1)
        where = 1.0 if factors.where is None else factors.where
        total = (loss_of(logp, factors.weight) - share * main * factors.bonus * where * H).sum()
        live = Table.join(table, logp, table.lp, H, table.N, (self.seed, self.steps, 0))
        extra = self.all.extra_loss(live, factors.plans)
        if extra is not None:
            total = (
                total + (extra * (main * share + table.aux / max(1, int(table.aux.sum())))).sum()
            )
        return factors, torch.autograd.grad(total, z)[0], coefficients(factors.weight)


def _entropy(z: Tensor) -> float:
    log_p = z.log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


def _mean_entropy(z: Tensor, state: Tensor) -> float:
    log_p = z[state].log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())
