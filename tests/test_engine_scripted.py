"""The scripted engine keeps the promises of the protocol without a model."""

import asyncio
import subprocess
import sys
import time

import numpy as np
import pytest

from actor.config import ScriptedConfig
from actor.engine.scripted import ScriptedEngine
from common.errors import DataError, EngineError
from common.versions import Tensor, Weights
from common.wire import Sampling

PREFIX = np.arange(3, 9, dtype=np.int32)
STOPPING = Sampling(max_tokens=200, stop=(2,), seed=11)
FAST = ScriptedConfig(tokens_per_s=1e6)


def weights(version: int) -> Weights:
    return Weights(version, "d", (Tensor("anything", "F32", (1,), memoryview(b"abcd")),))


async def test_what_it_samples_depends_on_seed_and_rollout_and_on_nothing_beside_it() -> None:
    alone = await ScriptedEngine(FAST, slots=4).generate(PREFIX, 4, STOPPING)
    crowd = ScriptedEngine(ScriptedConfig(tokens_per_s=5e4), slots=2)
    others = [crowd.generate(PREFIX, 2, Sampling(seed=s, max_tokens=9)) for s in range(5)]
    *_, tail = await asyncio.gather(*others, crowd.generate(PREFIX, 2, STOPPING, first=2))
    for one, same in zip(alone[2:], tail, strict=True):
        np.testing.assert_array_equal(one.tokens, same.tokens)
        np.testing.assert_array_equal(one.logps, same.logps)
    assert not np.array_equal(alone[0].tokens, alone[1].tokens)


async def test_samples_are_well_formed_and_stop_only_at_the_end() -> None:
    engine = ScriptedEngine(FAST, slots=64)
    samples = await engine.generate(PREFIX, 200, STOPPING)
    for sample in samples:
        assert sample.tokens.dtype == np.int32
        assert sample.logps.dtype == np.float32
        assert sample.finish == "stop"
        assert sample.tokens[-1] == 2
        assert 2 not in sample.tokens[:-1]
        assert 0 <= sample.tokens.min() <= sample.tokens.max() < engine.vocab_size
        assert sample.logps.max() <= 0
        assert sample.spans == ((0, 0),)


async def test_lengths_are_log_normal_with_the_configured_mean() -> None:
    samples = await ScriptedEngine(FAST, slots=64).generate(PREFIX, 2000, STOPPING)
    sizes = np.array([sample.tokens.size for sample in samples])
    assert abs(sizes.mean() - 24.0) < 0.8
    assert abs(np.log(sizes).std() - 0.4) < 0.04


async def test_without_a_stop_token_the_limit_ends_a_continuation() -> None:
    (sample,) = await ScriptedEngine(FAST, slots=1).generate(PREFIX, 1, Sampling(max_tokens=17))
    assert (sample.tokens.size, sample.finish) == (17, "length")


async def test_it_takes_the_time_that_its_configuration_says() -> None:
    took = []
    for _ in range(3):  # a busy machine adds to some of them
        started = time.monotonic()
        engine = ScriptedEngine(ScriptedConfig(tokens_per_s=100.0, startup_s=0.05), slots=1)
        await engine.generate(PREFIX, 2, Sampling(max_tokens=5))
        took.append(time.monotonic() - started)
    assert 0.14 < min(took) < 0.4


async def test_a_swap_in_mid_generation_starts_a_span_and_changes_the_tokens_after_it_only() -> (
    None
):
    engine = ScriptedEngine(ScriptedConfig(tokens_per_s=100.0), slots=1)
    asked = Sampling(max_tokens=100, seed=5)
    job = asyncio.create_task(engine.generate(PREFIX, 1, asked))
    await asyncio.sleep(0.15)
    await engine.update_weights(weights(7))
    (sample,) = await job
    (_, old), (start, new) = sample.spans
    assert (old, new) == (0, 7)
    assert 10 < start < 99
    before = (await ScriptedEngine(FAST, slots=1).generate(PREFIX, 1, asked))[0]
    after_engine = ScriptedEngine(FAST, slots=1)
    await after_engine.update_weights(weights(7))
    after = (await after_engine.generate(PREFIX, 1, asked))[0]
    np.testing.assert_array_equal(sample.tokens, np.r_[before.tokens[:start], after.tokens[start:]])
    np.testing.assert_array_equal(sample.logps, np.r_[before.logps[:start], after.logps[start:]])
    assert not np.array_equal(before.tokens, after.tokens)


async def test_past_its_deadline_a_call_returns_what_there_is() -> None:
    engine = ScriptedEngine(ScriptedConfig(tokens_per_s=20.0), slots=1)
    first, second = await engine.generate(
        PREFIX, 2, Sampling(max_tokens=100), deadline=time.monotonic() + 0.5
    )
    assert first.finish == second.finish == "aborted"
    assert 5 <= first.tokens.size <= 10
    assert (second.tokens.size, second.spans) == (0, ((0, 0),))
    assert engine.stats().running == 0


async def test_cancelling_the_caller_frees_its_slots() -> None:
    engine = ScriptedEngine(ScriptedConfig(tokens_per_s=10.0), slots=2)
    job = asyncio.create_task(engine.generate(PREFIX, 4, Sampling(max_tokens=100)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (engine.stats().running, engine.stats().waiting) == (2, 2)
    job.cancel()
    await asyncio.wait([job])
    assert job.cancelled()
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_closing_wakes_every_caller_with_an_engine_error() -> None:
    engine = ScriptedEngine(ScriptedConfig(tokens_per_s=1.0), slots=1)
    jobs = [asyncio.create_task(engine.generate(PREFIX, 1, Sampling())) for _ in range(2)]
    await asyncio.sleep(0)
    await engine.close()
    assert all(
        isinstance(e, EngineError) for e in await asyncio.gather(*jobs, return_exceptions=True)
    )
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(PREFIX, 1, Sampling())


async def test_it_refuses_what_the_protocol_refuses() -> None:
    engine = ScriptedEngine(FAST, slots=1, max_length=6)
    with pytest.raises(DataError, match=r"prefix of 6 tokens.*1 to 5"):
        await engine.generate(PREFIX, 1, Sampling())
    with pytest.raises(DataError, match="top_p"):
        await engine.generate(PREFIX[:2], 1, Sampling(top_p=0.9))


async def test_a_thousand_engines_are_cheap() -> None:
    engines = [ScriptedEngine(FAST, slots=8) for _ in range(1000)]
    started = time.process_time()
    await asyncio.gather(*(engine.generate(PREFIX, 8, STOPPING) for engine in engines))
    assert time.process_time() - started < 8.0  # 8,000 continuations
    assert sum(engine.stats().tokens for engine in engines) > 100_000


def test_it_needs_no_torch() -> None:
    code = "import sys, actor.engine.make, actor.engine.scripted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_what_runs_and_loses_its_place_comes_back_with_its_tokens() -> None:
    roomy = ScriptedEngine(FAST, slots=8)
    tight = ScriptedEngine(ScriptedConfig(tokens_per_s=500.0, kv_tokens=80), slots=8)
    asked = Sampling(max_tokens=40, seed=3)
    alone, squeezed = [await engine.generate(PREFIX, 4, asked) for engine in (roomy, tight)]
    for one, same in zip(alone, squeezed, strict=True):
        np.testing.assert_array_equal(one.tokens, same.tokens)
        assert same.spans == ((0, 0),)
    stats = tight.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.kv_use) == (0, 0, 0.0)
    assert roomy.stats().preemptions == 0


async def test_what_waits_for_a_place_when_its_time_is_over_keeps_the_tokens_it_had() -> None:
    engine = ScriptedEngine(ScriptedConfig(tokens_per_s=50.0, kv_tokens=60), slots=4)
    until = time.monotonic() + 1.0
    samples = await engine.generate(PREFIX, 2, Sampling(max_tokens=100), deadline=until)
    assert [sample.finish for sample in samples] == ["aborted", "aborted"]
    # with 24 each they filled the cache with their prefixes; a busy machine notices a bit later
    assert samples[1].tokens.size < 40
    assert samples[0].tokens.size > samples[1].tokens.size > 0


async def test_it_dies_when_told_to_and_says_so_to_everybody() -> None:
    config = ScriptedConfig(tokens_per_s=1000.0, dies_after_tokens=5)
    engine = ScriptedEngine(config, slots=2)
    watch = asyncio.create_task(engine.watch())
    calls = [engine.generate(PREFIX, 1, Sampling(max_tokens=n, seed=n)) for n in (5, 1000)]
    ends = await asyncio.gather(*calls, watch, return_exceptions=True)
    with pytest.raises(EngineError, match="as it was told to"):
        await engine.update_weights(weights(1))
    assert all(isinstance(end, EngineError) for end in ends)


async def test_it_hangs_when_told_to_until_it_is_found_out() -> None:
    config = ScriptedConfig(tokens_per_s=1000.0, hangs_after_tokens=5)
    engine = ScriptedEngine(config, slots=2, hang_s=0.2)
    await engine.generate(PREFIX, 1, Sampling(max_tokens=5))
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no token for 0\.2 s"):
        await engine.generate(PREFIX, 1, Sampling(max_tokens=5))
    assert time.monotonic() - began > 0.1
    with pytest.raises(EngineError, match="no token"):
        await engine.watch()


def test_it_fails_to_start_when_told_to() -> None:
    with pytest.raises(EngineError, match="fails_to_start"):
        ScriptedEngine(ScriptedConfig(fails_to_start=True), slots=1)
