"""CLASSP: a coordinate moves only where its gradient is large, and less the more it has moved
(arXiv 2405.09637; the element-wise form of the authors' description, not of their code).

    where g² > theta:   S ← S + |g|^p,   w ← w - lr · g / (S + eps)^(1/p)

with p = 2 and theta = 0 it is AdaGrad. Gradients of reinforcement learning are far below any fixed
theta, so theta is relative to the tensor's own gradient unless asked otherwise. S never decays: the
step falls as t^(-1/p). Untested for reinforcement learning elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from learner.tuning import ClasspConfig


class Classp(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor], lr: float, config: ClasspConfig) -> None:
        self._config = config
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "there is nothing to evaluate again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, weight: Tensor, grad: Tensor, lr: float) -> None:
        config, state = self._config, self._state_of(weight)
        squares = grad.square()
        moves = squares > self._theta(squares)
        state["sum"] += torch.where(moves, grad.abs() ** config.p, 0.0)
        scale = (state["sum"] + config.eps) ** (1 / config.p) if config.scaling else 1.0
        weight -= lr * torch.where(moves, grad / scale, 0.0)

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            state["sum"] = torch.zeros_like(weight)
        return state

    def _theta(self, squares: Tensor) -> Tensor | float:
        config = self._config
        if config.relative == "mean":
            return config.threshold * squares.mean()
        if config.relative == "quantile":
            below = round(config.threshold * squares.numel())
            return squares.flatten().kthvalue(below).values if below else -1.0
        return config.threshold
