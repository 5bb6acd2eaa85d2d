"""Small, explicit makers of the things tests talk about.

A test names what matters to it; the rest has a default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common import wire

if TYPE_CHECKING:
    from torch import nn

VOCAB = 32


def make_segment(
    tokens: Sequence[int] = (5, 6, 7),
    logps: Sequence[float] | None = None,
    version: int = 0,
    role: wire.Role = "policy",
    **fields: Any,
) -> wire.Segment:
    """All tokens from `version` unless `spans` says otherwise; log-probs default to -1 each."""
    fields.setdefault("spans", ((0, version),))
    if "mask" in fields:
        fields["mask"] = np.asarray(fields["mask"], np.uint8)
    chosen = [-1.0] * len(tokens) if logps is None else logps
    return wire.Segment(
        role=role,
        tokens=np.asarray(tokens, np.int32),
        logps=np.asarray(chosen, np.float32),
        **fields,
    )


def make_rollout(
    reward: float = 1.0,
    tokens: Sequence[int] = (5, 6, 7),
    logps: Sequence[float] | None = None,
    version: int = 0,
    finish: wire.Finish = "stop",
    segments: tuple[wire.Segment, ...] | None = None,
    temperature: float = 1.0,
    **fields: Any,
) -> wire.Rollout:
    """One policy segment, graded `reward` by one part; `segments` replaces the segment."""
    own = (make_segment(tokens, logps, version, temperature=temperature),)
    fields.setdefault("parts", ({"correct": reward},))
    return wire.Rollout(segments=segments or own, finish=finish, correct=reward, **fields)


def make_group(
    rewards: Sequence[float] = (1, 0),
    ticket: int = 1,
    tokens: Sequence[Sequence[int]] | None = None,
    version: int = 0,
    rollouts: tuple[wire.Rollout, ...] | None = None,
    kind: wire.Kind = "main",
    problem: str = "p",
    attempt: int = 0,
    **fields: Any,
) -> wire.Group:
    """One rollout a reward. Without `tokens` rollout i answers with 3 + i % 3 tokens of its own."""
    answers = tokens or [_answer(ticket + i, 3 + i % 3) for i in range(len(rewards))]
    made = tuple(
        make_rollout(float(r), a, version=version) for r, a in zip(rewards, answers, strict=True)
    )
    return wire.Group(
        ticket=ticket,
        attempt=attempt,
        kind=kind,
        problem=problem,
        rollouts=rollouts or made,
        **fields,
    )


def _answer(first: int, length: int) -> list[int]:
    return [4 + (first + j) % (VOCAB - 4) for j in range(length)]


def make_ticket(
    id: int = 1,
    prompt: Sequence[int] = (1, 2, 3),
    n: int = 2,
    kind: wire.Kind = "main",
    problem: str = "p",
    sampling: wire.Sampling | None = None,
    grading: wire.Grading | None = None,
    **fields: Any,
) -> wire.Ticket:
    return wire.Ticket(
        id=id,
        kind=kind,
        problem=problem,
        prompt=np.asarray(prompt, np.int32),
        n=n,
        sampling=sampling or wire.Sampling(),
        grading=grading or wire.Grading(),
        **fields,
    )


def tiny_model(family: str = "qwen2", seed: int = 0, vocab: int = VOCAB, **shape: Any) -> nn.Module:
    """A random causal language model of 2 layers, 32 wide, 4 heads on 2 key-value heads.

    `family` is a transformers model type; `shape` overrides fields of its configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=vocab, **{**defaults, **shape})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
