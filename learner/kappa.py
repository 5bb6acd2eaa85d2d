"""KappaTune: train only the tensors with the lowest condition numbers (arXiv 2506.16289).

    kappa(W) = sigma_max / sigma_min        of the thin singular values; 3-D: mean over the first

A low kappa says that a tensor is little specialised and can move with little forgetting; that is
the paper's hypothesis for fine-tuning. Nobody has shown it for reinforcement learning: use it as an
experiment. What is frozen has no gradient, no optimiser state, and is not published again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common import models
from common.errors import ConfigError
from common.runfolder import write_durable
from learner.tuning import KappaConfig

if TYPE_CHECKING:
    from learner.model import Policy

log = logging.getLogger("isentrope.kappa")


def kappa(weight: Tensor) -> float:
    """Condition number of a matrix [m, n], or mean over those of [E, m, n]; at least 1, inf where a
    matrix is singular to the precision of its dtype (half precision is computed in float32).
    """
    exact = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    sigma = torch.linalg.svdvals(exact.reshape(-1, *exact.shape[-2:]))
    largest, least = sigma[:, 0], sigma[:, -1]
    round_off = max(exact.shape[-2:]) * torch.finfo(exact.dtype).eps * largest
    ratios = torch.where(least <= round_off, math.inf, largest / least)
    return float(ratios.mean())


def select(kappas: dict[str, float], config: KappaConfig) -> list[str]:
    """Names to train, lowest kappa first, ties by name; singular tensors never."""
    ranked = sorted((value, name) for name, value in kappas.items() if math.isfinite(value))
    if config.below is not None:
        return [name for value, name in ranked if value < config.below]
    wanted = config.tensors or max(1, math.floor(len(ranked) * (config.share or 0)))
    return [name for _, name in ranked[:wanted]]


def candidates(policy: Policy, config: KappaConfig) -> dict[str, nn.Parameter]:
    """The tensors that may be trained: matrices and stacks of them, tied ones once, no embedding
    and no head unless asked for, none above `max_dim`.
    """
    from learner.model import trainable

    outside: set[int] = set()
    if not config.embeddings:
        ends = (policy.net.get_input_embeddings(), policy.net.get_output_embeddings())
        outside = {id(p) for end in ends if end is not None for p in end.parameters()}
    return {
        name: p
        for name, p in trainable(policy).items()
        if p.ndim in (2, 3)
        and id(p) not in outside
        and not (config.max_dim and max(p.shape) > config.max_dim)
    }


def freeze(policy: Policy, config: KappaConfig) -> list[str]:
    """Freeze all but the selected tensors of the initial policy; their names. Raises ConfigError
    when nothing is left to train.
    """
    from learner.model import trainable

    may = candidates(policy, config)
    known = _cached(may)
    chosen = select(known, config)
    if not chosen:
        raise ConfigError(
            f"learner.kappa_tune: no tensor of {len(may)} is left to train; lowest condition "
            f"number {min(known.values(), default=math.nan):.3g}"
        )
    every = trainable(policy)
    for name, parameter in every.items():
        parameter.requires_grad_(name in chosen)
    share = sum(every[name].numel() for name in chosen) / sum(p.numel() for p in every.values())
    log.info("training %d of %d tensors, %.1f %%", len(chosen), len(every), 100 * share)
    return chosen


def _cached(tensors: dict[str, nn.Parameter]) -> dict[str, float]:
    """Condition numbers by name; computed once for the very same weights."""
    path = models.made_folder().parent / "kappa" / f"{_key(tensors)}.json"
    known = _read(path)
    missing = {name: kappa(p) for name, p in tensors.items() if name not in known}
    if missing:
        known |= missing
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            write_durable(aside, json.dumps(known).encode())
            aside.rename(path)
        except OSError as error:
            log.warning("condition numbers are not kept: %s", error)
    return {name: known[name] for name in tensors}


def _key(tensors: dict[str, nn.Parameter]) -> str:
    said = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        said.update(f"{name} {tuple(tensor.shape)} ".encode())
        said.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return said.hexdigest()


def _read(path: Path) -> dict[str, float]:
    """Empty when there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
