"""What methods and losses do does not depend on how many ranks share the batch: two gloo processes
train every one of them, one after the other, and this one does the same alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from learner.methods.base import Method
from learner.step import StepReport
from tests.every import EVERY, METHODS, Setting
from tests.test_method_every import alike, train
from tests.test_methods import bits


def _together() -> Setting:
    """All of them at once that can be: one of a name, one that governs."""
    by_name: dict[str, Method] = {s.methods[0].name: s.methods[0] for s in METHODS}
    del by_name["adaptive_entropy"]
    return Setting("all together", tuple(by_name.values()))


SETTINGS = (*EVERY, _together())


def _train_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    try:
        found = {}
        for setting in SETTINGS:
            state, report = train(setting)
            found[setting.name] = (bits(state), report.metrics)
        torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    finally:
        if world > 1:
            distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """What one rank makes of every setting, and each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_train_rank, (2, str(folder)), nprocs=2)
    _train_rank(0, 1, str(folder))
    one, a, b = (
        torch.load(folder / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt")
    )
    return one, a, b


@pytest.mark.parametrize("name", [s.name for s in SETTINGS], ids=lambda n: n.replace(" ", "-"))
def test_two_ranks_do_what_one_rank_does(name: str, ranks: tuple[Any, Any, Any]) -> None:
    one, a, b = (found[name] for found in ranks)
    assert a[0] == b[0]
    alike(StepReport(one[1]), StepReport(a[1]))
