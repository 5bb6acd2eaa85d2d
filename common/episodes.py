"""What makes an episode longer than one answer, as a ticket says it; every default is left out.

    feedback    verify ─▶ say what is wrong ─▶ answer again, up to `turns` times
                arXiv 2506.11930
    intervene   look at a finished answer, put a hint where it goes wrong, let the policy go on
                arXiv 2510.04204

The learner renders everything that it can: token ids of fixed texts and of what stands around those
that somebody else writes. Turns are counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

SOLVED = 1.0  # raw correctness from which on an answer is right and its episode ends
WARMEST = 1.5
HINT_SHARE = 0.026  # hint tokens may be so large a share of the sampled ones (arXiv 2510.04204)


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    pass


class Voice(_Part, frozen=True, kw_only=True):
    """Somebody outside of the policy who is asked about an answer, with a deadline."""

    place: (
        str  # python:MODULE:FUNCTION, or the address of an OpenAI-compatible endpoint, http(s)://…
    )
    model: str = ""  # which of the endpoint's models
    key: str = ""  # the environment variable of the actor that holds the endpoint's key
    seconds: float = 10.0


class Feedback(_Part, frozen=True, kw_only=True):
    """Turns after a wrong answer. An answer that lacks its stop token gets `end` first; then come
    the tokens of `wrong`, or `open`, the words of the voice, `close`.
    """

    turns: int
    wrong: tuple[int, ...]
    end: tuple[int, ...] = ()
    open: tuple[int, ...] = ()
    close: tuple[int, ...] = ()
    voice: Voice | None = None
    words: int = 64  # tokens of the voice's words; what is beyond is cut
    temperatures: tuple[float, ...] = ()  # by turn; none: the ticket's at every turn
    tries: int = 1  # answers drawn from the second turn on, one not given before is taken
    train_tried: bool = False  # whether turns with several tries are trained on
    gamma: float = 1.0  # a right answer at turn k is worth gamma^k
    seconds: float = 120.0  # of the whole episode; then it is abandoned


class Intervene(_Part, frozen=True, kw_only=True):
    """Hints in finished answers; what comes of it is nobody's baseline."""

    triggers: tuple[str, ...] = ()
    hint: tuple[int, ...] = ()  # what the triggers put in
    ngram: int = 8  # repeat: so many tokens …
    times: int = 3  # … for so many times
    long: int = 0  # long: an answer of more tokens
    judge: Voice | None = None
    cut: bool = False  # take the flawed step out, where the judge shows one
    rounds: int = 3
    hint_tokens: int = 64
    share: float = HINT_SHARE
    seconds: float = 120.0  # of all rounds of one answer; then it stays as it is


class Episode(_Part, frozen=True, kw_only=True):
    feedback: Feedback | None = None
    intervene: Intervene | None = None

    @property
    def turns(self) -> int:
        return 1 if self.feedback is None else self.feedback.turns

    @property
    def gamma(self) -> float:
        return 1.0 if self.feedback is None else self.feedback.gamma

    @property
    def hints(self) -> int:
        """Hints that one answer may get."""
        return 0 if self.intervene is None else self.intervene.rounds


PLAIN = Episode()


def progressive(turn: int, step: float = 0.15, floor: float = 0.0) -> float:
    """Temperature of a turn: min(step · turn, 1.5), at least `floor` (arXiv 2506.11930; sampled
    tokens have no log-probability at temperature 0, so training needs a floor)."""
    return max(floor, min(step * turn, WARMEST))


def accuracy_by_turn(solved_at: Sequence[int | None], turns: int) -> list[float]:
    """Share of the episodes solved at turn k or before, k = 0 … turns - 1; None: never solved."""
    n = max(1, len(solved_at))
    return [sum(at is not None and at <= k for at in solved_at) / n for k in range(turns)]
