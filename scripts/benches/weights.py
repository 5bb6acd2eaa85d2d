"""A weight version on its way: published, pulled, verified, against writing and reading the same
bytes.

The tensors are those of SmolLM2-135M in bfloat16 (272 tensors, 269 MB). In interleaved rounds,

    plain          write the bytes to a file, read them into fresh memory, view them as torch
    tensors
    file, redis    digest, blobs into the store, manifest, retire the oldest; then what an actor
    does: ask for the
                   newest, pull its blobs, verify the digest, view them as torch tensors

and `ratio_<store>` is the median over rounds of ours / plain. Redis is a real server on loopback.
`safetensors_s` is save_file + load_file + one reading of every byte, for comparison.

`patch_*`: SmolLM2 learns from its own answers to sums, lr 1e-6, bf16, master weights anywhere in
their cells as after many steps; a version is published as a patch and made by an actor that has the
one before.

    patch_bytes_ratio              bytes of a patch / of the version, the mean over the steps
    patch_bytes_ratio_max          the largest
    patch_bytes_ratio_first_steps  the mean when a run begins: master weights as the model has them
    patch_seconds                  to find the changes and pack them (the learner)
    apply_seconds                  from asking for the version to its verified bytes (the actor)

`pull_mb_per_s_<store>_<n>`: n actors, processes of their own, pull and verify a whole version at
once; the bytes of all of them by the time of the last. `learner_curve` is with keys.
`pull_mb_per_s_1` and `_8` are those of the learner's store.

`pause_share`: share of the time in which the torch engine held decoding for a swap, while 128
sequences of the tiny model are decoded and a version is published, pulled and swapped in every
second (the demo's rate, or a little more).
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from actor.engine.torch_engine import TorchEngine
from common import keys, models, patch
from common.config import RunConfig
from common.failpoints import Failpoint
from common.pull import fetch, lay_out
from common.redis_server import RedisServer
from common.stores import Store, open_store
from common.versions import Registry, Tensor, Weights, digest
from common.wire import Sampling
from learner.blobs import open_blobs
from learner.item import Item
from learner.publish import Publisher
from scripts.benches import _weights_steps
from scripts.benches._weights_pull import RUN, Pullers

LIMITS = {
    "ratio_file": ("<=", 2.0),
    "ratio_redis": ("<=", 5.0),
    "pause_share": ("<=", 0.05),
    "patch_bytes_ratio": ("<=", 0.05),
}
WARM_UP, ROUNDS = 2, 8
STEPS, FIRST_STEPS = 8, 3
ACTORS = (1, 8)
SLOTS, SWAP_EVERY_S, SWAPS = 128, 1.0, 12


def smollm_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama of SmolLM2-135M's size."""
    wide, inner, narrow = 576, 1536, 192
    layer = {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (narrow, wide),
        "self_attn.v_proj": (narrow, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
    }
    shapes = {f"layers.{i}.{name}": shape for i in range(30) for name, shape in layer.items()}
    return {"embed_tokens": (49152, wide), "norm": (wide,), **shapes}


def as_bytes(tensors: dict[str, torch.Tensor]) -> tuple[Tensor, ...]:
    codes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    return tuple(
        Tensor(
            name,
            codes[tensor.dtype],
            tuple(tensor.shape),
            tensor.reshape(-1).view(torch.uint8).numpy().data,
        )
        for name, tensor in sorted(tensors.items())
    )


def as_tensors(weights: Weights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {t.name: torch.frombuffer(t.data, dtype=dtype).view(t.shape) for t in weights.tensors}


def time_plain(folder: Path, tensors: tuple[Tensor, ...]) -> float:
    path = folder / "plain"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            file.write(tensor.data)
    sizes = [tensor.data.nbytes for tensor in tensors]
    memory = np.empty(sum(sizes), np.uint8)
    with path.open("rb", buffering=0) as file:
        got = file.readinto(memory)
    assert got == sum(sizes)
    offsets = np.cumsum([0, *sizes])
    views = [
        torch.frombuffer(memory[at:end].data, dtype=torch.bfloat16).view(tensor.shape)
        for tensor, at, end in zip(tensors, offsets, offsets[1:], strict=False)
    ]
    took = time.perf_counter() - started
    assert len(views) == len(tensors)
    path.unlink()
    return took


def time_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> float:
    path = folder / "plain.safetensors"
    started = time.perf_counter()
    save_file(tensors, path)
    read = {name: tensor.clone() for name, tensor in load_file(path).items()}
    took = time.perf_counter() - started
    assert len(read) == len(tensors)
    path.unlink()
    return took


class Way:
    """One store, its learner's side and its actor's side."""

    def __init__(self, registry: Registry, store: Store) -> None:
        self.registry, self.store = registry, store
        self.publisher = Publisher(registry, store, 1, 2, Failpoint())
        self.version = 0

    def publish(self, tensors: tuple[Tensor, ...]) -> None:
        self.publisher.publish(self.version, self.version, tensors, digest(tensors))
        self.version += 1

    def time(self, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
        """Seconds (until published, until verified)."""
        started = time.perf_counter()
        self.publish(tensors)
        published = time.perf_counter()
        weights = fetch(self.registry, self.store)
        views = as_tensors(weights, torch.bfloat16)
        took = time.perf_counter() - started
        assert (weights.version, len(views)) == (self.version - 1, len(tensors))
        return published - started, took


def compare(url: str, folder: Path) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    net = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in smollm_shapes().items()
    }
    tensors = as_bytes(net)
    ways = {
        "file": Way(registry := Registry(url, "file"), open_store(f"file:{folder}", registry)),
        "redis": Way(registry := Registry(url, "redis"), open_store("redis", registry)),
    }
    seconds: dict[str, list[float]] = {}

    def note(name: str, took: float) -> None:
        seconds.setdefault(name, []).append(took)

    def ours(name: str) -> None:
        published, took = ways[name].time(tensors)
        note(f"{name}_publish", published)
        note(name, took)

    contestants: list[Callable[[], None]] = [
        lambda: note("plain", time_plain(folder, tensors)),
        lambda: ours("file"),
        lambda: ours("redis"),
        lambda: note("safetensors", time_safetensors(folder, net)),
    ]
    for number in range(WARM_UP + ROUNDS):  # everyone has every turn: the first pays for the memory
        for turn in range(len(contestants)):
            contestants[(number + turn) % len(contestants)]()
    settled = {name: times[WARM_UP:] for name, times in seconds.items()}
    result = {
        f"ratio_{name}": statistics.median(
            mine / plain for mine, plain in zip(settled[name], settled["plain"], strict=True)
        )
        for name in ways
    }
    result |= {f"{name}_s": statistics.median(times) for name, times in settled.items()}
    return result | {"megabytes": sum(tensor.data.nbytes for tensor in tensors) / 1e6}


def patches(url: str) -> dict[str, float]:
    items = _weights_steps.batches(STEPS)
    settled = patched(url, "settled", items)
    first = patched(url, "first", items[: FIRST_STEPS * _weights_steps.GROUPS])
    ratios, seconds, applied = (list(column) for column in zip(*settled, strict=True))
    return {
        "patch_bytes_ratio": statistics.mean(ratios),
        "patch_bytes_ratio_max": max(ratios),
        "patch_bytes_ratio_first_steps": statistics.mean(ratio for ratio, _, _ in first),
        "patch_seconds": statistics.median(seconds),
        "apply_seconds": statistics.median(applied),
    }


def patched(url: str, name: str, items: list[Item]) -> list[tuple[float, float, float]]:
    """Of every step: bytes of the patch / bytes of the version, seconds to make it, seconds to
    apply it."""
    registry = Registry(url, f"patches-{name}")
    store = open_store("redis", registry)
    publisher = Publisher(registry, store, 1, 2, Failpoint(), snapshot_every=len(items) + 1)
    own, before, found = None, None, []
    for version, tensors in enumerate(_weights_steps.versions(items, name == "settled")):
        publisher.publish(version, version, tensors, digest(tensors))
        asked = time.perf_counter()
        own = fetch(registry, store, own=own)
        applied = time.perf_counter() - asked
        manifest = registry.manifest(version)
        if before is not None:
            assert manifest.kind == "patch"
            size = sum(blob.nbytes for blob in manifest.blobs)
            found.append((size / manifest.nbytes, time_patch(before, tensors), applied))
        before = tensors
    registry.close()
    return found


def time_patch(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> float:
    firsts = [entry.offset // patch.ITEM_BYTES for entry in lay_out(new)[0]]
    began = time.perf_counter()
    assert patch.make(old, new, firsts, 1 << 30)
    return time.perf_counter() - began


def pulls(url: str, folder: Path) -> dict[str, float]:
    """A whole version of SmolLM2's size, out of every store, by one actor and by several."""
    theirs, mine = keys.make(folder / "keys")
    at = "tcp://127.0.0.1:0"
    ways = {
        "redis": (RunConfig(store="redis"), ""),
        "file": (RunConfig(store=f"file:{folder}"), ""),
        "learner": (RunConfig(store="learner", learner=at), ""),
        "learner_curve": (RunConfig(store="learner", learner=at, keys=str(theirs)), str(mine)),
    }
    net = {name: torch.randn(shape).bfloat16() for name, shape in smollm_shapes().items()}
    tensors = as_bytes(net)
    numbers: dict[str, float] = {}
    for incarnation, (name, (run, key)) in enumerate(ways.items(), 1):
        registry = Registry(url, RUN)
        store = open_blobs(run, registry, incarnation)
        Publisher(registry, store, incarnation, 1, Failpoint()).publish(
            0, 0, tensors, digest(tensors)
        )
        speeds = pull_speeds(url, run, key, sum(tensor.data.nbytes for tensor in tensors))
        numbers |= {f"pull_mb_per_s_{name}_{count}": speed for count, speed in speeds.items()}
        store.close()
        registry.client.flushall()
        registry.close()
    return numbers | {f"pull_mb_per_s_{n}": numbers[f"pull_mb_per_s_learner_{n}"] for n in ACTORS}


def pull_speeds(url: str, run: RunConfig, key: str, size: int) -> dict[int, float]:
    """MB/s of all actors together, by their number."""
    with Pullers(max(ACTORS), url, run.store, run.learner, key) as pullers:
        pullers.pull(max(ACTORS))  # the first pays for the memory
        return {
            count: count * size / 1e6 / statistics.median(pullers.pull(count) for _ in range(3))
            for count in ACTORS
        }


async def pauses(url: str) -> dict[str, float]:
    folder = models.find("tiny")
    engine = TorchEngine(folder, slots=SLOTS)
    weights = load_file(folder / "model.safetensors")
    way = Way(registry := Registry(url, "pause"), open_store("redis", registry))
    prompts = np.random.default_rng(0).integers(3, engine.vocab_size, (SLOTS, 10), np.int32)

    async def decode(number: int) -> None:
        for seed in range(number, 1_000_000, SLOTS):
            length = 4 + seed * 11 % 45
            await engine.generate(prompts[number], 1, Sampling(max_tokens=length, seed=seed))

    decoding = [asyncio.create_task(decode(number)) for number in range(SLOTS)]
    await asyncio.sleep(SWAP_EVERY_S)  # the batch is full and warm
    before, started = engine.stats(), time.monotonic()
    for swap in range(1, SWAPS + 1):
        await asyncio.to_thread(way.publish, as_bytes(weights))
        await engine.update_weights(await asyncio.to_thread(fetch, registry, way.store))
        await asyncio.sleep(max(0.0, started + swap * SWAP_EVERY_S - time.monotonic()))
    after, took = engine.stats(), time.monotonic() - started
    for task in decoding:
        task.cancel()
    await asyncio.gather(*decoding, return_exceptions=True)
    await engine.close()
    assert after.version == SWAPS - 1
    return {
        "pause_share": (after.pause_s - before.pause_s) / took,
        "pause_ms": 1000 * (after.pause_s - before.pause_s) / SWAPS,
        "tokens_per_s_swapping": (after.tokens - before.tokens) / took,
    }


def bench() -> dict[str, float]:
    parts: tuple[Callable[[str, Path], dict[str, float]], ...] = (
        compare,
        lambda url, _: asyncio.run(pauses(url)),
        lambda url, _: patches(url),
        pulls,
    )
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("ISENTROPE_BENCH_DIR", ".")) as name:
        folder = Path(name)
        server = RedisServer(folder)
        server.start()
        try:
            for part in parts:
                numbers |= part(server.url, folder)
        finally:
            server.stop()
    return numbers
