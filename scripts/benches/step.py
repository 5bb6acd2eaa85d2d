"""The RL step against bare passes, and the chunked head against the whole block of logits.

    ratio_bare            bare forward + backward  /  train_step (no extra pass)
    ratio_bare_proximal   two bare forwards + backward  /  train_step with the token table
    head_memory_ratio     peak memory of the head  /  of the naive way
    head_time_ratio       time of the head         /  of the naive way

Bare: the same model, the same packed attention, logits and cross-entropy at the same positions;
everything that makes it reinforcement learning is extra (packing, table, entropy, loss, clipping,
AdamW, metrics). SmolLM2's shape with random weights, 4,096 tokens. The head: log-prob, H and N with
gradients of the log-prob, 4,096 tokens × 151,936 words, width 896, float32; memory above inputs,
weights and their gradients, each in a process of its own. Medians of interleaved rounds.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

LIMITS = {
    "ratio_bare": (">=", 0.85),
    "ratio_bare_proximal": (">=", 0.85),
    "head_memory_ratio": ("<=", 0.1),
    "head_time_ratio": ("<=", 1.1),
}
ROUNDS = 3
SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
GROUPS, GROUP_SIZE, PROMPT, ANSWER = 2, 4, 64, 448  # 4,096 tokens
HEAD = (4096, 151_936, 896)


def bench() -> dict[str, object]:
    return {**head_ratios(), **step_ratios()}


# ---- the step ----------------------------------------------------------------------------------


def step_ratios(
    layers: int = SMOLLM2["num_hidden_layers"], rounds: int = ROUNDS
) -> dict[str, float]:
    ways = _ways(layers)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in ("bare", "step"):
        ways[name]()  # warm
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(_timed(way))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "ratio_bare": median["bare"] / median["step"],
        "ratio_bare_proximal": median["bare_twice"] / median["step_table"],
        **{f"{name}_s": value for name, value in median.items()},
    }


def _ways(layers: int) -> dict[str, Callable[[], object]]:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from common.config import RunConfig
    from learner.batch import flatten, pack
    from learner.config import LearnerConfig
    from learner.methods.base import Method
    from learner.model import Policy
    from learner.state import state_of
    from learner.step import train_step

    class Looks(Method, frozen=True, kw_only=True, tag="looks"):
        """Wants the table and does nothing with it."""

        needs_table: ClassVar[bool] = True

    torch.manual_seed(0)
    shape = LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers})
    net = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    base: dict[str, Any] = {"threads": 0, "realised_every": 0, "tokens_per_micro": 8192, "lr": 1e-6}
    plain = LearnerConfig(**base)
    table = LearnerConfig(**base, methods=(Looks(),))
    state = state_of(Policy(net, plain), RunConfig(), plain)
    items = _items()
    batch = flatten(items, 0)

    def forward() -> torch.Tensor:
        micro = pack(batch, np.arange(batch.rows))
        states = net.model(
            input_ids=micro.ids,
            position_ids=micro.positions,
            use_cache=False,
            packing=micro.packing,
        ).last_hidden_state
        logits = net.lm_head(states[0].index_select(0, micro.at))
        return torch.nn.functional.cross_entropy(logits, micro.target)

    def bare() -> None:
        forward().backward()
        net.zero_grad(set_to_none=True)

    def bare_twice() -> None:
        with torch.no_grad():
            forward()
        bare()

    return {
        "bare": bare,
        "step": lambda: train_step(state, items, plain),
        "bare_twice": bare_twice,
        "step_table": lambda: train_step(state, items, table),
    }


def _items() -> list[Any]:
    import numpy as np

    from common import wire
    from learner.item import Item

    rng = np.random.default_rng(0)

    def tokens(n: int) -> np.ndarray:
        return rng.integers(0, SMOLLM2["vocab_size"], n, np.int32)

    def rollout(reward: float) -> wire.Rollout:
        logps = -rng.random(ANSWER, np.float32)
        segment = wire.Segment(role="policy", tokens=tokens(ANSWER), logps=logps, spans=((0, 0),))
        return wire.Rollout(segments=(segment,), finish="stop", correct=reward)

    items = []
    for i in range(GROUPS):
        ticket = wire.Ticket(
            id=i,
            kind="main",
            problem=str(i),
            prompt=tokens(PROMPT),
            n=GROUP_SIZE,
            sampling=wire.Sampling(max_tokens=ANSWER),
            grading=wire.Grading(),
        )
        rollouts = tuple(rollout(float(k % 2)) for k in range(GROUP_SIZE))
        group = wire.Group(ticket=i, attempt=0, kind="main", problem=str(i), rollouts=rollouts)
        items.append(Item(ticket, group))
    return items


# ---- the head ----------------------------------------------------------------------------------


def head_ratios(tokens: int = HEAD[0], rounds: int = ROUNDS) -> dict[str, float]:
    found: dict[str, list[dict[str, float]]] = {"naive": [], "fused": []}
    for _ in range(rounds):
        for way, runs in found.items():
            command = [sys.executable, __file__, way, str(tokens)]
            made = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(made.stdout.splitlines()[-1]))
    median = {
        (way, key): statistics.median(run[key] for run in runs)
        for way, runs in found.items()
        for key in ("seconds", "peak_bytes", "checksum")
    }
    drift = abs(median["naive", "checksum"] - median["fused", "checksum"])
    assert drift < 1e-3 * abs(median["naive", "checksum"]), "the two ways disagree"
    return {
        "head_memory_ratio": median["fused", "peak_bytes"] / median["naive", "peak_bytes"],
        "head_time_ratio": median["fused", "seconds"] / median["naive", "seconds"],
        "head_peak_mb": median["fused", "peak_bytes"] / 2**20,
        "head_naive_peak_mb": median["naive", "peak_bytes"] / 2**20,
        "head_s": median["fused", "seconds"],
        "head_naive_s": median["naive", "seconds"],
    }


def _measure_head(way: str, tokens: int) -> dict[str, float]:
    """In a process of its own: seconds, and peak memory above inputs, weights and gradients."""
    import torch

    from learner import head

    _, words, width = HEAD
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).requires_grad_()
    weight = torch.randn(words, width).mul_(0.02).requires_grad_()
    target, temperature = torch.randint(words, (tokens,)), torch.ones(tokens)
    upstream = torch.randn(tokens)
    p = head.Projection(weight, None, target, temperature, torch.float32)

    def naive() -> tuple[torch.Tensor, ...]:
        log_p = torch.log_softmax(hidden @ weight.t() / temperature[:, None], 1)
        logp = log_p.gather(1, target[:, None]).squeeze(1)
        with torch.no_grad():
            prob = log_p.exp()
            H = -(prob * log_p).sum(1)
            N = (prob.square() * (H[:, None] + log_p)).sum(1)
        (upstream * logp).sum().backward()
        return logp, H, N

    def fused() -> tuple[torch.Tensor, ...]:
        scalar, columns = head.fused(
            hidden, p, 256, lambda logp, H, N, lo, hi: (upstream[lo:hi], None)
        )
        scalar.backward()
        return tuple(columns)

    before = _peak_bytes()
    began = time.perf_counter()
    columns = {"naive": naive, "fused": fused}[way]()
    seconds = time.perf_counter() - began
    peak = _peak_bytes()
    assert hidden.grad is not None
    assert weight.grad is not None
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    checksum = sum(float(c.double().sum()) for c in columns) + float(weight.grad.double().norm())
    return {
        "seconds": seconds,
        "peak_bytes": peak - before - gradients,
        "checksum": checksum,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _timed(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    print(json.dumps(_measure_head(sys.argv[1], int(sys.argv[2]))))
