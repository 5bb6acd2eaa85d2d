"""Noise is a pure function of (seed, rollout, position); draws follow the distribution they are
given."""

import numpy as np
import pytest
import torch

from actor.engine import noise
from actor.engine.draw import draw


def test_a_uniform_depends_on_its_own_seed_rollout_and_position_only() -> None:
    keys = noise.keys(7, np.arange(10))
    table = noise.uniform(keys[:, None], np.arange(50))
    alone = noise.uniform(noise.keys(7, np.array([6])), np.array([33]))
    assert table[6, 33] == alone[0]
    assert len(np.unique(table)) == table.size
    assert not np.isin(
        noise.uniform(noise.keys(8, np.arange(10))[:, None], np.arange(50)), table
    ).any()


def test_the_noise_of_a_run_is_fixed_for_ever() -> None:
    """Other numbers here mean that a seed no longer names the samples it named."""
    values = noise.uniform(noise.keys(123, np.array([0, 1])), np.array([0, 5]))
    assert values.tolist() == [0.9196398213055459, 0.20430236790723777]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= noise.uniform(noise.keys(seed, np.array([0])), np.array([0]))[0] < 1


def test_uniforms_are_uniform_and_unrelated_between_neighbours() -> None:
    table = noise.uniform(noise.keys(3, np.arange(400))[:, None], np.arange(400))
    counts = np.histogram(table, 64, (0, 1))[0]
    expected = table.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 degrees: p about 2e-4
    for other in (np.roll(table, 1, 0), np.roll(table, 1, 1)):
        assert abs(np.corrcoef(table.ravel(), other.ravel())[0, 1]) < 0.01


def test_seeds_that_follow_one_another_do_not_share_rollouts() -> None:
    keys = np.concatenate([noise.keys(seed, np.arange(64)) for seed in range(64)])
    assert len(np.unique(keys)) == keys.size


@pytest.mark.parametrize("vocab", [32, 5000, 4097, 10240])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_log_probability_is_that_of_the_tempered_softmax(
    vocab: int, temperature: float
) -> None:
    logits = torch.randn(16, vocab, generator=torch.Generator().manual_seed(0)) * 4
    uniform = torch.linspace(0, 1 - 2**-52, 16, dtype=torch.float64)
    tokens, logps = draw(logits, torch.full((16,), temperature), uniform)
    expected = torch.log_softmax(logits / temperature, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("vocab", [32, 5000, 4609])
def test_a_token_is_drawn_as_often_as_its_tempered_probability_says(vocab: int) -> None:
    """Evenly spread uniforms visit every token within one count of its share."""
    N = 4000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 2
    uniform = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    tokens, _ = draw(logits.expand(N, -1), torch.full((N,), 0.7), uniform)
    counts = torch.bincount(tokens, minlength=vocab).double()
    share = torch.softmax(logits[0].double() / 0.7, -1)
    assert float((counts - N * share).abs().max()) <= 1.01
    assert bool((tokens.diff() >= 0).all())  # the inverse of a distribution function rises


@pytest.mark.parametrize("vocab", [32, 6000])
def test_a_token_without_probability_is_never_drawn(vocab: int) -> None:
    logits = torch.full((3, vocab), -torch.inf)
    logits[:, [5, vocab - 2]] = 0.0
    tokens, _ = draw(logits, None, torch.tensor([0.0, 0.5, 1 - 2**-52], dtype=torch.float64))
    assert tokens.tolist() == [5, vocab - 2, vocab - 2]
