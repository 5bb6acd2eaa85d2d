"""Several sources in one stream, each with its share of the draws.

Draws come in blocks of a thousand: every block has each source as often as its weight says, in an
order of its own. So the draw index alone says which source a draw is from and which of that
source's problems it is, and each source goes through its own problems one by one.

Held-out problems come in the same shares, each source's own, until a source has no more. Files of
one mixture hold out for one another: a question that one of them holds out is trained on from none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations

import numpy as np

from common.errors import DataError
from learner.prompts.config import MixedSource
from learner.prompts.dataset import Dataset
from learner.prompts.source import Problem, Source

BLOCK = 1_000


class Mixture:
    """Raises DataError when two sources have one name."""

    name = "mixture"
    rows = None

    def __init__(self, leaves: Sequence[Source], shares: Sequence[MixedSource], seed: int) -> None:
        self.leaves = tuple(leaves)
        self.names = tuple(s.name or leaf.name for s, leaf in zip(shares, leaves, strict=True))
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"two of learner.prompts.sources are called {twice!r}: give each a name of its own"
            )
        self._renamed = [bool(share.name) for share in shares]
        self._seed = seed
        self._quotas = quotas([share.weight for share in shares])
        self._heldout: list[Problem] = []
        self._asked = [0] * len(self.leaves)  # held-out problems taken from each
        self._ended: set[int] = set()
        _hold_out_for_one_another(self.leaves, self.names)

    def place(self, index: int) -> tuple[int, int]:
        """(which source, which of its problems) draw `index` is."""
        block, position = divmod(index, BLOCK)
        order, rank = _block(self._seed, block, self._quotas)
        leaf = int(order[position])
        return leaf, block * self._quotas[leaf] + int(rank[position])

    def train(self, index: int) -> Problem:
        leaf, number = self.place(index)
        return self.marked(leaf, self.leaves[leaf].train(number))

    def heldout(self, index: int) -> Problem | None:
        while len(self._heldout) <= index and len(self._ended) < len(self.leaves):
            self._find_heldout()
        return self._heldout[index] if index < len(self._heldout) else None

    def marked(self, leaf: int, problem: Problem) -> Problem:
        """`problem` with the name of its source."""
        name = self.names[leaf]
        id_ = f"{name}/{problem.id}" if self._renamed[leaf] else problem.id
        return problem._replace(id=id_, source=name, number=leaf)

    def _find_heldout(self) -> None:
        """One more, of the source that is furthest behind its share."""
        open_ = [leaf for leaf in range(len(self.leaves)) if leaf not in self._ended]
        leaf = min(open_, key=lambda leaf: ((self._asked[leaf] + 1) / self._quotas[leaf], leaf))
        problem = self.leaves[leaf].heldout(self._asked[leaf])
        if problem is None:
            self._ended.add(leaf)
            return
        self._asked[leaf] += 1
        self._heldout.append(self.marked(leaf, problem))


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """How many draws of a block each source has, at least one: largest remainders."""
    exact = np.array(weights, np.float64) * BLOCK / sum(weights)
    whole = np.maximum(1, np.floor(exact)).astype(int)
    while whole.sum() != BLOCK:
        missing = 1 if whole.sum() < BLOCK else -1
        able = np.where((whole > 1) | (missing > 0), missing * (exact - whole), -np.inf)
        whole[int(able.argmax())] += missing
    return tuple(int(n) for n in whole)


@lru_cache(maxsize=4)
def _block(seed: int, block: int, quota: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [BLOCK] each: the source of every draw, and how many draws before it are its own."""
    draw = np.random.Generator(np.random.PCG64([seed, block, BLOCK]))
    order = draw.permutation(np.repeat(np.arange(len(quota)), quota))
    rank = np.zeros(BLOCK, np.int64)
    for leaf, count in enumerate(quota):
        rank[order == leaf] = np.arange(count)
    return order, rank


def _hold_out_for_one_another(leaves: Sequence[Source], names: Sequence[str]) -> None:
    named = zip(leaves, names, strict=True)
    files = [(leaf, name) for leaf, name in named if isinstance(leaf, Dataset)]
    for (leaf, _), (other, name) in permutations(files, 2):
        leaf.leave_out(other.heldout_digests, name)
