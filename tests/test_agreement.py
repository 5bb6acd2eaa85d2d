"""Engine and learner are compared where they must agree, and a real disagreement is told."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from learner.agreement import SILENCE, Doubt, doubt
from learner.batch import flatten, pack
from learner.item import Item
from learner.state import TrainState
from learner.step import train_step
from tests.builders import make_segment
from tests.test_step import a_batch, a_state, config


def sampled(state: TrainState, version: int, temperature: float = 1.0, seed: int = 0) -> list[Item]:
    """A batch with the log-probs that an engine with `state`'s weights gives its tokens, when it
    divides the logits by another temperature than it says."""
    items = a_batch(seed, groups=6, version=version)
    batch = flatten(items, version)
    micro = pack(batch, np.arange(batch.rows))
    micro = replace(micro, temperature=torch.full_like(micro.temperature, temperature))
    with torch.no_grad():
        logp = torch.zeros(batch.target.size).index_copy(
            0, micro.tokens, state.model(micro)[1].logp
        )
    starts, counts = batch.token_starts, batch.row_tokens
    rows = iter([logp[s : s + n].numpy() for s, n in zip(starts, counts, strict=True)])
    return [with_logps(item, rows) for item in batch.items]


def with_logps(item: Item, rows: object) -> Item:
    assert hasattr(rows, "__next__")
    rollouts = tuple(
        msgspec.structs.replace(
            r, segments=(msgspec.structs.replace(r.segments[0], logps=np.array(next(rows))),)
        )
        for r in item.group.rollouts
    )
    return item._replace(group=msgspec.structs.replace(item.group, rollouts=rollouts))


def found(state: TrainState, items: list[Item]) -> dict[str, float]:
    agreement = train_step(state, items, config()).metrics["agreement"]
    assert isinstance(agreement, dict)
    return agreement


def test_an_engine_of_the_same_weights_agrees_to_rounding_and_nothing_is_said() -> None:
    state = a_state(config())
    agreement = found(state, sampled(state, 0))
    assert agreement["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert agreement["max"] < 1e-3
    assert agreement["outside"] == 0.0
    assert agreement["tokens"] > 100
    assert doubt(agreement) == ""


def test_an_engine_that_applies_another_temperature_is_told_with_the_likely_causes() -> None:
    state = a_state(config())
    agreement = found(state, sampled(state, 0, temperature=2.0))
    assert agreement["outside"] > 0.1
    assert agreement["max"] > 0.2
    words = doubt(agreement)
    assert "engine and learner disagree on the probability of" in words
    for cause in ("dtype", "temperature", "version", "tokenizer", "attention kernel"):
        assert cause in words
    assert "\n" not in words


def test_an_engine_that_serves_other_weights_than_it_says_is_told() -> None:
    state, other = a_state(config()), a_state(config())
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.3)
    assert doubt(found(state, sampled(other, 0))) != ""


def test_only_rollouts_wholly_of_this_version_are_compared() -> None:
    """Of an older version nothing is known; after a swap the cache holds older keys and values."""
    state = a_state(config())
    state.t = 3
    pure, old = sampled(state, 3), sampled(state, 2, temperature=2.0, seed=1)
    renamed = [
        Item(
            msgspec.structs.replace(item.ticket, id=item.ticket.id + 100),
            msgspec.structs.replace(item.group, ticket=item.ticket.id + 100),
        )
        for item in old
    ]
    tokens = sum(r.length for item in pure for r in item.group.rollouts)
    swapped = pure[0].group.rollouts[0]
    segment = make_segment([5, 6, 7], logps=[-9.0] * 3, spans=((0, 2), (1, 3)))
    rollouts = (msgspec.structs.replace(swapped, segments=(segment,)),)
    pure[0] = pure[0]._replace(
        group=msgspec.structs.replace(pure[0].group, rollouts=rollouts + pure[0].group.rollouts[1:])
    )
    agreement = found(state, [*pure, *renamed])
    assert agreement["tokens"] == tokens - swapped.length
    assert agreement["max"] < 1e-3


def test_a_batch_without_such_tokens_says_nothing() -> None:
    state = a_state(config())
    state.t = 2
    assert "agreement" not in train_step(state, a_batch(version=1), config()).metrics


def test_it_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    state = a_state(config(realised_every=0))
    items = sampled(state, 0)
    forward, passes = type(state.model).forward, []

    def counted(*given: object) -> object:
        passes.append(1)
        return forward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(type(state.model), "forward", counted)
    assert "agreement" in train_step(state, items, config(realised_every=0)).metrics
    assert len(passes) == 1


def test_a_word_is_said_once_in_a_while_and_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    bad = {"ratio": 1.2, "outside": 0.3, "max": 2.0, "tokens": 500.0}
    watch = Doubt()
    for t in range(1, 2 * SILENCE):
        watch.look(t, {"agreement": dict(bad)})
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert caplog.records[0].message.startswith("step 1: engine and learner disagree")
    watch.look(200, {})
    assert watch.words, "a step that had nothing to compare says nothing about it"
    watch.look(201, {"agreement": {"ratio": 1.0, "outside": 0.0, "max": 0.0, "tokens": 500.0}})
    assert watch.words == ""


def test_a_handful_of_tokens_is_no_evidence() -> None:
    assert doubt({"ratio": 1.2, "outside": 0.3, "max": 2.0, "tokens": 8.0}) == ""
