"""What actors and the learner say to each other, and how it becomes bytes.

One message is one ZeroMQ frame, and the journal keeps groups in the very bytes that arrived:

    u32 header length · MessagePack header (maps) · zeros up to a multiple of 8 · raw little-endian
    arrays, 8-aligned

In the header an array stands as a map `{"d": dtype, "o": byte offset into the array part, "n":
number of elements}` with dtype one of `i4`, `f4`, `u1`; decoding makes read-only views, it copies
nothing. A group has many segments, and one array for the tokens of all of them and one for their
log-probabilities, rollout by rollout: these stand in its `columns`, and a segment's `tokens` and
`logps` are their numbers of elements. Everything else is ordinary MessagePack with string keys: any
language can write an actor.
Fields at their default are left out and unknown ones are ignored, so fields can be added without a
new PROTOCOL number; a changed meaning needs one.

Facts only: a rollout says which tokens were sampled, with what log-probabilities, temperature and
weight versions, and how the parts of its reward came out. Advantages, weights and filters are the
learner's and never travel.
"""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec
import numpy as np

from common.errors import WireError

PROTOCOL = 1
MAX_FRAME_BYTES = 64 << 20

Kind = Literal["main", "aux", "eval", "propose", "score"]
Role = Literal["policy", "tool", "feedback", "hint"]
Finish = Literal["stop", "length", "aborted"]
Verdict = Literal["ack", "duplicate", "unknown", "refused"]

# Structs say gc=False: they hold facts and never cycles, and a learner keeps so many that looking
# through them again and again would take the garbage collector longer than decoding them.

_I4, _F4, _U1 = np.dtype("<i4"), np.dtype("<f4"), np.dtype("u1")
_DTYPES: dict[str, np.dtype[Any]] = {"i4": _I4, "f4": _F4, "u1": _U1}
_set = msgspec.structs.force_setattr
_NONE = np.zeros(0)
_PADDING = [bytes(n) for n in range(8)]
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


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

    def __post_init__(self) -> None:
        _check_array("prompt", self.prompt, _I4)


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
            _check_array("tokens", self.tokens, _I4)
            _check_array("logps", self.logps, _F4)
        if self.mask is not None:
            _check_array("mask", self.mask, _U1)

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

    @property
    def length(self) -> int:
        """Number of trainable (policy) tokens."""
        return sum(int(s.loss_mask.sum()) for s in self.segments)

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

    def deal(self, rollouts: tuple[Rollout, ...]) -> None:
        """Give every segment its part. Raises ValueError when they do not add up."""
        tokens, logps, i, j = self.tokens, self.logps, 0, 0
        for rollout in rollouts:
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
    columns: Columns = msgspec.field(default_factory=Columns)  # last: encoded after the segments

    def __post_init__(self) -> None:
        if self.columns.received and not self.columns.rollouts:
            self.columns.deal(self.rollouts)
        elif any(isinstance(s.tokens, int) for r in self.rollouts for s in r.segments):
            raise ValueError("a group without columns")


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


class Codec:
    """Encodes and decodes one union of structs. Not thread-safe: one codec a thread.

    `decode` raises WireError(`malformed` | `oversized`) and nothing else, whatever the bytes are.
    """

    _HEADER: ClassVar[struct.Struct] = struct.Struct("<I")

    def __init__(self, union: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._reference)
        self._decoder = msgspec.msgpack.Decoder(union, dec_hook=self._read)
        self._arrays: list[Any] = []  # and the padding between them
        self._columns: dict[np.dtype[Any], list[np.ndarray]] | None = None  # of a group
        self._offset = 0
        self._body = memoryview(b"")
        self._views: dict[str, np.ndarray] = {}  # the body of the moment as one array, by dtype

    def encode(self, message: msgspec.Struct) -> bytearray:
        self._arrays, self._offset = [], 0
        self._columns = {_I4: [], _F4: []} if isinstance(message, Group) else None
        header = self._encoder.encode(message)
        lead = self._HEADER.size + len(header)
        frame = bytearray().join(
            (self._HEADER.pack(len(header)), header, _PADDING[-lead % 8], *self._arrays)
        )
        if len(frame) > self.max_bytes:
            raise WireError(
                "oversized",
                f"a message of {len(frame)} bytes; at most {self.max_bytes} are allowed",
            )
        return frame

    def decode(self, frame: bytes | bytearray | memoryview) -> Any:
        view = memoryview(frame).cast("B").toreadonly()
        if view.nbytes > self.max_bytes:
            raise WireError(
                "oversized", f"{view.nbytes} bytes; at most {self.max_bytes} are allowed"
            )
        if view.nbytes < 4:
            raise WireError("malformed", f"{view.nbytes} bytes are no message")
        (length,) = self._HEADER.unpack_from(view)
        if 4 + length > view.nbytes:
            raise WireError("malformed", f"header of {length} bytes in a frame of {view.nbytes}")
        self._body = view[_aligned(4 + length) :]
        try:
            return self._decoder.decode(view[4 : 4 + length])
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise WireError("malformed", str(error)) from None
        finally:
            self._body = memoryview(b"")
            self._views.clear()

    def _reference(self, value: Any) -> Any:
        if isinstance(value, Columns):
            assert self._columns is not None, "only a group has columns"
            tokens, logps = self._columns[_I4], self._columns[_F4]
            return {"tokens": self._lay(_I4, tokens), "logps": self._lay(_F4, logps)}
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} cannot be sent")
        whole = value if value.flags.c_contiguous else np.ascontiguousarray(value)
        if self._columns is not None and whole.dtype in self._columns:
            self._columns[whole.dtype].append(whole)
            return whole.size
        return self._lay(whole.dtype, [whole])

    def _lay(self, dtype: np.dtype[Any], pieces: list[np.ndarray]) -> dict[str, Any]:
        """Put the pieces of one array into the body; its reference."""
        size = sum([piece.size for piece in pieces])
        reference = {"d": _CODES[dtype], "o": self._offset, "n": size}
        padding = -size * dtype.itemsize % 8
        self._arrays += pieces
        self._arrays.append(_PADDING[padding])
        self._offset += size * dtype.itemsize + padding
        return reference

    def _read(self, kind: type, value: Any) -> np.ndarray | Columns:
        if not isinstance(value, dict):
            raise ValueError(f"expected an array reference, got {type(value).__name__}")
        if kind is Columns:
            tokens, logps = self._view(value.get("tokens")), self._view(value.get("logps"))
            _check_array("tokens", tokens, _I4)
            _check_array("logps", logps, _F4)
            return Columns(tokens, logps)
        return self._view(value)

    def _view(self, value: Any) -> np.ndarray:
        if not isinstance(value, dict):
            raise ValueError(f"expected an array reference, got {type(value).__name__}")
        code, offset, count = value.get("d"), value.get("o"), value.get("n")
        if code not in _DTYPES or type(offset) is not int or type(count) is not int:
            raise ValueError("bad array reference")
        whole = self._views.get(code)
        if whole is None:
            whole = self._views[code] = self._whole(_DTYPES[code])
        first = offset // whole.itemsize
        if offset % 8 or offset < 0 or count < 0 or first + count > whole.size:
            raise ValueError(
                f"array [{offset}, +{count} {code}] outside a body of {self._body.nbytes} bytes"
            )
        return whole[first : first + count]

    def _whole(self, dtype: np.dtype[Any]) -> np.ndarray:
        return np.frombuffer(self._body, dtype, self._body.nbytes // dtype.itemsize)


def check_group(group: Group, ticket: Ticket, vocab_size: int, clock_version: int) -> None:
    """Refuse a group that lies: raises WireError with a reason word.

    `clock_version` is the newest version ever announced; a token from a later one is a lie.
    """
    if (group.kind, group.problem) != (ticket.kind, ticket.problem):
        raise WireError("mismatch", f"ticket {ticket.id} asks {ticket.kind} {ticket.problem!r}")
    if len(group.rollouts) != ticket.n:
        raise WireError("count", f"{len(group.rollouts)} rollouts for a ticket of {ticket.n}")
    segments = [segment for rollout in group.rollouts for segment in rollout.segments]
    for rollout in group.rollouts:
        _check_length(rollout.segments, ticket.sampling.max_tokens)
    _check_rewards(group.rollouts)
    _check_spans(segments, clock_version)
    columns = group.columns
    if columns.rollouts is not group.rollouts:  # it was made here, not received
        columns = Columns(
            np.concatenate([segment.tokens for segment in segments]),
            np.concatenate([segment.logps for segment in segments]),
        )
    _check_tokens(columns.tokens, vocab_size)
    _check_logps(columns.logps)


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    most = np.maximum.reduce(tokens.view(np.uint32), initial=0)  # below 0 is far above as unsigned
    if most >= vocab_size:
        raise WireError("vocabulary", f"a token outside [0, {vocab_size})")


def _check_logps(logps: np.ndarray) -> None:
    most = np.maximum.reduce(logps, initial=-1.0)  # NaN wins both
    least = np.minimum.reduce(logps, initial=-1.0)
    if not math.isfinite(least) or not math.isfinite(most):
        raise WireError("nan", "a log-probability is not finite")
    if most > 1e-3:
        raise WireError("logprob", "a log-probability above 0")


def _check_rewards(rollouts: tuple[Rollout, ...]) -> None:
    graded = [rollout for rollout in rollouts if not rollout.error]
    numbers = [value for r in graded for part in r.parts for value in part.values()]
    if not all(map(math.isfinite, [*numbers, *[rollout.correct for rollout in graded]])):
        raise WireError("nan", "a part of the reward is not a number")


def _check_length(segments: tuple[Segment, ...], max_tokens: int) -> None:
    """Of one rollout: arrays of one size, no more sampled tokens than its turns may have."""
    if not segments:
        raise WireError("empty", "a rollout without a segment")
    sampled, turns = 0, 1
    for segment in segments:
        size, mask = segment.tokens.size, segment.mask
        if segment.logps.size != size or (mask is not None and mask.size != size):
            masked = size if mask is None else mask.size
            sizes = f"{size} tokens, {segment.logps.size} log-probs, mask of {masked}"
            raise WireError("length", sizes)
        if not 0 < segment.temperature < math.inf:
            raise WireError("temperature", f"{segment.temperature}")
        if segment.role == "policy":
            sampled += size
        if segment.turn >= turns:
            turns = segment.turn + 1
    if sampled > max_tokens * turns:
        raise WireError("length", f"{sampled} sampled tokens; the ticket allows {max_tokens}")


def _check_spans(segments: list[Segment], clock_version: int) -> None:
    """First token 0, rising, inside the segment; versions between 0 and the newest."""
    for segment in segments:
        spans = segment.spans
        if not spans or spans[0][0] != 0 or (len(spans) > 1 and not _rise(segment)):
            raise WireError("spans", f"version spans {spans} of {segment.tokens.size} tokens")
    versions = [version for segment in segments for _, version in segment.spans]
    if min(versions) < 0 or max(versions) > clock_version:
        raise WireError("version", f"{max(versions)}; the newest version is {clock_version}")


def _rise(segment: Segment) -> bool:
    firsts = [first for first, _ in segment.spans]
    return firsts[-1] < segment.tokens.size and all(a < b for a, b in pairwise(firsts))


def _check_array(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be an array, not {type(array).__name__}")
    if (array.dtype is not dtype and array.dtype != dtype) or array.ndim != 1:
        raise ValueError(f"{name} must be a 1-D {dtype} array, not {array.ndim}-D {array.dtype}")


def _aligned(offset: int) -> int:
    return (offset + 7) & ~7
