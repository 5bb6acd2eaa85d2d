"""The torch engine samples what the model says, at the version it says, whatever runs beside it."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from actor.config import ActorConfig
from actor.engine import make as engines
from actor.engine.base import Sample
from actor.engine.torch_engine import TorchEngine
from common.config import RunConfig
from common.errors import ConfigError, DataError, EngineError, WeightsError
from common.versions import Tensor, Weights
from common.wire import Sampling

FAMILIES = ("qwen2", "llama")
VOCAB, POSITIONS = 40, 640
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.25,
}


def new_net(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    if family == "qwen2":
        net = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    else:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 160,
        }
        net = LlamaForCausalLM(
            LlamaConfig(**SHAPE, rope_parameters=rope, tie_word_embeddings=False)
        )
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:  # biases and norms too, so that one left behind shows
            torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        new_net(family, 0).save_pretrained(made[family])
    return made


Open = Callable[..., TorchEngine]


@pytest.fixture
async def opened(folders: dict[str, Path]) -> AsyncIterator[Open]:
    """Opens engines and closes them."""
    engines: list[TorchEngine] = []

    def open_engine(family: str = "qwen2", slots: int = 8, **options: Any) -> TorchEngine:
        engines.append(TorchEngine(folders[family], slots=slots, threads=1, **options))
        return engines[-1]

    yield open_engine
    for engine in engines:
        await engine.close()


def weights_of(net: Any, version: int, *only: str) -> Weights:
    tensors = [
        Tensor(name, "F32", tuple(value.shape), memoryview(value.numpy().tobytes()))
        for name, value in net.named_parameters()
        if not only or name in only
    ]
    return Weights(version, f"digest{version}", tuple(tensors))


def reference(net: Any, prefix: np.ndarray, sample: Sample, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the sampled tokens by one full transformers forward."""
    tokens = torch.from_numpy(np.r_[prefix, sample.tokens].astype(np.int64))
    logits = net(tokens[None], use_cache=False).logits[0, len(prefix) - 1 : -1]
    logps = torch.log_softmax(logits / temperature, -1)
    return logps.gather(1, tokens[len(prefix) :, None])[:, 0].numpy()


def mixed_reference(
    old: Any, new: Any, prefix: np.ndarray, sample: Sample, start: int
) -> np.ndarray:
    """Log-probs by decoding by hand: up to token `start` with `old`, then `new` over the cache of
    `old`."""
    tokens = torch.from_numpy(np.r_[prefix, sample.tokens].astype(np.int64))
    switch = len(prefix) + start - 1  # the first position that the new weights feed
    cache = DynamicCache(config=old.config)
    rows = [old(tokens[None, :switch], past_key_values=cache, use_cache=True).logits[0]]
    for position in range(switch, len(tokens)):
        rows.append(new(tokens[None, position : position + 1], past_key_values=cache).logits[0])
    logps = torch.log_softmax(torch.cat(rows)[len(prefix) - 1 : -1], -1)
    return logps.gather(1, tokens[len(prefix) :, None])[:, 0].numpy()


def prompt(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, size).astype(np.int32)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("family", FAMILIES)
async def test_log_probs_are_those_of_a_full_forward_of_transformers(
    opened: Open, family: str
) -> None:
    engine, net = opened(family), new_net(family, 0)
    prompts = [prompt(size, size) for size in (1, 2, 7, 30, 61)]
    jobs = [
        engine.generate(p, 3, Sampling(max_tokens=20 + i, temperature=0.5 + 0.3 * i, seed=i))
        for i, p in enumerate(prompts)
    ]
    for i, samples in enumerate(await asyncio.gather(*jobs)):
        for sample in samples:
            expected = reference(net, prompts[i], sample, 0.5 + 0.3 * i)
            np.testing.assert_allclose(sample.logps, expected, atol=1e-4)
            assert sample.tokens.dtype == np.int32
            assert sample.logps.dtype == np.float32
            assert (sample.finish, sample.tokens.size) == ("length", 20 + i)
            assert sample.spans == ((0, 0),)


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_generic_decode_step_agrees_with_the_fused_one(opened: Open, family: str) -> None:
    engine, generic = opened(family), opened(family, fused_decode=False)
    assert (engine.fused_decode, generic.fused_decode) == (True, False)
    asked = Sampling(max_tokens=30, seed=3)
    for a, b in zip(
        await engine.generate(prompt(9), 8, asked),
        await generic.generate(prompt(9), 8, asked),
        strict=True,
    ):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


async def test_a_model_with_many_key_heads_attends_head_by_head(tmp_path: Path) -> None:
    shape = SHAPE | {"num_attention_heads": 24, "num_key_value_heads": 12, "head_dim": 4}
    net = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    net.save_pretrained(tmp_path)
    engine = TorchEngine(tmp_path, slots=4)
    for sample in await engine.generate(prompt(9), 6, Sampling(max_tokens=40)):
        np.testing.assert_allclose(sample.logps, reference(net, prompt(9), sample), atol=1e-4)
    await engine.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_it_decodes_in_bf16(folders: dict[str, Path], family: str) -> None:
    engine = TorchEngine(folders[family], slots=4, dtype=torch.bfloat16)
    for sample in await engine.generate(prompt(9), 6, Sampling(max_tokens=40)):
        error = np.abs(sample.logps - reference(new_net(family, 0), prompt(9), sample))
        assert error.mean() < 0.1
    await engine.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_sequence_that_spans_a_swap_keeps_its_cache_and_says_so(
    opened: Open, family: str
) -> None:
    engine, old, new = opened(family), new_net(family, 0), new_net(family, 1)
    job = asyncio.create_task(engine.generate(prompt(12), 4, Sampling(max_tokens=300)))
    await until(lambda: engine.stats().tokens >= 40)
    await engine.update_weights(weights_of(new, 5))
    assert engine.stats().version == 5
    for sample in await job:
        (zero, before), (start, after) = sample.spans
        assert (zero, before, after) == (0, 0, 5)
        assert 10 <= start < 300
        plain = reference(old, prompt(12), sample)
        np.testing.assert_allclose(sample.logps[:start], plain[:start], atol=1e-4)
        expected = mixed_reference(old, new, prompt(12), sample, start)
        np.testing.assert_allclose(sample.logps, expected, atol=1e-4)
        recomputed = reference(new, prompt(12), sample)
        assert np.abs(sample.logps[start:] - recomputed[start:]).max() > 1e-2  # not recomputed
    assert 0 < engine.stats().pause_s < 1


@pytest.mark.parametrize("family", FAMILIES)
async def test_after_a_swap_fresh_prompts_see_the_new_weights_only(
    opened: Open, family: str
) -> None:
    engine, new = opened(family, slots=2), new_net(family, 1)
    busy = asyncio.create_task(engine.generate(prompt(5), 6, Sampling(max_tokens=150)))
    await until(lambda: engine.stats().tokens >= 20)
    await engine.update_weights(weights_of(new, 1))
    (fresh,) = await engine.generate(prompt(9), 1, Sampling(max_tokens=40))
    np.testing.assert_allclose(fresh.logps, reference(new, prompt(9), fresh), atol=1e-4)
    assert fresh.spans == ((0, 1),)
    waited = (await busy)[-1]  # its prefix was computed before the swap, its first token after it
    assert waited.spans == ((0, 1),)
    np.testing.assert_allclose(waited.logps, reference(new, prompt(5), waited), atol=1e-4)


async def test_a_version_may_hold_only_some_tensors(opened: Open) -> None:
    engine, net, other = opened(), new_net("qwen2", 0), new_net("qwen2", 1)
    name = "model.layers.1.self_attn.k_proj.weight"
    net.get_parameter(name).copy_(other.get_parameter(name))
    await engine.update_weights(weights_of(net, 1, name))
    (sample,) = await engine.generate(prompt(9), 1, Sampling(max_tokens=30))
    np.testing.assert_allclose(sample.logps, reference(net, prompt(9), sample), atol=1e-4)
    with pytest.raises(WeightsError, match=f"version 2 lacks '{name}'"):
        await engine.update_weights(weights_of(net, 2, "model.norm.weight"))


async def test_bf16_tensors_are_served_by_a_float32_model_as_they_are(opened: Open) -> None:
    engine, net = opened("llama"), new_net("llama", 1)
    for parameter in net.parameters():
        parameter.copy_(parameter.bfloat16())
    tensors = tuple(
        Tensor(t.name, "BF16", t.shape, memoryview(_bf16(net.get_parameter(t.name))))
        for t in weights_of(net, 1).tensors
    )
    await engine.update_weights(Weights(1, "d", tensors))
    (sample,) = await engine.generate(prompt(4), 1, Sampling(max_tokens=30))
    np.testing.assert_allclose(sample.logps, reference(net, prompt(4), sample), atol=1e-4)


def _bf16(value: torch.Tensor) -> bytes:
    return value.bfloat16().view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": (3, 16)}, r"shape \(3, 16\), the model's is \(48,\)"),
        ({"name": "model.norm.wait"}, "'model.norm.wait' is no parameter"),
        ({"dtype": "I32"}, "dtype I32"),
        ({"data": memoryview(b"123")}, "3 bytes, its shape and dtype say 192"),
    ],
)
async def test_weights_that_do_not_fit_are_refused_and_the_old_version_goes_on(
    opened: Open, changed: dict[str, Any], message: str
) -> None:
    engine = opened()
    good = weights_of(new_net("qwen2", 1), 3)
    bad = tuple(t._replace(**changed) if t.name == "model.norm.weight" else t for t in good.tensors)
    with pytest.raises(WeightsError, match=message):
        await engine.update_weights(Weights(3, "d", bad))
    (sample,) = await engine.generate(prompt(9), 1, Sampling(max_tokens=20))
    assert sample.spans == ((0, 0),)
    net = new_net("qwen2", 0)
    np.testing.assert_allclose(sample.logps, reference(net, prompt(9), sample), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
async def test_what_is_sampled_does_not_depend_on_what_runs_beside_it(
    opened: Open, family: str
) -> None:
    asked = Sampling(max_tokens=60, seed=9, temperature=1.2)
    alone = await opened(family, slots=1).generate(prompt(8), 5, asked)
    crowd = opened(family, slots=16)
    others = [
        crowd.generate(prompt(3 + s, s), 3, Sampling(max_tokens=5 + 7 * s, seed=s))
        for s in range(12)
    ]
    *_, head, tail = await asyncio.gather(
        *others, crowd.generate(prompt(8), 2, asked), crowd.generate(prompt(8), 3, asked, first=2)
    )
    for one, same in zip(alone, [*head, *tail], strict=True):
        np.testing.assert_array_equal(one.tokens, same.tokens)
        np.testing.assert_allclose(one.logps, same.logps, atol=1e-4)
    assert len({sample.tokens.tobytes() for sample in alone}) == 5


async def test_stop_tokens_end_a_sequence_and_are_part_of_it(opened: Open) -> None:
    engine = opened()
    free = await engine.generate(prompt(6), 8, Sampling(max_tokens=40, seed=1))
    stops = (3, 8, 21, 30)
    stopped = await engine.generate(prompt(6), 8, Sampling(max_tokens=40, seed=1, stop=stops))
    for long, short in zip(free, stopped, strict=True):
        hits = np.flatnonzero(np.isin(long.tokens, stops))
        size = int(hits[0]) + 1 if hits.size else 40
        np.testing.assert_array_equal(short.tokens, long.tokens[:size])
        assert short.finish == ("stop" if hits.size else "length")


def steps_needed(sizes: list[int], slots: int) -> int:
    """Decode steps when each sequence, in order, takes the first slot that comes free."""
    free_at = [0] * slots
    for size in sizes:
        heapq.heapreplace(free_at, free_at[0] + size)
    return max(free_at)


async def test_slots_are_never_exceeded_and_finished_rows_are_replaced_at_once(
    opened: Open,
) -> None:
    engine = opened(slots=4)
    sizes = [3 + 5 * i for i in range(6) for _ in range(3)]
    jobs = [engine.generate(prompt(4, i), 3, Sampling(max_tokens=3 + 5 * i)) for i in range(6)]
    every = asyncio.gather(*jobs)
    seen = set()
    while not every.done():
        await asyncio.sleep(0)
        seen.add(engine.stats().running)
    assert [sample.tokens.size for samples in await every for sample in samples] == sizes
    assert max(seen) == 4
    assert engine.stats().tokens == sum(sizes)
    assert engine.steps == steps_needed(sizes, 4)
    assert (engine.stats().running, engine.stats().waiting, engine.stats().kv_use) == (0, 0, 0.0)


async def test_cancelling_the_waiting_task_frees_its_slots(opened: Open) -> None:
    engine = opened(slots=2)
    job = asyncio.create_task(engine.generate(prompt(4), 5, Sampling(max_tokens=600)))
    await until(lambda: engine.stats().running == 2)
    job.cancel()
    await asyncio.wait([job])
    assert job.cancelled()
    (sample,) = await engine.generate(prompt(9), 1, Sampling(max_tokens=8))
    assert sample.tokens.size == 8
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_past_its_deadline_a_call_returns_what_there_is(opened: Open) -> None:
    engine, net = opened(slots=2), new_net("qwen2", 0)
    deadline = time.monotonic() + 0.15
    samples = await engine.generate(prompt(4), 3, Sampling(max_tokens=600), deadline=deadline)
    assert {sample.finish for sample in samples} == {"aborted"}
    assert 0 < samples[0].tokens.size < 600
    assert (samples[2].tokens.size, samples[2].spans) == (0, ((0, 0),))
    np.testing.assert_allclose(samples[0].logps, reference(net, prompt(4), samples[0]), atol=1e-4)


async def test_the_event_loop_stays_responsive_while_it_decodes(opened: Open) -> None:
    engine = opened(slots=8)
    job = asyncio.create_task(engine.generate(prompt(4), 8, Sampling(max_tokens=200)))
    turns = 0
    while not job.done():
        await asyncio.sleep(0.002)
        turns += 1
    assert turns > 10


async def test_a_continuation_fills_the_cache_to_its_last_position(opened: Open) -> None:
    engine, net = opened(slots=2, max_length=24), new_net("qwen2", 0)
    (sample,) = await engine.generate(prompt(20), 1, Sampling(max_tokens=100))
    assert (sample.tokens.size, sample.finish) == (4, "length")
    np.testing.assert_allclose(sample.logps, reference(net, prompt(20), sample), atol=1e-4)


@pytest.mark.parametrize(
    ("prefix", "sampling", "message"),
    [
        (prompt(24), Sampling(), "a prefix of 24 tokens: the engine takes 1 to 23"),
        (prompt(0), Sampling(), "a prefix of 0 tokens"),
        (np.array([VOCAB], np.int32), Sampling(), r"outside the model's vocabulary \[0, 40\)"),
        (prompt(3), Sampling(top_p=0.9), "top_p = 0.9"),
        (prompt(3), Sampling(top_k=5), "top_k = 5"),
        (prompt(3), Sampling(temperature=0.0), "temperature 0.0"),
        (prompt(3), Sampling(max_tokens=0), "0 tokens"),
    ],
)
async def test_what_cannot_be_sampled_is_refused_in_one_line(
    opened: Open, prefix: np.ndarray, sampling: Sampling, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        await opened(max_length=24).generate(prefix, 1, sampling)
    assert "\n" not in str(caught.value)


async def test_a_broken_engine_tells_every_waiter_and_every_later_caller(opened: Open) -> None:
    engine, net = opened(slots=2), new_net("qwen2", 1)
    jobs = [
        asyncio.create_task(engine.generate(prompt(4), 2, Sampling(max_tokens=600)))
        for _ in range(3)
    ]
    await until(lambda: engine.stats().running == 2)
    net.get_parameter("model.norm.weight").fill_(float("nan"))
    calls: list[Awaitable[object]] = [*jobs, engine.update_weights(weights_of(net, 1))]
    *failed, _ = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, EngineError) for error in failed)
    assert "version 1 is not finite" in str(failed[0])
    with pytest.raises(EngineError, match="not finite"):
        await engine.generate(prompt(4), 1, Sampling())
    with pytest.raises(EngineError, match="not finite"):
        await engine.update_weights(weights_of(net, 2))


async def test_closing_wakes_whoever_waits(opened: Open) -> None:
    engine = opened()
    job = asyncio.create_task(engine.generate(prompt(4), 2, Sampling(max_tokens=600)))
    await until(lambda: engine.stats().running > 0)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await job
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(prompt(4), 1, Sampling())


async def test_the_factory_opens_the_shipped_model_by_name() -> None:
    engine = engines.make(RunConfig(), ActorConfig(slots=4, device="cpu"))
    samples = await engine.generate(np.array([1, 5, 6], np.int32), 4, Sampling(max_tokens=5))
    assert [sample.tokens.size for sample in samples] == [5] * 4
    await engine.close()


@pytest.mark.parametrize(
    ("actor", "error", "message"),
    [
        ({"device": "quantum"}, ConfigError, "actor.device = 'quantum'"),
        ({"max_length": 4096}, DataError, "the model has 128 positions"),
        ({"slots": 1 << 30}, DataError, "GiB: lower actor.slots or actor.max_length"),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused_with_the_fix(
    actor: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        engines.make(RunConfig(), ActorConfig(**actor))
    assert "\n" not in str(caught.value)


def test_a_model_folder_that_is_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model at"):
        engines.make(RunConfig(model=str(tmp_path)), ActorConfig())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"')
    with pytest.raises(DataError, match=r"config\.json"):
        engines.make(RunConfig(model=str(tmp_path)), ActorConfig())


def test_a_model_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"sliding_attention.*ordinary attention"):
        TorchEngine(tmp_path, slots=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
async def test_it_runs_on_a_gpu(folders: dict[str, Path], family: str) -> None:
    engine, net = TorchEngine(folders[family], slots=4, device="cuda"), new_net(family, 0)
    for sample in await engine.generate(prompt(9), 6, Sampling(max_tokens=30)):
        np.testing.assert_allclose(sample.logps, reference(net, prompt(9), sample), atol=1e-3)
    await engine.close()
