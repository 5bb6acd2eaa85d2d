"""The torch engine against transformers' `generate`, both on the tiny model, in one process.

512 prompts of 10 tokens, each with its own forced length (4 to 48, no stop token). The engine takes
all of them at once in 64 slots; `generate` takes them in batches of 64, each of which runs to its
longest member, which is all it can do; only tokens that were asked for count. Temperature 1 on both
sides, equally long prompts (so `generate` has no padding), the same number of torch threads: one,
as an actor has, and then two. Rounds are interleaved; a ratio is the median over rounds.

`tokens_per_s_groups` is the demo's kind of work: 32 groups of 8, 128 slots, one thread.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actor.engine.torch_engine import TorchEngine
from common import models
from common.wire import Sampling

LIMITS = {"ratio_generate": (">=", 2.0)}
PROMPTS, BATCH, PREFIX, ROUNDS = 512, 64, 10, 7


def workload(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts int32 [PROMPTS, PREFIX] and forced lengths [PROMPTS]."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocab, (PROMPTS, PREFIX)).astype(np.int32)
    return prompts, rng.integers(4, 49, PROMPTS)


def time_generate(net: Any, prompts: np.ndarray, lengths: np.ndarray) -> float:
    """Seconds for all prompts in batches of BATCH."""
    started = time.perf_counter()
    for at in range(0, PROMPTS, BATCH):
        tokens = torch.from_numpy(prompts[at : at + BATCH].astype(np.int64))
        longest = int(lengths[at : at + BATCH].max())
        with torch.inference_mode():
            out = net.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                max_new_tokens=longest,
                min_new_tokens=longest,
                eos_token_id=None,
            )
        assert out.shape[1] == PREFIX + longest
    return time.perf_counter() - started


async def time_engine(
    engine: TorchEngine, prompts: np.ndarray, lengths: np.ndarray, n: int = 1
) -> float:
    """Seconds for `n` continuations of every prompt, all asked for at once."""
    started = time.perf_counter()
    jobs = [
        engine.generate(prompt, n, Sampling(max_tokens=int(length), seed=seed))
        for seed, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    done = await asyncio.gather(*jobs)
    assert sum(s.tokens.size for samples in done for s in samples) == n * lengths.sum()
    return time.perf_counter() - started


async def against_generate(threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    net = AutoModelForCausalLM.from_pretrained(models.find("tiny"), dtype=torch.float32).eval()
    engine = TorchEngine(models.find("tiny"), slots=BATCH, threads=threads)
    prompts, lengths = workload(engine.vocab_size)
    theirs, ours = [], []
    for _ in range(ROUNDS + 1):  # the first warms both up
        theirs.append(time_generate(net, prompts, lengths))
        ours.append(await time_engine(engine, prompts, lengths))
    await engine.close()
    ratios = [a / b for a, b in zip(theirs[1:], ours[1:], strict=True)]
    tokens = int(lengths.sum())
    return {
        "ratio_generate": statistics.median(ratios),
        "tokens_per_s": tokens / statistics.median(ours[1:]),
        "tokens_per_s_generate": tokens / statistics.median(theirs[1:]),
    }


async def groups() -> float:
    engine = TorchEngine(models.find("tiny"), slots=128, threads=1)
    prompts, lengths = (column[:32] for column in workload(engine.vocab_size))
    seconds = [await time_engine(engine, prompts, lengths, 8) for _ in range(ROUNDS + 1)]
    await engine.close()
    return float(8 * lengths.sum() / statistics.median(seconds[1:]))


def bench() -> dict[str, float]:
    one, two = asyncio.run(against_generate(1)), asyncio.run(against_generate(2))
    return {
        **one,
        **{f"{key}_2_threads": value for key, value in two.items()},
        "tokens_per_s_groups": asyncio.run(groups()),
    }
