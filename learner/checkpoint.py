"""A checkpoint: one folder that is there in full or not at all.

    weights.safetensors     the fp32 master weights, by name
    optimizer.safetensors   first and second moments, step counts, torch's random state
    state.json              t, methods' states and what they ask for, the entropy law's sums,
                            torch build, threads
    fold.msgpack            the ledger's fold (opaque here)
    manifest.json           sha256 of every other file

Written aside in the same parent, fsynced, renamed. Nothing pickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.errors import DataError, JournalError
from learner.measure import Law
from learner.methods.base import Ask
from learner.state import TrainState

_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "fold.msgpack")
_MANIFEST = "manifest.json"


def save(folder: Path, state: TrainState, fold: bytes) -> None:
    """Replaces a checkpoint of the same name. Raises OSError (disk full), the old one intact."""
    contents = {
        "weights.safetensors": save_tensors(_cpu(state.masters)),
        "optimizer.safetensors": save_tensors(_cpu(_optimizer_tensors(state))),
        "state.json": json.dumps(_facts(state), sort_keys=True, indent=1).encode(),
        "fold.msgpack": fold,
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents[_MANIFEST] = json.dumps(digests, indent=1).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    with _aside(folder) as aside:
        for name, data in contents.items():
            _write(aside / name, data)
        _sync(aside)
        if folder.exists():
            remove(folder)
        aside.rename(folder)
    _sync(folder.parent)


def load(folder: Path, state: TrainState) -> bytes:
    """Puts a checkpoint into `state` and returns its fold.

    Raises JournalError naming a file that is missing, cut or damaged, and DataError when the
    checkpoint belongs to another model. `state` is untouched then.
    """
    contents = _verified(folder)
    weights = _tensors(folder, contents, "weights.safetensors")
    moments = _tensors(folder, contents, "optimizer.safetensors")
    wanted = {name: tuple(p.shape) for name, p in state.masters.items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[0]
        raise DataError(f"{folder}: made from another model ({odd[0]} {odd[1]})")
    facts = json.loads(contents["state.json"])
    _restore(state, weights, moments, facts)
    return contents["fold.msgpack"]


def fold(folder: Path) -> bytes:
    """Only the ledger's fold; raises JournalError like `load`."""
    return _verified(folder)["fold.msgpack"]


class Held(NamedTuple):
    """A state in memory, to come back to: what `save` writes, without a fold."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    facts: dict[str, Any]


def hold(state: TrainState) -> Held:
    weights = {name: master.detach().clone() for name, master in state.masters.items()}
    moments = {name: t.detach().clone() for name, t in _optimizer_tensors(state).items()}
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
        state.optimizer.state[master][key] = value.to(master.device)
    with torch.no_grad():
        for name, master in state.masters.items():
            master.copy_(weights[name])
    state.publish_masters()
    state.t = facts["t"]
    state.methods_state = facts["methods"]
    state.ask = msgspec.convert(facts.get("ask"), Ask | None)
    state.law = Law(facts["law"])


def _verified(folder: Path) -> dict[str, bytes]:
    try:
        digests = json.loads(_read(folder / _MANIFEST))
    except ValueError:
        raise JournalError(f"{folder / _MANIFEST} is damaged; use an older checkpoint") from None
    contents = {name: _read(folder / name) for name in _FILES}
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != digests.get(name):
            raise JournalError(f"{folder / name} is cut or damaged; use an older checkpoint")
    return contents


def _tensors(folder: Path, contents: dict[str, bytes], name: str) -> dict[str, Tensor]:
    try:
        return load_tensors(contents[name])
    except SafetensorError as error:
        raise JournalError(f"{folder / name}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror}") from None


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}


def _sweep(parent: Path) -> None:
    """Delete what killed processes left aside; one learner owns the folder, nobody is writing."""
    for pattern in (".*.tmp", ".*.old"):
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
