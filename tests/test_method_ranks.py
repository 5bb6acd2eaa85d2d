"""What methods drop and weigh does not depend on how many ranks share the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from tests.test_method_promises import STRONG, train
from tests.test_methods import bits


def _train_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    try:
        state, report = train(STRONG, steps=1, updates_per_batch=2)
        torch.save((bits(state), report.metrics), Path(folder) / f"{world}-{rank}.pt")
    finally:
        if world > 1:
            distributed.destroy_process_group()


def test_two_ranks_drop_and_weigh_what_one_rank_does(tmp_path: Path) -> None:
    multiprocessing.spawn(_train_rank, (2, str(tmp_path)), nprocs=2)
    _train_rank(0, 1, str(tmp_path))
    one, a, b = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt")
    )
    assert a[0] == b[0]
    for method in STRONG:
        own = {k: v for k, v in one[1].items() if k.startswith(f"methods/{method.name}/")}
        assert own
        for key, value in own.items():
            assert a[1][key] == pytest.approx(value, rel=1e-3), key
    for key in ("loss", "grad_norm", "entropy_predicted"):
        assert a[1][key] == pytest.approx(one[1][key], rel=1e-3), key
