"""What actors and the learner say to each other; codec.py makes bytes of it.

Fields at their default are left out and unknown ones are ignored, so fields can be added without a
new PROTOCOL number; a changed meaning needs one.

Facts only: a rollout says which tokens were sampled, with what log-probabilities, temperature and
weight versions, and how the parts of its reward came out. Advantages, weights and filters are the
learner's and never travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from common.episodes import Episode

PROTOCOL = 1

Kind = Literal["main", "aux", "eval", "propose", "score"]
Role = Literal["policy", "tool", "feedback", "hint"]
Finish = Literal["stop", "length", "aborted"]
Verdict = Literal["ack", "duplicate", "unknown", "refused"]

# Structs say gc=False: they hold facts and never cycles, and a learner keeps so many that looking
# through them again and again would take the garbage collector longer than decoding them.

I4, F4, U1 = np.dtype("<i4"), np.dtype("<f4"), np.dtype("u1")  # of all arrays
_set = msgspec.structs.force_setattr
_NONE = np.zeros(0)


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """How to sample. `seed` makes the noise; position and rollout number are mixed in by the
    engine.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_tokens: int = 64
    stop: tuple[int, ...] = ()
    seed: int = 0


class GradePart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One part of the reward: `grader` names the function, `options` its keyword arguments. The
    reward is the sum of weight × score; scores travel as they are.
    """

    name: str
    grader: str
    weight: float = 1.0
    options: dict[str, Any] = {}
    gated: bool = False  # counts only where the answer is right


class Grading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """How to grade a response. The first part is the raw correctness."""

    gold: str = ""
    parts: tuple[GradePart, ...] = ()
    columns: dict[str, Any] = {}


class Ticket(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request for one group: `n` rollouts of one prompt under one sampling policy."""

    id: int
    kind: Kind
    problem: str
    prompt: np.ndarray  # int32 [P]
    n: int
    sampling: Sampling
    grading: Grading
    template: str = ""
    source: str = ""
    parent: int | None = None  # the ticket whose prompt this one asks again, or was made from
    label: str = ""  # which evaluation an eval ticket belongs to
    min_version: int = 0
    cursor: int = -1  # position in the prompt stream; -1 for a prompt asked again
    episode: Episode | None = None  # what comes after the first answer; None: nothing
    question: str = ""  # the problem's own words, where others may be made from it

    def __post_init__(self) -> None:
        check_array("prompt", self.prompt, I4)


if TYPE_CHECKING:
    Column = np.ndarray
else:
    Column = Any  # the header's count, until the group that came with it has its arrays


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A run of tokens with one author. `logps` are behaviour log-probabilities after temperature, 0
    where not sampled.

    `spans` is run-length coded weight versions: (index of the first token, version), first index 0,
    rising. Without a `mask` every token of a policy segment is trained on, none of any other.
    """

    role: Role
    tokens: Column  # int32 [T]
    logps: Column  # float32 [T]
    spans: tuple[tuple[int, int], ...]
    temperature: float = 1.0
    turn: int = 0
    mask: np.ndarray | None = None  # uint8 [T]

    def __post_init__(self) -> None:
        tokens: Any = self.tokens
        if type(tokens) is not int:  # a count, until the group deals its arrays
            check_array("tokens", self.tokens, I4)
            check_array("logps", self.logps, F4)
        if self.mask is not None:
            check_array("mask", self.mask, U1)

    @property
    def loss_mask(self) -> np.ndarray:
        """Boolean [T]: the tokens to train on."""
        if self.mask is not None:
            return self.mask.astype(bool)
        return np.full(self.tokens.size, self.role == "policy")


class Rollout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One response: its segments, how it ended, how it was graded (`parts`: one map a turn)."""

    segments: tuple[Segment, ...]
    finish: Finish
    correct: float
    parts: tuple[dict[str, float], ...] = ()
    error: str = ""  # why the grader gave no verdict; then `correct` means nothing
    timings: dict[str, float] = {}
    flaws: tuple[str, ...] = ()  # why each hint was given …
    clean: bool = True  # … and whether nothing was found any more after the last one
    events: dict[str, int] = {}  # what happened on the way, by name: feedback_slow, no_room, …

    @property
    def length(self) -> int:
        """Number of trainable (policy) tokens."""
        return sum(int(s.loss_mask.sum()) for s in self.segments)

    @property
    def turn(self) -> int:
        """Number of its last turn, from 0."""
        return self.segments[-1].turn if self.segments else 0

    @property
    def oldest_version(self) -> int:
        return min([v for s in self.segments for _, v in s.spans])


# ---- actor → learner -----------------------------------------------------------------------------


class Message(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag_field="type"
):
    """Every message says which run, and which life of its learner, it speaks to."""

    run: str = ""
    incarnation: int = 0


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First message of a connection. `held` tickets are still being worked on, `owed` results await
    their verdict.
    """

    protocol: int
    digest: str  # of the shared [run] section
    actor: str
    capacity: int  # tickets it can hold at once
    held: tuple[int, ...] = ()
    owed: tuple[int, ...] = ()
    pid: int = 0
    host: str = ""
    engine: str = ""
    revision: str = ""


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Renews the leases of `held`, updates `capacity`, and says how the engine is doing: numbers,
    and in `notes` words for people. Nothing decides by either.
    """

    capacity: int
    held: tuple[int, ...] = ()
    version: int = -1
    stats: dict[str, float] = {}
    notes: dict[str, str] = {}


class Columns:
    """The arrays of all segments of a group that was received: int32 and float32. Those of a group
    that was made here are with its segments only, and this is empty.
    """

    __slots__ = ("logps", "received", "rollouts", "tokens")

    def __init__(self, tokens: np.ndarray = _NONE, logps: np.ndarray = _NONE) -> None:
        self.tokens, self.logps = tokens, logps
        self.received = tokens is not _NONE
        self.rollouts: tuple[Rollout, ...] = ()  # whose segments have these arrays

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Columns)  # equal segments have equal arrays, wherever they stand

    __hash__ = None  # type: ignore[assignment]

    def deal(self, rollouts: tuple[Rollout, ...], hinted: tuple[Rollout, ...] = ()) -> None:
        """Give every segment its part. Raises ValueError when they do not add up."""
        tokens, logps, i, j = self.tokens, self.logps, 0, 0
        for rollout in (*rollouts, *hinted):
            for segment in rollout.segments:
                m: Any = segment.tokens  # on the wire a segment says only how many are its
                n: Any = segment.logps
                if type(m) is not int or type(n) is not int or m < 0 or n < 0:
                    raise ValueError("the tokens and logps of a segment are counts")
                _set(segment, "tokens", tokens[i : i + m])
                _set(segment, "logps", logps[j : j + n])
                i, j = i + m, j + n
        if (i, j) != (tokens.size, logps.size):
            raise ValueError(f"segments of {i}, {j} in columns of {tokens.size}, {logps.size}")
        self.rollouts = rollouts


class Group(Message, frozen=True, kw_only=True, tag="group"):
    """A finished ticket."""

    ticket: int
    attempt: int
    kind: Kind
    problem: str
    rollouts: tuple[Rollout, ...]
    template: str = ""
    source: str = ""
    actor: str = ""
    timings: dict[str, float] = {}
    hinted: tuple[Rollout, ...] = ()  # beside them, with hints in: never part of a baseline
    columns: Columns = msgspec.field(default_factory=Columns)  # last: encoded after the segments

    def __post_init__(self) -> None:
        if self.columns.received and not self.columns.rollouts:
            self.columns.deal(self.rollouts, self.hinted)
        elif any(isinstance(s.tokens, int) for r in self.all for s in r.segments):
            raise ValueError("a group without columns")

    @property
    def all(self) -> tuple[Rollout, ...]:
        """Every rollout, in the order of the columns."""
        return (*self.rollouts, *self.hinted) if self.hinted else self.rollouts


class Failure(Message, frozen=True, kw_only=True, tag="failure"):
    """This attempt at the ticket failed. `blame` chooses the budget: `infra` (engine), `data`
    (prompt, verifier) or `none` (given back untouched: drain, min_version not reached in time)."""

    ticket: int
    attempt: int
    blame: Literal["infra", "data", "none"]
    reason: str


class Bye(Message, frozen=True, kw_only=True, tag="bye"):
    """The actor leaves; whatever it still holds may be leased to others at once."""

    held: tuple[int, ...] = ()


# ---- learner → actor -----------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    heartbeat_s: float = 1.0
    lease_s: float = 30.0
    version: int = -1  # newest published, -1 before the first
    forget: tuple[int, ...] = ()  # held tickets that nobody waits for any more


class Pulse(Message, frozen=True, kw_only=True, tag="pulse"):
    """Answers a heartbeat: the learner lives, and `version` is the newest published (a hint; Redis
    is the truth).
    """

    version: int = -1


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """The connection is not accepted; `ours` and `theirs` are the two values that disagree."""

    reason: str
    ours: str = ""
    theirs: str = ""


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    """A ticket leased to this actor as its `attempt`-th attempt."""

    ticket: Ticket
    attempt: int


class Answer(Message, frozen=True, kw_only=True, tag="answer"):
    """The verdict on one result, and on those of the tickets in `also`; whichever it is, the actor
    frees its copies.
    """

    ticket: int
    verdict: Verdict
    reason: str = ""
    also: tuple[int, ...] = ()


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Finish nothing new, hand back what is held, deliver what is owed, leave. `final`: the run is
    over.
    """

    final: bool = False


FromActor = Hello | Heartbeat | Group | Failure | Bye
FromLearner = Welcome | Pulse | Refused | Grant | Answer | Drain


def check_array(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be an array, not {type(array).__name__}")
    if (array.dtype is not dtype and array.dtype != dtype) or array.ndim != 1:
        raise ValueError(f"{name} must be a 1-D {dtype} array, not {array.ndim}-D {array.dtype}")
