"""The algorithm on one page and the asynchronous system are the same algorithm."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actor.config import ActorConfig
from actor.engine.make import make
from common import models
from common.config import RunConfig
from learner.config import LearnerConfig
from learner.ledger import Item
from learner.prompts.arithmetic import draw
from learner.step import make_state, train_step
from tests.builders import make_group, make_rollout, make_ticket

SCRIPT = Path(__file__).parents[1] / "scripts" / "one_process"


def loaded(path: Path) -> Iterator[Any]:
    """A script as a module."""
    name = path.stem
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a NamedTuple looks its module up
    loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    yield from loaded(SCRIPT)


@pytest.fixture(scope="module")
def system() -> Iterator[Any]:
    """What --recipe and -s take the place of the page's step with."""
    yield from loaded(SCRIPT.parent / "_system.py")


@pytest.fixture(scope="module")
def groups(page: Any) -> list[Any]:
    """Twelve groups of eight answers that the shipped model gave.

    Their log-probs are moved, so that ratios lie on both sides of the clip and of the cap.
    """
    rng = np.random.default_rng(0)

    def moved(rollout: Any) -> Any:
        noise = rng.normal(0.0, 0.5, len(rollout.logps))
        return rollout._replace(logps=(rollout.logps + noise).tolist())

    async def sample() -> list[Any]:
        engine = make(RunConfig(model="tiny"), ActorConfig(threads=1))
        tokenizer = AutoTokenizer.from_pretrained(models.find("tiny"))
        problems = [draw(0, number, "train") for number in range(12)]
        answered: list[Any] = await page.answers(engine, tokenizer, problems, 8)
        await engine.close()
        return answered

    return [[moved(rollout) for rollout in group] for group in asyncio.run(sample())]


def test_two_steps_print_finite_numbers() -> None:
    options = ["--steps", "2", "--prompts", "4", "--group", "4", "--eval-every", "0", "--refill"]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    first, last = map(json.loads, done.stdout.splitlines())
    assert first.keys() >= {"step", "reward", "entropy", "length", "tokens", "seconds"}
    assert last["step"] == 2
    assert 0.3 < last["final"] < 0.6
    numbers = [v for v in (first | last).values() if not isinstance(v, dict)]
    assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        ("ppo", {"loss": "ppo"}),
        ("pg", {"loss": "reinforce"}),
        ("tis", {"loss": "reinforce", "correction": "truncate", "correction_high": 2.0}),
    ],
)
def test_one_page_and_the_system_make_the_same_gradient_of_the_same_answers(
    page: Any, groups: list[Any], loss: str, same: dict[str, Any]
) -> None:
    config = LearnerConfig(warmup_steps=0, lr=1.0, grad_clip=1e9, tokens_per_micro=200, **same)
    state = make_state(RunConfig(model="tiny"), config)
    model = AutoModelForCausalLM.from_pretrained(models.find("tiny"), dtype=torch.float32)

    outside = page.backward(model, groups, loss)
    assert 0.1 < outside < 0.9

    # one step of SGD with rate 1 shows the gradient itself
    state.optimizer = torch.optim.SGD(state.masters.values(), lr=1.0)
    before = {name: master.detach().clone() for name, master in state.masters.items()}
    train_step(state, [as_item(number, group) for number, group in enumerate(groups)], config)
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        system = before[name] - state.masters[name]
        assert torch.allclose(system, weight.grad, rtol=1e-3, atol=1e-6), name


def test_the_learners_own_step_takes_a_recipes_methods_and_tells_how_the_entropy_was_held(
    system: Any, groups: list[Any]
) -> None:
    method = '{type="isentropic", target=0.5, mode="hold"}'
    taken = system.System("tiny", (f"learner.methods=[{method}]",), seed=0)
    first = taken.weights(0)
    numbers = [taken.step(number, groups[:2], lag=2) for number in range(2)]
    assert numbers[0]["methods/isentropic/target"] == pytest.approx(
        0.5 * numbers[0]["trained_entropy"]
    )
    held = taken.held()
    assert held["held"] == numbers[1]["trained_entropy"]
    assert held["miss"] == pytest.approx(abs(held["held"] / (0.5 * held["start"]) - 1))
    moved = [a.data != b.data for a, b in zip(first.tensors, taken.weights(2).tensors, strict=True)]
    assert any(moved)


def as_item(number: int, group: list[Any]) -> Item:
    """A group of the page as the system's."""
    rollouts = tuple(make_rollout(r.reward, r.answer, r.logps) for r in group)
    ticket = make_ticket(number, prompt=group[0].prompt, n=len(group))
    return Item(ticket, make_group(ticket=number, rollouts=rollouts))
