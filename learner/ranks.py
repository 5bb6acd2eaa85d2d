"""A learner of many processes: `isentrope learner RECIPE --run-folder RUN --ranks N`, or torchrun.

    rank 0      everything that a learner of one process does, and an order before each thing that
                all must do together
    ranks 1 …   hear() ──▶ make the model, load a checkpoint, take a step, show slices, write them
                   ▲───────────────────────┘                                       … until "stop"

Whoever waits, waits for another rank: for `timeout_s` at most, and not at all when its process is
gone, since its connections are. While rank 0 waits for groups it asks twice a second whether all
are there. So when one rank is lost, or hangs, the others end with one line that names it, and the
run goes on with --resume, on as many ranks as there are then. The run folder must be one that all
ranks see.

On CPUs gloo carries everything. On GPUs NCCL carries what is sharded, and gloo the orders.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from common.config import RunConfig
from common.errors import RankError
from common.process import die_with_parent
from learner import checkpoint, model, slices
from learner.comm import Comm, Order
from learner.config import STORE_VARIABLE, LearnerConfig, RanksConfig
from learner.state import TrainState, make_alike
from learner.step import follow_step

log = logging.getLogger("isentrope.ranks")

LAST_WORDS_S = 2.0  # for the others to say that they end too; who says nothing is the lost one

# What errors of a connection say; torch has no class for those of gloo.
_LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "tcpstore")


@contextmanager
def session(config: LearnerConfig) -> Iterator[Comm]:
    """The ranks that were started together, for as long as the learner lives; else one rank.

    Raises RankError when one of them is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Comm()
        return
    if distributed.is_torchelastic_launched():
        die_with_parent()  # torchrun gives each rank a session of its own
    store: Store | None = None
    try:
        store = _meet(config)
        _join(config, store)
        comm = Comm.current()
        yield comm
        comm.say(Order.STOP)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not any(mark in said.lower() for mark in _LOST):
            raise
        why = re.sub(r"\[[^]]*(\.\w+:\d+|none)\] ?", "", said).strip()  # of "[file:line] words"
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        raise RankError(
            f"{_lost(store, rank, world_size)} of the learner is lost, so rank {rank} ends "
            f"({why.split('. ')[0]}); go on with --resume, on any number of ranks"
        ) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _lost(store: Store | None, rank: int, world_size: int) -> str:
    """Who it is: the one that does not say that it ends too. "another rank" where nobody knows."""
    if distributed.is_initialized():
        distributed.destroy_process_group()  # who waits for this rank need not wait any longer
    silent = _silent(store, rank, world_size) if store is not None else []
    if not silent:
        return "another rank"
    return f"rank {silent[0]}" if len(silent) == 1 else f"each of the ranks {silent}"


def _silent(store: Store, rank: int, world_size: int) -> list[int]:
    """Empty, too, when the store went with the machine that had it."""
    silent = set(range(world_size)) - {rank}
    until = time.monotonic() + LAST_WORDS_S
    try:
        store.set(f"ends-{rank}", "")
        while silent and time.monotonic() < until:
            silent -= {other for other in silent if store.check([f"ends-{other}"])}
            time.sleep(0.05)  # torch complains in two lines of its own when a wait ends in vain
    except RuntimeError:
        return []
    return sorted(silent)


def _meet(config: LearnerConfig) -> Store:
    """Where the ranks of this life leave each other words."""
    timeout = _timeout(config)
    path = os.environ.get(STORE_VARIABLE)  # of launch.py; else torchrun's environment
    where = "env://" if path is None else Path(path).as_uri()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(rendezvous(where, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    # torchrun's store outlives the ranks: those started again must not find the old addresses
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"life-{life}", store)


def _join(config: LearnerConfig, store: Store) -> None:
    backend = "gloo"
    if model.device(config).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # all on this machine: they would listen where the machine's name points to
        for library in ("GLOO", "NCCL"):
            loopback = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_timeout(config)
    )


def _timeout(config: LearnerConfig) -> timedelta:
    return timedelta(seconds=(config.ranks or RanksConfig()).timeout_s)


def follow(run: RunConfig, config: LearnerConfig, comm: Comm) -> None:
    """Ranks 1 …: signals are for rank 0, which says stop when it has drained."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    log.info("rank %d of %d, pid %d", comm.rank, comm.world_size, os.getpid())
    obey(comm, lambda: make_alike(run, config))


def obey(comm: Comm, make: Callable[[], TrainState], state: TrainState | None = None) -> None:
    """Do what rank 0 orders until it says stop."""
    while True:
        order, facts = comm.hear()
        if order is Order.STOP:
            return
        if order is Order.BEAT:
            comm.meet()
        elif order is Order.MAKE:
            state = make()
        else:
            assert state is not None, "rank 0 has the model made first"
            _do(order, facts, state, comm)


def _do(order: Order, facts: bytes, state: TrainState, comm: Comm) -> None:
    match order:
        case Order.STEP:
            follow_step(state, facts, comm)
        case Order.SNAPSHOT:
            slices.keep(model.trainable(state.model), facts, state.model.shelf)
        case Order.SHOW:
            slices.show(facts, state.model.shelf)
        case Order.EXPORT:
            model.show_all(state.model)
        case Order.LOAD:
            checkpoint.load_slices(Path(os.fsdecode(facts)), state)
        case Order.SAVE:
            checkpoint.save_slices(Path(os.fsdecode(facts)), state)
        case _:
            raise AssertionError(f"rank 0 has no order {order!r}")
