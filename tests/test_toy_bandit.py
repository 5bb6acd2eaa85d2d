"""The bandit on which entropy collapses (toy.py): the direction of every method, no model involved.

Only orderings with wide margins are asserted: what strength on a toy means for a language model is
another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest

from learner.config import LearnerConfig
from learner.methods.aepo import Aepo
from learner.methods.base import Method
from learner.methods.clip_b import ClipB
from learner.methods.clip_cov import ClipCov
from learner.methods.clip_v import ClipV
from learner.methods.entropy_bonus import EntropyBonus
from learner.methods.isentropic import Isentropic
from learner.methods.kl_cov import KlCov
from learner.methods.steer import Steer
from tests.tables import PPO
from tests.toy import Bandit

STEPS, SEEDS = 75, 2
OPEN = LearnerConfig(loss="decoupled_ppo", clip_low=None, clip_high=None)


class Outcome(NamedTuple):
    start: float  # mean entropy of the states' policies before the first step, nats
    entropy: float  # … and before the last
    success: float  # mean probability of a good arm at the end


def play(
    methods: Sequence[Method] = (), config: LearnerConfig = PPO, steps: int = STEPS, **fields: Any
) -> Outcome:
    """The mean over the seeds."""
    own: dict[str, Any] = {"realised": False, "config": config, **fields}
    runs = [Bandit(methods, seed=seed, **own).run(steps) for seed in range(SEEDS)]
    ends = [(b.entropy[0], b.entropy[-1], b.success) for b in runs]
    return Outcome(*(sum(values) / SEEDS for values in zip(*ends, strict=True)))


@cache
def grpo() -> Outcome:
    return play()


def test_the_entropy_of_plain_grpo_collapses_while_it_learns() -> None:
    assert grpo().start > 2.0
    assert grpo().entropy < 0.15 * grpo().start
    assert grpo().success > 0.95


@pytest.mark.parametrize(
    "method",
    [
        ClipB(mu=1.0, denominator="kept"),
        ClipV(mu=1.0, max_frac=1.0, denominator="kept"),
    ],
    ids=lambda m: m.name,
)
def test_discriminator_clipping_keeps_twice_the_entropy(method: Method) -> None:
    found = play([method])
    assert found.entropy > 2 * grpo().entropy
    assert found.success > 0.9


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (Steer(lambda_min=0.3), PPO),
        (ClipCov(ratio=0.2), PPO),
        (KlCov(ratio=0.2, anchor="proximal"), OPEN),
        (EntropyBonus(coefficient=0.1), PPO),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_damping_dropping_pulling_and_paying_keep_more_entropy_at_the_same_success(
    method: Method, config: LearnerConfig
) -> None:
    found = play([method], config)
    assert found.entropy > 1.1 * grpo().entropy
    assert found.success > 0.95


def test_a_higher_set_point_of_warm_samples_gives_a_higher_entropy() -> None:
    low, high = (
        play([Aepo(target=target, alpha=1.0)], steps=60, aux_temperature=1.0)
        for target in (0.2, 0.8)
    )
    assert high.entropy > 1.5 * low.entropy
    assert min(low.success, high.success) > 0.95


def test_balanced_flows_keep_the_entropy_where_it_is() -> None:
    found = play([Isentropic(preset="opefo")])
    assert found.entropy == pytest.approx(found.start, rel=0.05)
