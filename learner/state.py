"""All that a step changes, in one object."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.config import RunConfig
from common.errors import ConfigError
from learner import kappa, shard
from learner import model as models
from learner.classp import Classp
from learner.comm import Comm, Order
from learner.config import LearnerConfig
from learner.measure import Law
from learner.methods.base import Ask
from learner.methods.compose import Methods


@dataclass
class TrainState:
    """`t` steps are finished; the parameters are version `t`.

    `masters` are what the optimiser moves: the parameters themselves, or with bf16 weights fp32
    copies whose rounded values the parameters hold.
    """

    model: models.Policy
    optimizer: torch.optim.Optimizer
    masters: dict[str, Tensor]
    seed: int
    t: int = 0
    methods_state: dict[str, dict[str, Any]] = field(default_factory=dict)
    ask: Ask | None = None  # how the next aux tickets shall be
    law: Law = field(default_factory=Law)

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Give the model the values that will be published."""
        for name, parameter in models.trainable(self.model).items():
            master = self.masters[name]
            if master is not parameter:
                parameter.copy_(master.to(torch.bfloat16))

    def fetch_gradients(self) -> None:
        """Give the masters the gradients that the model received."""
        for name, parameter in models.trainable(self.model).items():
            self.masters[name].grad = parameter.grad

    def forget_gradients(self) -> None:
        for name, parameter in models.trainable(self.model).items():
            self.masters[name].grad = parameter.grad = None


def make_state(run: RunConfig, config: LearnerConfig) -> TrainState:
    """Version 0 of the run's model; sets torch's threads. Raises DataError (the model).

    Of many ranks rank 0 calls it and tells the others, which `make_alike`.
    """
    Comm.current().say(Order.MAKE)
    return make_alike(run, config)


def make_alike(run: RunConfig, config: LearnerConfig) -> TrainState:
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, _ = models.load(run, config)
    return state_of(policy, run, config)


def state_of(policy: models.Policy, run: RunConfig, config: LearnerConfig) -> TrainState:
    """Version 0 of a policy at hand. Raises ConfigError for methods that it cannot serve.

    Of many ranks each calls it, on the same weights, and keeps its slices of the policy.
    """
    if config.kappa_tune is not None:
        kappa.freeze(policy, config.kappa_tune)
    shard.shard(policy, policy.net, models.device(config), config.dtype == "bf16")
    masters: dict[str, Tensor] = dict(models.trainable(policy))
    if run.weights_dtype == "bf16":
        masters = {name: p.detach().clone() for name, p in masters.items()}
    optimizer = _optimizer(masters.values(), config)
    methods = Methods(config.methods)
    facts = constants(policy, config)
    methods.fits(facts["max_entropy"], policy.statistics)
    states = methods.initial()
    state = TrainState(policy, optimizer, masters, run.seed, methods_state=states)
    state.ask = methods.ask(facts, states)
    state.publish_masters()
    return state


def _optimizer(masters: Iterable[Tensor], config: LearnerConfig) -> torch.optim.Optimizer:
    if config.classp is None:
        return torch.optim.AdamW(
            masters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
    if config.classp.relative == "quantile" and Comm.current().world_size > 1:
        raise ConfigError(
            'learner.classp.relative = "quantile": no rank sees a whole tensor; take "mean"'
        )
    return Classp(masters, config.lr, config.classp)


def constants(policy: models.Policy, config: LearnerConfig) -> dict[str, float]:
    """What methods are told beside a step's metrics."""
    return {
        "max_entropy": math.log(policy.config.vocab_size),
        "n_aux": float(config.n_aux),
        "updates": float(config.updates_per_batch),
        "lr_full": config.lr,
        "momentum": 0.0 if config.classp is not None else config.betas[0],
    }
