"""KappaTune and CLASSP in the learner's step: what they leave alone stays, what they keep comes
back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import RunConfig
from common.models import FOLDER_VARIABLE
from learner import checkpoint
from learner import model as models
from learner.config import LearnerConfig
from learner.item import Item
from learner.state import TrainState, make_state
from learner.step import train_step
from learner.tuning import ClasspConfig, KappaConfig
from tests.builders import make_group, make_ticket

RUN = RunConfig()
KAPPA = LearnerConfig(kappa_tune=KappaConfig(tensors=4), lr=0.01, warmup_steps=0)
CLASSP = LearnerConfig(classp=ClasspConfig(), lr=0.01, warmup_steps=0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "models"))


def items() -> list[Item]:
    return [Item(make_ticket(id=i), make_group((1, 0), ticket=i)) for i in range(4)]


def every(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.model.net.named_parameters()}


def test_frozen_tensors_are_the_same_bits_after_steps_and_the_chosen_move() -> None:
    state = make_state(RUN, KAPPA)
    before = every(state)
    for _ in range(2):
        train_step(state, items(), KAPPA)
    moved = [name for name, was in before.items() if not torch.equal(was, every(state)[name])]
    assert sorted(moved) == sorted(models.trainable(state.model))
    assert len(moved) == 4
    assert len(state.optimizer.state) == 4  # and nothing is kept of the others


@pytest.mark.parametrize("config", [KAPPA, CLASSP], ids=["kappa_tune", "classp"])
def test_a_checkpoint_goes_on_to_the_same_bits(config: LearnerConfig, tmp_path: Path) -> None:
    state = make_state(RUN, config)
    train_step(state, items(), config)
    checkpoint.save(tmp_path / "step", state, b"fold")
    train_step(state, items(), config)
    again = make_state(RUN, config)
    assert checkpoint.load(tmp_path / "step", again) == b"fold"
    train_step(again, items(), config)
    assert models.snapshot(state.model, "fp32") == models.snapshot(again.model, "fp32")


def test_classp_moves_where_the_gradient_is_large_and_nowhere_else() -> None:
    state = make_state(RUN, CLASSP)
    before = every(state)
    train_step(state, items(), CLASSP)
    moved = torch.cat([(was != every(state)[name]).flatten() for name, was in before.items()])
    assert 0.0 < moved.float().mean() < 0.6  # g² is above its mean at few coordinates


def test_off_is_the_plain_step_to_the_bit() -> None:
    plain = LearnerConfig()
    assert (plain.kappa_tune, plain.classp) == (None, None)
    assert type(make_state(RUN, plain).optimizer) is torch.optim.AdamW
