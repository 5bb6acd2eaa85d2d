"""The vLLM engine samples what the model says, at the version it says, and ends as it should.

One engine serves most of these tests, in one event loop: it takes half a minute to start.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from actor.config import ActorConfig
from actor.engine.base import Sample
from actor.engine.make import make
from actor.engine.vllm_engine import VllmEngine
from common import models
from common.config import RunConfig
from common.errors import ConfigError, DataError, EngineError, WeightsError
from common.versions import Tensor, Weights, digest
from common.wire import Sampling
from tests.conftest import Start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),  # every start of vLLM takes half a minute on two free cores
    pytest.mark.filterwarnings("ignore"),  # of vLLM's imports
]
SLOTS = 32
PROMPT = np.array([5, 6, 7, 14, 8], np.int32)
LAYER = "model.layers.1."


def opened(slots: int = SLOTS, **fields: Any) -> VllmEngine:
    fields = {"engine_start_s": 600.0, "vllm": {"kv_cache_memory_bytes": 128 << 20}, **fields}
    engine = make(RunConfig(), ActorConfig(engine="vllm", slots=slots, **fields))
    assert isinstance(engine, VllmEngine)
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    engine = opened()
    yield engine
    pids = engine.pids
    assert len(pids) >= 2
    await engine.close()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.fixture(autouse=True, scope="module")
def released() -> Iterator[None]:
    """What vLLM leaves open goes while its complaints are still ignored; ends after `engine`."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def tidied(released: None) -> Iterator[None]:
    yield
    gc.collect()


def net(version: int, *only: str) -> Any:
    """The tiny model, moved a little: another one for each version; `only` names what moves."""
    model = AutoModelForCausalLM.from_pretrained(models.find("tiny"), dtype=torch.float32)
    noise = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            move = torch.randn(parameter.shape, generator=noise) * 0.05
            if version and (not only or name.startswith(only)):
                parameter += move
    return model.eval().requires_grad_(False)


def weights(model: Any, version: int, *only: str) -> Weights:
    tensors = [
        Tensor(name, "F32", tuple(value.shape), memoryview(value.numpy()).cast("B"))
        for name, value in sorted(model.named_parameters())
        if not only or name.startswith(only)
    ]
    return Weights(version, digest(tensors), tuple(tensors), 1)


def reference(model: Any, sample: Sample, prefix: np.ndarray = PROMPT) -> np.ndarray:
    """Log-probs of the sampled tokens by one full transformers forward."""
    tokens = torch.from_numpy(np.r_[prefix, sample.tokens].astype(np.int64))
    logits = model(tokens[None], use_cache=False).logits[0, len(prefix) - 1 : -1]
    chosen = torch.log_softmax(logits, -1).gather(1, tokens[len(prefix) :, None])
    return chosen[:, 0].numpy()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def one(engine: VllmEngine, seed: int = 0, **fields: Any) -> Sample:
    fields = {"max_tokens": 30, **fields}
    (sample,) = await engine.generate(PROMPT, 1, Sampling(seed=seed, **fields))
    return sample


async def serves(engine: VllmEngine, model: Any, version: int) -> None:
    """What is asked now comes from `model`, every token of it."""
    sample = await one(engine, seed=77)
    assert sample.spans == ((0, version),)
    np.testing.assert_allclose(sample.logps, reference(model, sample), atol=1e-3)


async def test_log_probs_are_those_of_a_full_forward_of_transformers(engine: VllmEngine) -> None:
    model = net(0)
    await engine.update_weights(weights(model, 10))
    for temperature in (1.0, 0.7):
        samples = await engine.generate(
            PROMPT, 4, Sampling(max_tokens=20, temperature=temperature, seed=3)
        )
        for sample in samples:
            tokens = torch.from_numpy(np.r_[PROMPT, sample.tokens].astype(np.int64))
            logits = model(tokens[None]).logits[0, len(PROMPT) - 1 : -1] / temperature
            wanted = torch.log_softmax(logits, -1).gather(1, tokens[len(PROMPT) :, None])[:, 0]
            np.testing.assert_allclose(sample.logps, wanted.numpy(), atol=1e-3)
            assert (sample.tokens.dtype, sample.logps.dtype) == (np.int32, np.float32)
            assert (len(sample.tokens), sample.finish) == (20, "length")


async def test_the_most_likely_tokens_are_those_of_transformers(engine: VllmEngine) -> None:
    model = net(11)
    await engine.update_weights(weights(model, 11))
    sample = await one(engine, temperature=0.01, max_tokens=24)
    tokens = torch.from_numpy(PROMPT.astype(np.int64))[None]
    wanted = model.generate(
        tokens, do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=None
    )
    assert sample.tokens.tolist() == wanted[0, len(PROMPT) :].tolist()


async def test_sequences_run_through_two_swaps_and_know_which_tokens_are_whose(
    engine: VllmEngine,
) -> None:
    old, middle, new = net(20), net(21), net(22)
    await engine.update_weights(weights(old, 20))
    tasks = [asyncio.create_task(one(engine, seed, max_tokens=120)) for seed in range(SLOTS)]
    before = engine.stats().tokens
    await until(lambda: engine.stats().tokens > before + 10 * SLOTS)
    await engine.update_weights(weights(middle, 21))
    before = engine.stats().tokens
    await until(lambda: engine.stats().tokens > before + 10 * SLOTS)
    await engine.update_weights(weights(new, 22))
    assert engine.stats().running == SLOTS
    assert engine.stats().pause_s > 0
    samples = await asyncio.gather(*tasks)
    assert engine.stats().running == engine.stats().waiting == 0
    for sample in samples:
        assert (len(sample.tokens), sample.finish) == (120, "length")
        assert [version for _, version in sample.spans] == [20, 21, 22]
        first = sample.spans[1][0]
        assert 0 < first < sample.spans[2][0] < 120
        np.testing.assert_allclose(sample.logps[:first], reference(old, sample)[:first], atol=1e-3)
        # not one token more: the next was sampled by other weights over the same cache
        assert abs(sample.logps[first:] - reference(old, sample)[first:]).max() > 1e-2
    await serves(engine, new, 22)


async def test_a_prefix_that_old_weights_computed_serves_no_new_request(
    engine: VllmEngine,
) -> None:
    prompt = np.resize(PROMPT, 100).astype(np.int32)
    for version in (30, 31):
        model = net(version)
        await engine.update_weights(weights(model, version))
        for _ in range(2):  # the second time out of the cache
            (sample,) = await engine.generate(prompt, 1, Sampling(max_tokens=20, seed=1))
            np.testing.assert_allclose(sample.logps, reference(model, sample, prompt), atol=1e-3)


async def test_who_waits_without_a_token_through_a_swap_is_all_of_the_new_version(
    engine: VllmEngine,
) -> None:
    await engine.update_weights(weights(net(35), 35))
    new = net(36)
    running = [asyncio.create_task(one(engine, seed, max_tokens=60)) for seed in range(SLOTS)]
    waiting = [asyncio.create_task(one(engine, seed)) for seed in range(100, 140)]
    before = engine.stats().tokens
    await until(lambda: engine.stats().tokens > before + SLOTS)
    assert engine.stats().waiting > 0
    await engine.update_weights(weights(new, 36))
    for sample in await asyncio.gather(*waiting):
        assert sample.spans == ((0, 36),)
        np.testing.assert_allclose(sample.logps, reference(new, sample), atol=1e-3)
    assert {len(sample.spans) for sample in await asyncio.gather(*running)} == {2}


async def test_a_version_of_some_tensors_leaves_the_others_as_they_are() -> None:
    """Fused parameters (q, k, v; gate, up) are loaded as a whole: the rest of the layer comes out
    of the checkpoint."""
    engine = opened(slots=4)
    part = (LAYER + "self_attn.k_proj", LAYER + "mlp.up_proj")
    try:
        model = net(1, *part)
        await engine.update_weights(weights(model, 1, *part))
        await serves(engine, model, 1)
        with pytest.raises(WeightsError, match=r"version 2 lacks 'model\.layers\.1\.mlp"):
            await engine.update_weights(weights(net(2), 2, part[0]))
        await serves(engine, model, 1)
    finally:
        await engine.close()


async def test_rollouts_differ_and_the_same_seed_repeats_whatever_runs_beside_it(
    engine: VllmEngine,
) -> None:
    await engine.update_weights(weights(net(0), 40))
    alone = await engine.generate(PROMPT, 3, Sampling(max_tokens=30, seed=5))
    assert len({sample.tokens.tobytes() for sample in alone}) == 3
    crowd = [asyncio.create_task(one(engine, seed, max_tokens=40)) for seed in range(200, 220)]
    again = await engine.generate(PROMPT, 3, Sampling(max_tokens=30, seed=5))
    (last,) = await engine.generate(PROMPT, 1, Sampling(max_tokens=30, seed=5), first=2)
    for first, second in zip([*alone, alone[2]], [*again, last], strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
    await asyncio.gather(*crowd)


async def test_a_prompt_computed_in_parts_changes_no_noise(engine: VllmEngine) -> None:
    prompt = np.resize(PROMPT, 60).astype(np.int32)
    sampling = Sampling(seed=5, max_tokens=20)
    whole = await engine.generate(prompt, 3, sampling)
    parts = opened(slots=4, vllm={"kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 24})
    try:
        several = await parts.generate(prompt, 3, sampling)
    finally:
        await parts.close()
    assert [s.tokens.tolist() for s in several] == [s.tokens.tolist() for s in whole]


async def test_a_stop_token_ends_a_sequence_and_is_part_of_it(engine: VllmEngine) -> None:
    free = await one(engine, seed=8)
    stop = int(free.tokens[4])
    end = free.tokens.tolist().index(stop) + 1
    stopped = await one(engine, seed=8, stop=(stop,))
    assert stopped.tokens.tolist() == free.tokens[:end].tolist()
    assert stopped.finish == "stop"


async def test_a_continuation_ends_where_the_context_ends(engine: VllmEngine) -> None:
    sample = await one(engine, max_tokens=4000)
    assert len(sample.tokens) == engine.max_length - len(PROMPT)
    assert sample.finish == "length"


@pytest.mark.parametrize(
    ("prefix", "fields", "match"),
    [
        (np.zeros(128, np.int32), {}, "a prefix of 128 tokens: the engine takes 1 to 127"),
        (np.array([40]), {}, "outside the model's vocabulary"),
        (PROMPT, {"top_p": 0.9}, r"top_p = 0\.9, .*use top_p = 1"),
        (PROMPT, {"top_k": 5}, "top_k = 5"),
    ],
)
async def test_what_cannot_be_sampled_is_refused_in_one_line(
    engine: VllmEngine, prefix: np.ndarray, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match) as caught:
        await engine.generate(prefix, 1, Sampling(max_tokens=4, **fields))
    assert "\n" not in str(caught.value)


async def test_at_its_deadline_a_request_gives_what_it_has_and_frees_the_engine(
    engine: VllmEngine,
) -> None:
    model = net(0)
    await engine.update_weights(weights(model, 50))
    crowd = Sampling(max_tokens=120, seed=1)
    before = engine.stats().tokens
    task = asyncio.create_task(
        engine.generate(PROMPT, SLOTS + 8, crowd, deadline=time.monotonic() + 0.4)
    )
    samples = await task
    assert engine.stats().tokens < before + (SLOTS + 8) * 120
    assert engine.stats().running == engine.stats().waiting == 0
    assert {sample.finish for sample in samples} == {"aborted"}
    assert 0 in {len(sample.tokens) for sample in samples}  # eight had no slot
    for sample in samples:
        if len(sample.tokens):
            np.testing.assert_allclose(sample.logps, reference(model, sample), atol=1e-3)
    late = await engine.generate(PROMPT, 1, crowd, deadline=time.monotonic() - 1)
    assert [(len(sample.tokens), sample.finish) for sample in late] == [(0, "aborted")]
    await serves(engine, model, 50)


async def test_a_cancelled_request_frees_the_engine_at_once(engine: VllmEngine) -> None:
    task = asyncio.create_task(engine.generate(PROMPT, SLOTS, Sampling(max_tokens=120)))
    before = engine.stats().tokens
    await until(lambda: engine.stats().tokens > before + SLOTS)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert engine.stats().running == engine.stats().waiting == 0
    await one(engine)
    # vLLM itself says what runs in it: the one that was asked for after them
    assert max(latest.num_running_reqs for latest in engine._statistics._latest.values()) <= 1
    assert not engine._host.llm.output_processor.request_states


def broken(version: Weights, **fields: Any) -> Weights:
    """`version` with its first tensor changed."""
    first = version.tensors[0]._replace(**fields)
    return version._replace(tensors=(first, *version.tensors[1:]))


async def test_a_version_that_does_not_fit_is_refused_and_the_old_one_is_served(
    engine: VllmEngine,
) -> None:
    old = net(60)
    await engine.update_weights(weights(old, 60))
    good = weights(net(61), 61)
    pause_s = engine.stats().pause_s
    wrong = [
        (broken(good, shape=(32, 127)), r"has shape \(32, 127\), the model's is \(32, 128\)"),
        (broken(good, name="model.nonsense"), r"lacks 'model\.embed_tokens\.weight'"),
        (good._replace(tensors=(*good.tensors, good.tensors[0]._replace(name="x"))), "'x' is no"),
        (good._replace(tensors=good.tensors[1:]), r"lacks 'model\.embed_tokens\.weight'"),
        (broken(good, dtype="I8"), "has dtype I8; known are"),
        (broken(good, data=good.tensors[0].data[4:]), "bytes, its shape and dtype say"),
        (good._replace(digest="0" * 32), r"the spool's digest is \w+, not 0{32}"),
    ]
    for version, match in wrong:
        with pytest.raises(WeightsError, match=match):
            await engine.update_weights(version)
        assert engine.stats().version == 60
    assert engine.stats().pause_s == pause_s  # nothing was held for it
    await serves(engine, old, 60)


async def test_half_precision_is_taken_and_a_swap_outlives_who_asked_for_it(
    engine: VllmEngine,
) -> None:
    model = net(62)
    for parameter in model.parameters():  # not its buffers: positions stay exact
        parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))
    tensors = [
        Tensor(name, "BF16", tuple(value.shape), memoryview(value.numpy()).cast("B"))
        for name, value in (
            (name, p.to(torch.bfloat16).view(torch.uint16))
            for name, p in sorted(model.named_parameters())
        )
    ]
    task = asyncio.create_task(
        engine.update_weights(Weights(62, digest(tensors), tuple(tensors), 1))
    )
    await asyncio.sleep(0)
    task.cancel()
    await until(lambda: engine.stats().version == 62)
    await serves(engine, model, 62)


async def test_an_engine_whose_process_is_killed_says_so_to_all_who_wait() -> None:
    engine = opened(slots=4)
    pids = engine.pids
    watching = asyncio.create_task(engine.watch())
    task = asyncio.create_task(engine.generate(PROMPT, 4, Sampling(max_tokens=120)))
    await until(lambda: engine.stats().tokens > 0)
    os.kill(engine._host._roots[0].pid or 0, signal.SIGKILL)
    for waiter in (task, watching):
        with pytest.raises(EngineError, match="killed by signal 9") as caught:
            await asyncio.wait_for(waiter, 60)
        assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="killed by signal 9"):
        await one(engine)
    with pytest.raises(EngineError, match="killed by signal 9"):
        await engine.update_weights(weights(net(1), 1))
    await engine.close()
    await until(lambda: not [pid for pid in pids if psutil.pid_exists(pid)])


async def test_an_engine_killed_while_it_takes_weights_says_so_rather_than_which_call_failed() -> (
    None
):
    engine = opened(slots=4)
    swap = asyncio.create_task(engine.update_weights(weights(net(1), 1)))
    while not engine._paused:
        await asyncio.sleep(0)
    os.kill(engine._host._roots[0].pid or 0, signal.SIGKILL)
    with pytest.raises(EngineError, match="killed by signal 9"):
        await asyncio.wait_for(swap, 60)
    await engine.close()


async def test_an_engine_that_hangs_is_found_out_and_can_be_closed() -> None:
    engine = opened(slots=4, engine_hang_s=8.0)
    pids = engine.pids
    await one(engine)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    task = asyncio.create_task(engine.generate(PROMPT, 4, Sampling(max_tokens=20)))
    with pytest.raises(EngineError, match=r"no token within 8 s \(actor\.engine_hang_s\)"):
        await asyncio.wait_for(task, 60)
    with pytest.raises(EngineError, match="hangs"):
        await asyncio.wait_for(engine.watch(), 60)
    await engine.close()
    await until(lambda: not [pid for pid in pids if psutil.pid_exists(pid)])


async def test_a_swap_that_is_not_answered_breaks_the_engine() -> None:
    """It might have loaded a part of it: what it would sample is no version."""
    engine = opened(slots=4, engine_hang_s=8.0)
    await one(engine)
    for pid in engine.pids:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not answer within 8 s"):
        await asyncio.wait_for(engine.update_weights(weights(net(1), 1)), 60)
    with pytest.raises(EngineError, match="did not answer"):
        await asyncio.wait_for(engine.watch(), 60)
    await engine.close()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"vllm": {"kv_cache_memory_bytes": 4096}},
            r"vLLM did not start: .*cache blocks.*lower actor\.max_length or raise",
        ),
        ({"engine_start_s": 0.5}, r"vLLM was not up within 0\.5 s \(actor\.engine_start_s\)"),
        ({"vllm": {"kv_cache_dtype": "fp3"}}, r"vLLM cannot serve .* cache_dtype: Input should be"),
    ],
)
async def test_a_start_that_fails_gets_one_line_and_leaves_no_process(
    fields: dict[str, Any], match: str
) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises((EngineError, ConfigError), match=match) as caught:
        opened(slots=4, **fields)
    assert "\n" not in str(caught.value)
    gc.collect()
    after = {child.pid: child.name() for child in psutil.Process().children(recursive=True)}
    assert not [pid for pid in set(after) - before if "VLLM" in after[pid].upper()]


async def test_a_model_that_vllm_cannot_serve_gets_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for source in models.find("tiny").iterdir():
        text = source.read_bytes().replace(b"Qwen2ForCausalLM", b"NoSuchForCausalLM")
        (folder / source.name).write_bytes(text)
    with pytest.raises(ConfigError, match=r"vLLM cannot serve .*NoSuchForCausalLM") as caught:
        make(RunConfig(model=str(folder)), ActorConfig(engine="vllm"))
    assert "\n" not in str(caught.value)


ACTOR = """
import time
from actor.config import ActorConfig
from actor.engine.make import make
from common.config import RunConfig
if __name__ == "__main__":
    print(*make(RunConfig(), ActorConfig(engine="vllm", slots=2)).pids, flush=True)
    time.sleep(600)
"""


async def test_vllms_processes_die_with_an_actor_that_is_killed(
    processes: Start, tmp_path: Path
) -> None:
    script = tmp_path / "actor_alone.py"
    script.write_text(ACTOR)
    process = processes("-u", str(script), stdout=subprocess.PIPE)
    assert process.stdout is not None
    pids = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]
    assert len(pids) >= 2
    process.kill()
    await until(lambda: not [pid for pid in pids if alive(pid)])


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
