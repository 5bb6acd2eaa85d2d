"""From rollouts in the journal to what is shown of them: text by tokens, a number for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import models, recipe
from common.errors import DataError
from common.rollouts import Said, pieces
from common.rollouts_show import Shown, Token, Turn
from common.runfolder import RunFolder
from common.wire import Segment

Decode = Callable[[Sequence[int]], str]


def decoder(folder: Path) -> Decode:
    """Tokens to text, special ones included. Raises DataError without a tokenizer."""
    from tokenizers import Tokenizer

    path = model_folder(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path.parent}: no tokenizer.json to read the rollouts with")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def model_folder(folder: Path) -> Path:
    """Where the run's model is, by its own recipe."""
    from common.config import RunConfig

    run = recipe.load(str(RunFolder.open(folder).recipe), {"run": RunConfig})["run"]
    assert isinstance(run, RunConfig)
    return models.find(run.model)


def look(folder: Path, found: Sequence[tuple[Said, float]], colour: str) -> tuple[list[Shown], str]:
    """What to show of `found`, and a word on its numbers."""
    decode = decoder(folder)
    if colour == "entropy":
        values, note = _entropies(folder, [said for said, _ in found])
    else:
        values, note = [_surprisals(said) for said, _ in found], ""
    if colour == "none":
        values = [[None] * len(each) for each in values]
    pairs = zip(found, values, strict=True)
    return [_shown(said, reward, each, decode) for (said, reward), each in pairs], note


def facts(said: Said, reward: float, decode: Decode) -> dict[str, Any]:
    """One rollout for a program."""
    ticket, rollout = said.ticket, said.rollout
    return {
        "ticket": ticket.id,
        "rollout": said.number,
        "kind": ticket.kind,
        "problem": ticket.problem,
        "source": ticket.source,
        "template": ticket.template,
        "actor": said.actor,
        "fate": said.fate,
        "step": said.step,
        "lag": said.lag,
        "reward": reward,
        "correct": rollout.correct,
        "parts": list(rollout.parts),
        "error": rollout.error,
        "finish": rollout.finish,
        "gold": ticket.grading.gold,
        "prompt": decode(ticket.prompt.tolist()),
        "segments": [
            {
                "role": segment.role,
                "turn": segment.turn,
                "temperature": segment.temperature,
                "versions": list(segment.spans),
                "text": decode(segment.tokens.tolist()),
                "tokens": segment.tokens.tolist(),
                "logps": [round(float(logp), 6) for logp in segment.logps],
            }
            for segment in rollout.segments
        ],
    }


def _shown(said: Said, reward: float, values: Sequence[float | None], decode: Decode) -> Shown:
    ticket, rollout = said.ticket, said.rollout
    parts = {name: f"{score:g}" for part in rollout.parts for name, score in part.items()}
    told = {
        "reward": f"{reward:g}",
        **(parts if len(parts) > 1 else {}),
        "gold": ticket.grading.gold,
        "length": str(rollout.length),
        "finish": rollout.finish,
        "source": ticket.source,
        "template": ticket.template,
        "versions": _versions(rollout.segments),
        "lag": "" if said.lag is None else str(said.lag),
        "actor": said.actor,
        "error": rollout.error,
    }
    step = "" if said.step is None else f" at step {said.step}"
    title = f"{ticket.kind} {ticket.problem} · ticket {ticket.id}/{said.number} · {said.fate}{step}"
    return Shown(
        title=title,
        facts=tuple((name, value) for name, value in told.items() if value),
        prompt=decode(ticket.prompt.tolist()),
        turns=_turns(rollout.segments, values, decode),
    )


def _versions(segments: Sequence[Segment]) -> str:
    versions = [version for segment in segments for _, version in segment.spans]
    first, last = min(versions), max(versions)
    return f"{first}" if first == last else f"{first}–{last}"


def _turns(
    segments: Sequence[Segment], values: Sequence[float | None], decode: Decode
) -> tuple[Turn, ...]:
    """`values` has a number for every token of every segment, one after the other."""
    found, at = list[Turn](), 0
    for segment in segments:
        tokens = segment.tokens.tolist()
        mine = values[at : at + len(tokens)]
        at += len(tokens)
        rows = zip(pieces(decode, tokens), mine, segment.logps.tolist(), strict=True)
        texts = tuple(
            Token(text, value, f"-log p {-logp:.3f}" if segment.role == "policy" else segment.role)
            for text, value, logp in rows
        )
        found.append(Turn(segment.role, texts))
    return tuple(found)


def _surprisals(said: Said) -> list[float | None]:
    """-log p of every token when it was sampled (nats); None where it was not."""
    return [
        -float(logp) if segment.role == "policy" else None
        for segment in said.rollout.segments
        for logp in segment.logps
    ]


def _entropies(folder: Path, found: Sequence[Said]) -> tuple[list[list[float | None]], str]:
    """Entropy at every sampled token under the exported weights, each at the temperature that it
    was sampled with (nats). Raises DataError when the run has exported none.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    place = folder / "model"
    if not (place / "config.json").is_file():
        raise DataError(
            f"{folder} has no model yet: a run writes it when it ends; take --colour surprisal"
        )
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, local_files_only=True)
    values = list[list[float | None]]()
    for said in found:
        segments = said.rollout.segments
        ids = np.concatenate([said.ticket.prompt, *(segment.tokens for segment in segments)])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()[None]).logits[0]
        before = logits[said.ticket.prompt.size - 1 : -1].float()
        heat = np.concatenate([np.full(s.tokens.size, s.temperature) for s in segments])
        logps = (before / torch.from_numpy(heat).float()[:, None]).log_softmax(-1)
        entropy = (-(logps.exp() * logps).sum(-1)).tolist()
        sampled = [segment.role == "policy" for segment in segments for _ in segment.tokens]
        values.append([h if own else None for h, own in zip(entropy, sampled, strict=True)])
    return values, "entropy under the weights that the run exported at its end"
