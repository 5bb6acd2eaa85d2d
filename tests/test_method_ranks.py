"""What methods and losses do does not depend on how many ranks share the batch and the model: two
gloo processes train every one of them, one after the other, and this one does the same alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from learner.comm import Comm, Order
from learner.methods.base import Method
from learner.ranks import obey
from learner.state import TrainState
from learner.step import StepReport
from tests.every import EVERY, METHODS, Setting
from tests.test_method_every import alike, begin, train
from tests.test_methods import bits
from tests.together import together


def _together() -> Setting:
    """All of them at once that can be: one of a name, one that governs."""
    by_name: dict[str, Method] = {s.methods[0].name: s.methods[0] for s in METHODS}
    del by_name["adaptive_entropy"]
    return Setting("all together", tuple(by_name.values()))


pytestmark = pytest.mark.timeout(400)  # of 35 settings, twice

FEW: dict[str, Any] = {"tokens_per_micro": 200}  # micro-batches: each is many messages
SETTINGS = (*EVERY, _together())


def floats(state: TrainState) -> torch.Tensor:
    return torch.frombuffer(bytearray(bits(state)), dtype=torch.float32)


def _train_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    try:
        found, comm = {}, Comm.current()
        for setting in SETTINGS:
            if rank:
                state, _ = begin(setting, **FEW)
                obey(comm, lambda: None, state)
            else:
                state, report = train(setting, **FEW)
                found[setting.name] = (floats(state), report.metrics)
                comm.say(Order.STOP)
        if not rank:
            torch.save(found, Path(folder) / f"{world}.pt")
    finally:
        if world > 1:
            distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What one rank makes of every setting, and what two make of it."""
    folder = tmp_path_factory.mktemp("ranks")
    together(2, _train_rank, 2, str(folder))
    _train_rank(0, 1, str(folder))
    one, two = (torch.load(folder / name, weights_only=True) for name in ("1.pt", "2.pt"))
    return one, two


@pytest.mark.parametrize("name", [s.name for s in SETTINGS], ids=lambda n: n.replace(" ", "-"))
def test_two_ranks_do_what_one_rank_does(name: str, ranks: tuple[Any, Any]) -> None:
    one, two = (found[name] for found in ranks)
    assert torch.allclose(one[0], two[0], atol=2e-3), "two of AdamW's moves are 2e-3 at most"
    assert (one[0] - two[0]).abs().mean() < 1e-5
    alike(StepReport(one[1]), StepReport(two[1]))
