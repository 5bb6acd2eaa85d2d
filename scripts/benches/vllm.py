"""The vLLM engine against vLLM itself, on the real model of the recipe `smollm2`.

Both sides run vLLM with the same arguments, threads and model; both use the whole machine, in
turns: while one is timed the other has nothing to do. Rounds are interleaved, every other one the
other way round, and a ratio is the median over rounds.

`ratio_offline`: tokens per second of the actor's engine over those of `LLM.generate`, vLLM's own
loop that is handed everything at once. The requests are the same objects: prompts of the recipe,
groups of 8, one request a rollout, the same seeds, log-probabilities, and a length each that no
stop token cuts short.

`swap_ratio`: seconds for which our `update_weights` holds decoding over those of the barest swap
that vLLM allows (pause, `load_weights` of the same tensors from the worker's own memory, resume),
both under sequences that run on afterwards.

`pause_share`: share of the time in which decoding was held for swaps at the recipe's publish rate:
with its prompts, its group size and real answers, a version is swapped in each time that as many
groups are sampled as a step trains on. A learner that is slower, or groups that are dropped, make
swaps rarer than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actor.config import ActorConfig
from common import models, recipe
from common.config import RunConfig
from common.errors import IsentropeError
from common.versions import Tensor, Weights, digest
from common.wire import Sampling
from learner.config import LearnerConfig

if TYPE_CHECKING:
    from actor.engine.vllm_engine import VllmEngine
    from learner.prompts.stream import Prompts
    from scripts.benches._vllm_bare import Bare, Offline

LIMITS = {
    "ratio_offline": (">=", 0.9),
    "swap_ratio": ("<=", 1.5),
    "pause_share": ("<=", 0.05),
}
TOP = Path(__file__).resolve().parents[2]
RECIPE = "smollm2"
GROUPS, N, LONGEST = 8, 8, 32  # requests of one round: 64 rollouts of 8 to 32 tokens
PAIRS = 3
SWAPS = 3  # of a round, after one that warms up
PUBLISHED = 3  # versions that `pause_share` looks at


class Case(NamedTuple):
    """What the recipe asks for."""

    run: RunConfig
    actor: ActorConfig
    learner: LearnerConfig
    folder: Path
    prompts: Prompts

    @classmethod
    def read(cls) -> Case:
        """Raises ConfigError and DataError: no such recipe, or its model is not there."""
        size = (f"actor.slots={GROUPS * N}", "actor.max_length=256", "actor.threads=2")
        patient = "actor.engine_hang_s=600"  # a busy machine makes void numbers, not failures
        overrides = ("actor.engine=vllm", patient, *size)
        loaded = recipe.load_all(RECIPE, overrides)
        run, actor, learner = (loaded[table] for table in ("run", "actor", "learner"))
        assert isinstance(run, RunConfig)
        assert isinstance(actor, ActorConfig)
        assert isinstance(learner, LearnerConfig)
        return cls(run, actor, learner, models.find(run.model), prompts_of(run, learner))


def prompts_of(run: RunConfig, config: LearnerConfig) -> Prompts:
    """As the learner makes them."""
    from learner import model
    from learner.prompts.source import open_source
    from learner.prompts.stream import Prompts

    network, tokenizer = model.load(run, config)
    stop, room = model.stop_ids(network, tokenizer), model.max_length(network) - config.max_tokens
    source = open_source(config.prompts, run.seed)
    return Prompts(source, config.prompts, tokenizer, stop, run.seed, room)


def bench() -> dict[str, float]:
    install()
    try:
        case = Case.read()
    except IsentropeError as error:
        sys.exit(f"{error}")
    os.environ |= {  # as the engine starts vLLM
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(case.actor.threads),
    }
    with versions(case) as (path, weights):
        return asyncio.run(measure(case, path, weights))


def install() -> None:
    """Returns at once where vLLM is there."""
    done = subprocess.run(
        ["bash", "-c", "source scripts/_env && ensure_env && ensure_vllm"], cwd=TOP, check=False
    )
    if done.returncode:
        sys.exit("there is no vLLM to measure")


async def measure(case: Case, path: Path, weights: Iterator[Weights]) -> dict[str, float]:
    from actor.engine.vllm_engine import VllmEngine
    from scripts.benches._vllm_bare import Bare, Offline

    say("vLLM starts for the actor's engine")
    engine = VllmEngine(case.folder, case.actor)
    try:
        await engine.update_weights(next(weights))
        say("vLLM starts for its offline loop")
        with contextlib.closing(Offline(arguments(case))) as offline:
            numbers = await against_offline(engine, offline, workload(case))
        say("vLLM starts for the bare swap")
        with contextlib.closing(Bare(arguments(case))) as bare:
            await bare.hold(str(path))
            numbers |= await against_bare(engine, bare, case, weights)
        say("swaps at the recipe's publish rate")
        return numbers | await pauses(engine, case, weights)
    finally:
        await engine.close()


def arguments(case: Case) -> dict[str, Any]:
    """What the engine starts vLLM with, but for its own worker."""
    from vllm.platforms import current_platform

    from actor.engine import vllm_args, vllm_model

    actor = case.actor
    cache = vllm_model.kv_bytes(case.folder, actor.slots, actor.max_length, 4)  # fp32
    device = current_platform.device_type
    args = vllm_args.on_device(vllm_args.vet(actor), device, "auto", cache)
    ours = ("worker_extension_cls",)
    return {"model": str(case.folder)} | {k: v for k, v in args.items() if k not in ours}


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# -- tokens per second -----------------------------------------------------------------------------

Work = Sequence[tuple[np.ndarray, Sampling]]  # groups of N: prompt int32 [P], how to sample


def workload(case: Case) -> Work:
    lengths = np.linspace(8, LONGEST, GROUPS).astype(int)
    drafts = [case.prompts.draw(at) for at in range(GROUPS)]
    return [
        (draft.prompt, Sampling(max_tokens=int(length), seed=seed))
        for seed, (draft, length) in enumerate(zip(drafts, lengths, strict=True))
    ]


async def against_offline(engine: VllmEngine, offline: Offline, work: Work) -> dict[str, float]:
    requests = [request for prompt, sampling in work for request in as_requests(prompt, sampling)]
    tokens = N * sum(sampling.max_tokens for _, sampling in work)
    ours, theirs = [], []
    for turn in range(PAIRS + 1):  # the first warms both up
        if turn % 2:
            ours.append(await time_engine(engine, work))
        theirs.append(offline.time(requests))
        if not turn % 2:
            ours.append(await time_engine(engine, work))
        say(f"{tokens} tokens: engine {ours[-1]:.2f} s, offline loop {theirs[-1]:.2f} s")
    ratios = [b / a for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "ratio_offline": statistics.median(ratios),
        "tokens_per_s": tokens / statistics.median(ours[1:]),
        "tokens_per_s_offline": tokens / statistics.median(theirs[1:]),
    }


def as_requests(prompt: np.ndarray, sampling: Sampling) -> list[tuple[list[int], Any]]:
    """(prompt, vLLM's sampling parameters) of each rollout, as the engine asks for them."""
    from actor.engine import noise
    from actor.engine.vllm_request import Rollout

    seeds = noise.keys(sampling.seed, np.arange(N))
    rollouts = [Rollout(prompt, sampling, sampling.max_tokens, int(seed)) for seed in seeds]
    return [(rollout.prefix, rollout.ask("offline")[1]) for rollout in rollouts]


async def time_engine(engine: VllmEngine, work: Work) -> float:
    """Seconds for all of it, asked for at once."""
    started = time.perf_counter()
    done = await asyncio.gather(*(engine.generate(prompt, N, how) for prompt, how in work))
    took = time.perf_counter() - started
    for samples, (_, how) in zip(done, work, strict=True):
        assert [sample.tokens.size for sample in samples] == [how.max_tokens] * N
    return took


# -- swaps -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def versions(case: Case) -> Iterator[tuple[Path, Iterator[Weights]]]:
    """The model's own tensors in the dtype that the run publishes: a safetensors file of them, and
    endless versions 1, 2, …"""
    import torch
    from safetensors.torch import load_file, save_file

    dtype, code = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16")}[
        case.run.weights_dtype
    ]
    found: dict[str, torch.Tensor] = {}
    for path in sorted(case.folder.glob("*.safetensors")):
        found |= {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    tensors = tuple(
        Tensor(name, code, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().data)
        for name, t in sorted(found.items())
    )
    stamp = digest(tensors)
    with tempfile.TemporaryDirectory(dir=os.environ.get("ISENTROPE_BENCH_DIR")) as folder:
        save_file(found, path := Path(folder, "held.safetensors"))
        yield path, (Weights(number, stamp, tensors) for number in itertools.count(1))


async def against_bare(
    engine: VllmEngine, bare: Bare, case: Case, weights: Iterator[Weights]
) -> dict[str, float]:
    prompt = case.prompts.draw(0).prompt
    long = Sampling(max_tokens=engine.max_length - prompt.size)
    requests = as_requests(prompt, long)

    async def ours() -> float:
        before = engine.stats().pause_s
        await engine.update_weights(next(weights))
        return engine.stats().pause_s - before

    async def round_of_ours() -> float:
        before = engine.stats().tokens
        with running(engine.generate(prompt, N, long)):
            while engine.stats().tokens < before + N:  # all of them are being decoded
                await asyncio.sleep(0.01)
            return await swaps(ours)

    async def round_of_bare() -> float:
        async with bare.decoding(requests):
            return await swaps(bare.swap)

    mine, theirs = [], []
    for turn in range(PAIRS):
        if turn % 2:
            mine.append(await round_of_ours())
        theirs.append(await round_of_bare())
        if not turn % 2:
            mine.append(await round_of_ours())
        say(f"swap: engine {mine[-1]:.3f} s, bare {theirs[-1]:.3f} s")
    return {
        "swap_ratio": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
        "swap_ms": 1000 * statistics.median(mine),
        "swap_ms_bare": 1000 * statistics.median(theirs),
    }


async def swaps(swap: Any) -> float:
    """Median seconds of a swap."""
    return statistics.median([await swap() for _ in range(SWAPS + 1)][1:])


@contextlib.contextmanager
def running(work: Any) -> Iterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
        assert not task.done(), "it was to run on after the swaps"
    finally:
        task.cancel()


async def pauses(engine: VllmEngine, case: Case, weights: Iterator[Weights]) -> dict[str, float]:
    config = case.learner
    cursor, done = itertools.count(), asyncio.Semaphore(0)

    async def ask() -> None:
        while True:
            draft = case.prompts.draw(at := next(cursor))
            how = case.prompts.sampling(at, config.temperature, config.max_tokens)
            await engine.generate(draft.prompt, config.group_size, how)
            done.release()

    asking = [asyncio.create_task(ask()) for _ in range(max(1, engine.slots // config.group_size))]
    for _ in asking:
        await done.acquire()  # the batch is full, and its answers are of all ages
    before, started = engine.stats(), time.monotonic()
    for _ in range(PUBLISHED):
        for _ in range(config.groups_per_step):
            await done.acquire()
        await engine.update_weights(next(weights))
    after, took = engine.stats(), time.monotonic() - started
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return {
        "pause_share": (after.pause_s - before.pause_s) / took,
        "publish_every_s": took / PUBLISHED,
        "tokens_per_s_publishing": (after.tokens - before.tokens) / took,
    }
