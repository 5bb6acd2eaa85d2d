"""From rollouts in the journal to what is shown of them: text by tokens, a number for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import models, recipe
from common.errors import DataError
from common.rollouts import Said, pieces
from common.rollouts_show import Shown, Token, Turn
from common.runfolder import RunFolder
from common.wire import Rollout, Segment

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
        from learner.rollouts_entropy import entropies

        values, note = entropies(folder, model_folder(folder), [said for said, _ in found])
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
    told = {
        "reward": f"{reward:.4g}",
        **_parts(rollout),
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
        right=None if rollout.error else rollout.correct >= 1.0,
    )


def _parts(rollout: Rollout) -> dict[str, str]:
    """Parts of the reward by name, turn after turn; none where one is all there is."""
    told: dict[str, list[str]] = {}
    for part in rollout.parts:
        for name, score in part.items():
            told.setdefault(name, []).append(f"{score:.4g}")
    alone = len(told) == 1 and len(rollout.parts) == 1
    return {} if alone else {name: ", ".join(scores) for name, scores in told.items()}


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
