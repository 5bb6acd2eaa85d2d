"""A tabular bandit on which entropy collapses: the direction of every method, no model involved.

64 states with 12 arms, 3 of them good; logits N(0, 1); a step draws 8 arms a state and makes 4
updates of plain gradient descent on the logits with the whole batch. Only orderings with wide
margins are asserted: what strength on a toy means for a language model is another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.loss import surrogate
from learner.methods.base import Method
from learner.methods.clip_b import ClipB
from learner.methods.clip_cov import ClipCov
from learner.methods.clip_v import ClipV
from learner.methods.compose import Methods
from learner.methods.steer import Steer
from tests.tables import PPO, make_table, with_surrogate

STATES, ARMS, GOOD, SAMPLES, UPDATES, RATE = 64, 12, 3, 8, 4, 20.0
SEEDS = 2


class Outcome(NamedTuple):
    start: float  # mean entropy of the states' policies before the first step, nats
    entropy: float  # … and after the last
    success: float  # mean probability of a good arm


def play(
    methods: Sequence[Method], steps: int = 75, seed: int = 0, config: LearnerConfig = PPO
) -> Outcome:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(STATES, ARMS, generator=rng)
    good = torch.rand(STATES, ARMS, generator=rng).argsort(-1) < GOOD
    start = float(_entropy(logits.log_softmax(-1)).mean())
    composed = Methods(methods)
    for step in range(steps):
        p = logits.softmax(-1)
        arms = torch.multinomial(p, SAMPLES, replacement=True, generator=rng)
        reward = good.gather(1, arms).float()
        advantage = (reward - reward.mean(1, True)) / (reward.std(1, keepdim=True) + 1e-6)
        lp = None
        for update in range(UPDATES):
            leaf = logits.detach().requires_grad_()
            loss, lp = _loss(leaf, arms, advantage, lp, composed, (seed, step, update), config)
            (slope,) = torch.autograd.grad(loss, leaf)
            logits = logits - RATE * slope
    final = logits.log_softmax(-1)
    return Outcome(start, float(_entropy(final).mean()), float((final.exp() * good).sum(-1).mean()))


def _loss(
    logits: Tensor,
    arms: Tensor,
    advantage: Tensor,
    lp: Tensor | None,
    methods: Methods,
    when: tuple[int, int, int],
    config: LearnerConfig,
) -> tuple[Tensor, Tensor]:
    """The mean loss of all arms drawn, under the methods' weights; and their proximal log-probs."""
    ln_p = logits.log_softmax(-1)
    of_arm = ln_p.gather(1, arms).reshape(-1)
    H = _entropy(ln_p)
    N = (ln_p.exp() ** 2 * (H[:, None] + ln_p)).sum(-1)
    columns: dict[str, Any] = {"H": H, "N": N}
    columns = {k: c.detach().repeat_interleave(SAMPLES) for k, c in columns.items()}
    state = torch.arange(STATES).repeat_interleave(SAMPLES)
    table = make_table(
        of_arm.detach(),
        advantage.reshape(-1),
        lp=lp,
        dtype=torch.float32,
        group=state,
        ticket=state,
        rollout=torch.arange(SAMPLES).repeat(STATES),
        **columns,
    )
    table = replace(with_surrogate(table, config), when=when)
    weight = methods.factors(table, lambda w: torch.zeros_like(table.logp), {}).weight
    loss = surrogate(of_arm, table.lp, table.lb, table.advantage, config)
    return (loss if weight is None else weight * loss).mean(), table.lp


def _entropy(ln_p: Tensor) -> Tensor:
    return -(ln_p.exp() * ln_p).sum(-1)


def mean(methods: Sequence[Method]) -> Outcome:
    runs = [play(methods, seed=seed) for seed in range(SEEDS)]
    return Outcome(*(sum(values) / SEEDS for values in zip(*runs, strict=True)))


@pytest.fixture(scope="module")
def grpo() -> Outcome:
    return mean([])


def test_the_entropy_of_plain_grpo_collapses_while_it_learns(grpo: Outcome) -> None:
    assert grpo.start > 2.0
    assert grpo.entropy < 0.15 * grpo.start
    assert grpo.success > 0.95


@pytest.mark.parametrize(
    "method",
    [
        ClipB(mu=1.0, denominator="kept"),
        ClipV(mu=1.0, max_frac=1.0, denominator="kept"),
    ],
    ids=lambda m: m.name,
)
def test_discriminator_clipping_keeps_twice_the_entropy(method: Method, grpo: Outcome) -> None:
    found = mean([method])
    assert found.entropy > 2 * grpo.entropy
    assert found.success > 0.9


@pytest.mark.parametrize(
    "method", [Steer(lambda_min=0.3), ClipCov(ratio=0.2)], ids=lambda m: m.name
)
def test_damping_and_dropping_keep_more_entropy_at_the_same_success(
    method: Method, grpo: Outcome
) -> None:
    found = mean([method])
    assert found.entropy > 1.1 * grpo.entropy
    assert found.success > 0.95
