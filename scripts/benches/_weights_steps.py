"""Versions as real steps make them: SmolLM2 answers sums, and train_step learns from the groups."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoTokenizer

from actor.engine.base import Sample
from actor.engine.torch_engine import TorchEngine
from common import models, wire
from common.config import RunConfig
from common.versions import Tensor
from learner import model
from learner.config import LearnerConfig
from learner.item import Item
from learner.step import TrainState, make_state, train_step

LR = 1e-6
GROUPS, GROUP_SIZE, TOKENS = 2, 8, 8  # of a step
RUN = RunConfig(model="smollm2", weights_dtype="bf16")
LEARNER = LearnerConfig(lr=LR, warmup_steps=0, threads=0, realised_every=0, head_chunk=256)


def versions(items: list[Item], settled: bool) -> Iterator[tuple[Tensor, ...]]:
    """As published: the first one, and one a step of `GROUPS` items.

    The checkpoint holds bfloat16, so at first every master weight lies in the middle of its cell
    and a small step crosses no border. `settled`: they lie anywhere in their cells, as after many
    steps.
    """
    state = make_state(RUN, LEARNER)
    if settled:
        settle(state)
    yield model.snapshot(state.model, RUN.weights_dtype)
    for first in range(0, len(items), GROUPS):
        train_step(state, items[first : first + GROUPS], LEARNER)
        yield model.snapshot(state.model, RUN.weights_dtype)


@torch.no_grad()
def settle(state: TrainState) -> None:
    generator = torch.Generator().manual_seed(0)
    for master in state.masters.values():
        _, exponent = torch.frexp(master)
        cell = torch.ldexp(torch.ones_like(master), exponent - 8)  # 8 bits of bfloat16's mantissa
        master += cell * (torch.rand(master.shape, generator=generator) - 0.5)
    state.publish_masters()


def batches(steps: int) -> list[Item]:
    """Enough items for so many steps."""
    return asyncio.run(answered(steps * GROUPS))


async def answered(count: int) -> list[Item]:
    """Groups in which some answers are right and some wrong, sampled by the torch engine."""
    folder = models.find(RUN.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = TorchEngine(folder, slots=64, max_length=64)
    rng = np.random.default_rng(0)
    items: list[Item] = []
    while len(items) < count:
        sums = [tuple(int(n) for n in rng.integers(1, 50, 2)) for _ in range(8)]
        prompts = [np.int32(tokenizer.encode(f"{a} + {b} =")) for a, b in sums]
        sampling = [wire.Sampling(max_tokens=TOKENS, seed=int(rng.integers(1 << 30))) for _ in sums]
        asked = zip(prompts, sampling, strict=True)
        groups = await asyncio.gather(*(engine.generate(p, GROUP_SIZE, s) for p, s in asked))
        for prompt, how, samples, (a, b) in zip(prompts, sampling, groups, sums, strict=True):
            right = [says(tokenizer.decode(sample.tokens), a + b) for sample in samples]
            if len(set(right)) == 2:
                items.append(item(len(items), prompt, how, list(samples), right))
    await engine.close()
    return items[:count]


def says(text: str, number: int) -> bool:
    found = re.search(r"\d+", text)
    return found is not None and int(found[0]) == number


def item(
    number: int, prompt: np.ndarray, how: wire.Sampling, samples: list[Sample], right: list[bool]
) -> Item:
    ticket = wire.Ticket(
        id=number,
        kind="main",
        problem=str(number),
        prompt=prompt,
        n=GROUP_SIZE,
        sampling=how,
        grading=wire.Grading(),
    )
    segments = [
        wire.Segment(role="policy", tokens=s.tokens, logps=s.logps, spans=((0, 0),))
        for s in samples
    ]
    rollouts = tuple(
        wire.Rollout(segments=(segment,), finish=sample.finish, correct=float(ok))
        for segment, sample, ok in zip(segments, samples, right, strict=True)
    )
    named = str(number)
    group = wire.Group(ticket=number, attempt=0, kind="main", problem=named, rollouts=rollouts)
    return Item(ticket, group)
