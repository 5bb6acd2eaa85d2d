"""The learner's own step (learner/step.py) for scripts/one_process: methods without asynchrony."""

from __future__ import annotations

from typing import Any

import numpy as np

from common import recipe as recipes
from common import wire
from common.config import RunConfig
from common.versions import Weights
from learner.config import LearnerConfig
from learner.item import Item
from learner.model import snapshot
from learner.state import make_state
from learner.step import train_step

ANSWER_TOKENS = 48


class System:
    """The step as the learner takes it, in a recipe's form. Raises ConfigError."""

    def __init__(self, recipe: str, changes: tuple[str, ...], seed: int) -> None:
        config = recipes.load(recipe, {"learner": LearnerConfig}, changes)["learner"]
        assert isinstance(config, LearnerConfig)
        self.config = config
        self.state = make_state(RunConfig(model="tiny", seed=seed), config)
        self.entropies: list[float] = []
        self.target = 0.0  # of the last step, nats; 0: no method had one

    def step(self, number: int, groups: list[Any], lag: int) -> dict[str, float]:
        """Numbers of the log that are one number a step, and no times."""
        sampled_by = max(0, number - lag)
        items = [item(number * len(groups) + i, g, sampled_by) for i, g in enumerate(groups)]
        metrics = train_step(self.state, items, self.config).metrics
        entropy = metrics["entropy"]
        assert isinstance(entropy, float)
        self.entropies.append(entropy)
        found = {k: v for k, v in metrics.items() if isinstance(v, float)}
        self.target = found.get("methods/isentropic/target", 0.0)
        of_methods = {k: v for k, v in found.items() if k.startswith("methods/")}
        # the page's `entropy` is that of all that is sampled
        return {"trained_entropy": entropy, "grad_norm": found["grad_norm"]} | of_methods

    def weights(self, version: int) -> Weights:
        return Weights(version, digest="", tensors=snapshot(self.state.model, "fp32"))

    def held(self) -> dict[str, float]:
        """Of the tokens trained on, over the last half: entropy, and its distance to the target as
        a share of it; `miss_5`: of means of five steps.
        """
        half = np.array(self.entropies[len(self.entropies) // 2 :])
        found = {"start": self.entropies[0], "held": float(half.mean())}
        if self.target:
            off = half / self.target - 1
            fives = np.convolve(off, np.ones(5) / 5, "valid") if off.size >= 5 else off
            found |= {"miss": float(abs(off).mean()), "bias": float(off.mean())}
            found |= {"miss_5": float(abs(fives).mean())}
        return found


def item(number: int, group: Any, version: int) -> Item:
    """A group as the learner takes it, sampled by `version`."""

    def graded(rollout: Any) -> wire.Rollout:
        tokens, logps = np.array(rollout.answer, np.int32), np.array(rollout.logps, np.float32)
        own = wire.Segment(role="policy", tokens=tokens, logps=logps, spans=((0, version),))
        finish: wire.Finish = "length" if tokens.size == ANSWER_TOKENS else "stop"
        return wire.Rollout(segments=(own,), finish=finish, correct=rollout.reward)

    ticket = wire.Ticket(
        id=number,
        kind="main",
        problem=str(number),
        prompt=np.array(group[0].prompt, np.int32),
        n=len(group),
        sampling=wire.Sampling(max_tokens=ANSWER_TOKENS),
        grading=wire.Grading(),
    )
    rollouts = tuple(map(graded, group))
    made = wire.Group(ticket=number, attempt=0, kind="main", problem=str(number), rollouts=rollouts)
    return Item(ticket, made)
