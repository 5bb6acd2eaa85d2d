"""Sampling noise as a pure function of (seed, rollout, position): no state, no neighbours.

The counter-based generator is SplitMix64's finaliser (Steele, Lea, Flood 2014) over keys that are
themselves hashed, so neighbouring seeds, rollouts and positions are unrelated. 52 bits are kept: a
uniform u times any float64 total stays strictly below that total, which the inverse CDF relies on.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of uint64 [...]."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def keys(seed: int, rollouts: np.ndarray) -> np.ndarray:
    """uint64 [R]: one key a rollout number, under any integer `seed`."""
    base = mix(np.array([seed & _MASK], np.uint64) + _GOLDEN)
    return mix(base + _GOLDEN * (rollouts.astype(np.uint64) + np.uint64(1)))


def uniform(key: np.ndarray, position: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of each (key uint64, position int64), broadcast."""
    bits = mix(key + _GOLDEN * (position.astype(np.uint64) + np.uint64(1)))
    return np.asarray((bits >> np.uint64(12)) * 2.0**-52)
