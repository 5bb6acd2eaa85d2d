from pathlib import Path

import torch
from torch import distributed

from learner.comm import Comm
from tests.together import together


def _gather(rank: int, store: str, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        comm = Comm.current()
        columns = torch.zeros(3, 10)
        mine = torch.arange(rank, 10, 2)
        columns[:, mine] = torch.arange(30.0).view(3, 10)[:, mine]
        torch.save(comm.gather(columns), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_gather_one_table_in_canonical_order(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    together(2, _gather, store, str(tmp_path))
    for rank in range(2):
        gathered = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(gathered, torch.arange(30.0).view(3, 10))


def test_one_rank_alone_needs_no_process_group() -> None:
    comm = Comm.current()
    assert (comm.rank, comm.world_size) == (0, 1)
    columns = torch.ones(2, 3)
    assert comm.gather(columns) is columns
