"""The policy's entropy wherever a token was sampled, under the newest weights of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from common import shards
from common.errors import DataError
from common.rollouts import Said
from common.runfolder import RunFolder
from learner.history import checkpoints


def entropies(
    folder: Path, base: Path, found: Sequence[Said]
) -> tuple[list[list[float | None]], str]:
    """For every token of every segment the entropy (nats) before it, at the temperature that it was
    sampled with, None where it was not sampled; and a word on whose weights these are.

    `base`: the model that the run began with. Raises DataError when the run has no weights.
    """
    net, note = newest(folder, base)
    return [_entropies(net, said) for said in found], f"entropy under {note}"


def newest(folder: Path, base: Path) -> tuple[Any, str]:
    """The transformers model of the newest checkpoint, else of what the run exported."""
    exported = folder / "model"
    last = next(iter(checkpoints(RunFolder.open(folder))), None)
    if last is not None:
        net = _load(base)
        _put(net, last)
        return net, f"the weights of step {int(last.name.rpartition('-')[2])}"
    if (exported / "config.json").is_file():
        return _load(exported), "the weights that the run exported"
    raise DataError(
        f"{folder} has no weights yet: a run's first checkpoint brings some; "
        "take --colour surprisal"
    )


def _load(folder: Path) -> Any:
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        net: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot load the model {folder}: {str(error).splitlines()[0]}") from None
    return net.eval()


@torch.no_grad()
def _put(net: Any, checkpoint: Path) -> None:
    """The weights of a checkpoint of any number of ranks over those that the run began with."""
    own = dict(net.named_parameters())
    try:
        ranks = shards.Index.load(checkpoint).ranks
        for rank in range(ranks):
            with safe_open(checkpoint / shards.name(shards.WEIGHTS, rank, ranks), "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    first, last = shards.lines(own[name].shape[0], rank, ranks)
                    own[name][first:last].copy_(file.get_tensor(name))
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{checkpoint}: its weights cannot be read ({error}); a run that goes on replaces its "
            "checkpoints: try again"
        ) from None


@torch.no_grad()
def _entropies(net: Any, said: Said) -> list[float | None]:
    segments = said.rollout.segments
    ids = np.concatenate([said.ticket.prompt, *(segment.tokens for segment in segments)])
    logits = net(torch.from_numpy(ids).long()[None]).logits[0]
    before = logits[said.ticket.prompt.size - 1 : -1].float()
    heat = np.concatenate([np.full(s.tokens.size, s.temperature) for s in segments])
    logps = (before / torch.from_numpy(heat).float()[:, None]).log_softmax(-1)
    entropy = (-(logps.exp() * logps).sum(-1)).tolist()
    sampled = [segment.role == "policy" for segment in segments for _ in segment.tokens]
    return [h if own else None for h, own in zip(entropy, sampled, strict=True)]
