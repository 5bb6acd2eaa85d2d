"""The built-in task: short sums with an exact answer.

Every problem is a pure function of (seed, split, index), so a stream of prompts needs no file,
no state and no random generator: to resume is to remember an index. Training and held-out
problems cannot meet, because a hash of the summands, not the draw, decides the split.

`Problem(text="12+7+30?", answer="49")` is what the policy is asked and graded by;
`worked(problem)` is the same sum written as steps, for supervised data.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate
from typing import Literal

import msgspec

Split = Literal["train", "heldout"]

MAX_SUMMAND = 49
HELDOUT_OF_256 = 32  # one multiset of summands in eight is held out


class Problem(msgspec.Struct, frozen=True):
    """One sum to solve.

    Example: `Problem(id="train/0/5", text="12+7+30?", answer="49")`
    """

    id: str
    text: str
    answer: str


def is_right(text: str, answer: str) -> bool:
    """Whether what `text` says behind its last # is `answer`: what the grader `exact` is told to
    ask (`after = "#"`), for scripts that have no actor.
    """
    _, mark, said = text.rpartition("#")
    return mark == "#" and said.strip() == answer


def draw(seed: int, index: int, split: Split) -> Problem:
    """Problem number `index` of the endless stream (`seed`, `split`); the same on any machine."""
    attempt = 0
    while True:
        summands = _candidate(f"{seed}/{split}/{index}/{attempt}")
        if split_of(summands) == split:
            return _problem(f"{split}/{seed}/{index}", summands)
        attempt += 1


def split_of(summands: tuple[int, ...]) -> Split:
    """The side a sum is on; its reorderings are on the same side."""
    canonical = "+".join(map(str, sorted(summands)))
    digest = hashlib.blake2b(canonical.encode(), digest_size=1, key=b"arithmetic split").digest()
    return "heldout" if digest[0] < HELDOUT_OF_256 else "train"


def summands_of(problem: Problem) -> tuple[int, ...]:
    """`12+7+30?` as (12, 7, 30)."""
    return tuple(int(summand) for summand in problem.text.rstrip("?").split("+"))


def worked(problem: Problem) -> str:
    """The correct answer in steps: `12+7=19,19+30=49#49`."""
    return written(summands_of(problem), tuple(accumulate(summands_of(problem))))


def written(summands: tuple[int, ...], partial_sums: tuple[int, ...]) -> str:
    """Steps with the given partial sums, right or wrong; the last one is the answer.

    `partial_sums[0]` is the first summand: there is one step fewer than there are summands.
    """
    steps = (
        f"{before}+{summand}={after}"
        for before, summand, after in zip(
            partial_sums[:-1], summands[1:], partial_sums[1:], strict=True
        )
    )
    return f"{','.join(steps)}#{partial_sums[-1]}"


def _candidate(counter: str) -> tuple[int, ...]:
    """Three or four summands from 1 to 49, from a hash of the counter.

    16 bits a summand: the bias of the remainder is below 0.1 %.
    """
    digest = hashlib.blake2b(counter.encode(), digest_size=10).digest()
    num_summands = 3 + digest[0] % 2
    return tuple(
        1 + int.from_bytes(digest[2 * i + 2 : 2 * i + 4], "big") % MAX_SUMMAND
        for i in range(num_summands)
    )


def _problem(identity: str, summands: tuple[int, ...]) -> Problem:
    return Problem(identity, "+".join(map(str, summands)) + "?", str(sum(summands)))
