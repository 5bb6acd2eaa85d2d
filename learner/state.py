"""All that a step changes, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.config import RunConfig
from learner import model as models
from learner.config import LearnerConfig
from learner.measure import Law
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
    """Version 0 of the run's model; sets torch's threads. Raises DataError (the model)."""
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, _ = models.load(run, config)
    return state_of(policy, run, config)


def state_of(policy: models.Policy, run: RunConfig, config: LearnerConfig) -> TrainState:
    """Version 0 of a policy at hand."""
    masters: dict[str, Tensor] = dict(models.trainable(policy))
    if run.weights_dtype == "bf16":
        masters = {name: p.detach().clone() for name, p in masters.items()}
    optimizer = torch.optim.AdamW(
        masters.values(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    states = Methods(config.methods).initial()
    state = TrainState(policy, optimizer, masters, run.seed, methods_state=states)
    state.publish_masters()
    return state
