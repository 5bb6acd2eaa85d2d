"""A checkpoint: one folder that is there in full or not at all.

    weights.safetensors     the fp32 master weights, by name
    optimizer.safetensors   first and second moments, step counts, torch's random state
    state.json              t, methods' states and what they ask for, the entropy law's sums,
                            torch build, threads
    fold.msgpack            the ledger's fold (opaque here)
    manifest.json           sha256 of every other file

Of N > 1 ranks each writes its slices, in weights-RANK.safetensors and optimizer-RANK.safetensors,
and index.json says how many there are and the shape of every whole tensor (common/shards.py). Any
number of ranks reads what any number wrote: each takes the lines that are its own.

Written aside in the same parent, fsynced, renamed. Nothing pickled.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from common import shards
from common.errors import DataError, JournalError
from learner import shard
from learner.comm import Comm, Order
from learner.measure import Law
from learner.methods.base import Ask
from learner.pieces import Pieces
from learner.state import TrainState

log = logging.getLogger("isentrope.checkpoint")
_NOTHING, _FINE = bytes(32), bytes(4)  # no file's digest; the error's number where there is none
_FOLD, _STATE, _MANIFEST = "fold.msgpack", "state.json", "manifest.json"
_PRIOR = ".prior"  # ends the name of what is being replaced


def save(folder: Path, state: TrainState, fold: bytes) -> None:
    """Replaces a checkpoint of the same name. Raises OSError (disk full), the old one intact.

    Of many ranks rank 0 calls it; the others `save_slices`.
    """
    comm = Comm.current()
    contents = {
        _STATE: json.dumps(_facts(state), sort_keys=True, indent=1).encode(),
        _FOLD: fold,
    }
    if comm.world_size > 1:
        shapes = {name: tuple(master.shape) for name, master in state.masters.items()}
        contents[shards.INDEX] = shards.Index(comm.world_size, shapes).dump()
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    with _aside(folder) as aside:
        comm.say(Order.SAVE, os.fsencode(aside.absolute()))
        digests = save_slices(aside, state)
        for name, data in contents.items():
            _write(aside / name, data)
            digests[name] = hashlib.sha256(data).hexdigest()
        _write(aside / _MANIFEST, json.dumps(digests, indent=1).encode())
        _sync(aside)
        prior = folder.with_name(f".{folder.name}{_PRIOR}")
        if folder.exists():
            folder.rename(prior)
        aside.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(prior, ignore_errors=True)


def save_slices(aside: Path, state: TrainState) -> dict[str, str]:
    """This rank's weights and moments; returns when every rank has written its own. Digests of all
    ranks' files, by name.

    Raises OSError on rank 0 when any rank could not write.
    """
    comm = Comm.current()
    stems = (shards.WEIGHTS, shards.MOMENTS)
    failed: OSError | None = None
    try:
        mine = [_write_slice(aside, stem, state, comm) for stem in stems]
    except OSError as error:
        failed, mine = error, [_NOTHING, _NOTHING]
    why = _FINE if failed is None else (failed.errno or errno.EIO).to_bytes(4, "little")
    found = comm.collect([*mine, why])
    if failed is not None and comm.rank == 0:
        raise failed
    if failed is not None:
        log.warning("rank %d cannot write its part of %s: %s", comm.rank, aside, failed)
    broken = [(rank, word) for rank, (*_, word) in enumerate(found) if word != _FINE]
    if broken and comm.rank == 0:
        number = int.from_bytes(broken[0][1], "little")
        raise OSError(number, f"rank {broken[0][0]}'s part: {os.strerror(number)}", str(aside))
    return {
        shards.name(stem, rank, comm.world_size): digest.hex()
        for rank, (*theirs, _) in enumerate(found)
        for stem, digest in zip(stems, theirs, strict=True)
    }


def _write_slice(aside: Path, stem: str, state: TrainState, comm: Comm) -> bytes:
    """Its digest. Raises OSError."""
    held = state.masters if stem == shards.WEIGHTS else _optimizer_tensors(state)
    data = save_tensors(_cpu(held))
    _write(aside / shards.name(stem, comm.rank, comm.world_size), data)
    return hashlib.sha256(data).digest()


def load(folder: Path, state: TrainState) -> bytes:
    """Puts a checkpoint into `state` and returns its fold.

    Raises JournalError naming a file that is missing, cut or damaged, and DataError when the
    checkpoint belongs to another model. `state` is untouched then. Of many ranks rank 0 calls it;
    the others `load_slices` of what it has verified.
    """
    _verify(folder)
    _check_model(folder, state)
    Comm.current().say(Order.LOAD, os.fsencode(folder.absolute()))
    load_slices(folder, state)
    return _read(folder / _FOLD)


def load_slices(folder: Path, state: TrainState) -> None:
    """This rank's slices of a checkpoint that any number of ranks wrote."""
    pieces = Pieces(folder)
    weights = {k: pieces.lines(shards.WEIGHTS, k, m) for k, m in state.masters.items()}
    moments = {"rng": pieces.rng()}
    for key_name in pieces.names(shards.MOMENTS):
        name = key_name.partition("/")[2]
        if name:
            moments[key_name] = pieces.lines(shards.MOMENTS, key_name, state.masters[name])
    _restore(state, weights, moments, json.loads(_read(folder / _STATE)))


def fold(folder: Path) -> bytes:
    """Only the ledger's fold; raises JournalError like `load`."""
    _verify(folder)
    return _read(folder / _FOLD)


class Held(NamedTuple):
    """A state in memory, to come back to: what `save` writes, without a fold."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    facts: dict[str, Any]


def hold(state: TrainState) -> Held:
    weights = {name: shard.local(m.detach()).clone() for name, m in state.masters.items()}
    moments = {k: shard.local(t.detach()).clone() for k, t in _optimizer_tensors(state).items()}
    return Held(weights, moments, copy.deepcopy(_facts(state)))


def put_back(state: TrainState, held: Held) -> None:
    """`state` as it was held, to the last bit; as often as wanted."""
    moments = {name: t.clone() for name, t in held.moments.items()}
    _restore(state, held.weights, moments, copy.deepcopy(held.facts))


def remove(folder: Path) -> None:
    """Out of sight at once, then deleted: a kill in between leaves no half checkpoint."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(gone)
    shutil.rmtree(gone)


def _facts(state: TrainState) -> dict[str, Any]:
    return {
        "t": state.t,
        "methods": state.methods_state,
        "ask": msgspec.to_builtins(state.ask),
        "law": state.law.sums,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {"rng": torch.get_rng_state()}
    for name, master in state.masters.items():
        for key, value in state.optimizer.state.get(master, {}).items():
            tensors[f"{key}/{name}"] = value
    return tensors


def _restore(
    state: TrainState, weights: dict[str, Tensor], moments: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    torch.set_rng_state(moments.pop("rng"))
    state.optimizer.state.clear()
    for key_name, value in moments.items():
        key, _, name = key_name.partition("/")
        master = state.masters[name]
        state.optimizer.state[master][key] = shard.beside(value.to(master.device), master)
    with torch.no_grad():
        for name, master in state.masters.items():
            shard.local(master).copy_(weights[name])
    state.publish_masters()
    state.t = facts["t"]
    state.methods_state = facts["methods"]
    state.ask = msgspec.convert(facts.get("ask"), Ask | None)
    state.law = Law(facts["law"])


# ---- reading ------------------------------------------------------------------------------------


def _check_model(folder: Path, state: TrainState) -> None:
    """Raises DataError for the checkpoint of a learner that trains something else."""
    pieces = Pieces(folder)
    wanted = {name: tuple(p.shape) for name, p in state.masters.items()}
    found = pieces.shapes()
    alike = wanted.keys() & found.keys()
    odd = sorted(name for name in alike if wanted[name] != found[name])
    if odd or not alike:
        first = odd[0] if odd else min(found, default="no tensor")
        raise DataError(f"{folder}: made from another model ({first} {found.get(first)})")
    if wanted.keys() != found.keys():
        raise DataError(
            f"{folder}: it was made while {len(found)} tensors were trained, and here are "
            f"{len(wanted)}; resume with the learner.kappa_tune that the run had"
        )
    kinds = {name.partition("/")[0] for name in pieces.names(shards.MOMENTS) if "/" in name}
    if kinds and ("exp_avg" in kinds) != isinstance(state.optimizer, torch.optim.AdamW):
        raise DataError(
            f"{folder}: its moments are another optimiser's; resume with the learner.classp that "
            "the run had"
        )


def _verify(folder: Path) -> None:
    """Raises JournalError unless every file is there and as the manifest says."""
    damaged = "is damaged; use an older checkpoint"
    try:
        digests = dict(json.loads(_read(folder / _MANIFEST)))
    except (ValueError, TypeError):
        raise JournalError(f"{folder / _MANIFEST} {damaged}") from None
    try:
        names = shards.Index.load(folder).names()
    except ValueError:
        raise JournalError(f"{folder / shards.INDEX} {damaged}") from None
    for name in (*names, _STATE, _FOLD):
        if _digest(folder / name) != digests.get(name):
            raise JournalError(f"{folder / name} is cut or damaged; use an older checkpoint")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror}") from None


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: shard.local(t.detach()).to("cpu").contiguous() for name, t in tensors.items()}


def sweep(parent: Path) -> None:
    """Put back what a killed process was to replace, delete what it left aside: nobody writes."""
    for prior in parent.glob(f".*{_PRIOR}"):
        folder = prior.with_name(prior.name.removeprefix(".").removesuffix(_PRIOR))
        if not folder.exists():
            prior.rename(folder)
    for pattern in (".*.tmp", ".*.old", f".*{_PRIOR}"):
        for left in parent.glob(pattern):
            shutil.rmtree(left)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder`, gone again unless it was renamed."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
