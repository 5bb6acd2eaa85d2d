"""What is said is what is heard, whoever reads it; what lies is refused and named."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.codec import Codec
from common.errors import WireError
from common.group_check import check_group
from tests.builders import make_group, make_rollout, make_segment, make_ticket

ACTOR, LEARNER = Codec(wire.FromActor), Codec(wire.FromLearner)


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__struct_fields__"):
        return type(a) is type(b) and all(
            same(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__
        )
    return a == b


def test_every_message_of_an_actor_comes_back_as_it_went() -> None:
    messages = (
        wire.Hello(
            run="r",
            incarnation=2,
            protocol=1,
            digest="d",
            actor="a",
            capacity=3,
            held=(1,),
            owed=(2,),
        ),
        wire.Heartbeat(capacity=4, held=(7, 9), version=3, stats={"busy": 0.5}),
        make_group([1, 0, 1], run="r", incarnation=1),
        wire.Failure(ticket=3, attempt=1, blame="infra", reason="engine"),
        wire.Bye(held=(4,)),
    )
    for message in messages:
        assert same(message, ACTOR.decode(ACTOR.encode(message)))


def test_every_message_of_the_learner_comes_back_as_it_went() -> None:
    messages = (
        wire.Welcome(run="r", version=3, forget=(1, 2)),
        wire.Pulse(version=9),
        wire.Refused(reason="digest", ours="a", theirs="b"),
        wire.Grant(ticket=make_ticket(id=5), attempt=2),
        wire.Answer(ticket=5, verdict="refused", reason="nan"),
        wire.Drain(final=True),
    )
    for message in messages:
        assert same(message, LEARNER.decode(LEARNER.encode(message)))


def test_an_independent_msgpack_reads_a_group_without_our_code() -> None:
    group = make_group([1, 0], tokens=[[4, 5, 6], [7]])
    frame = bytes(ACTOR.encode(group))
    (length,) = struct.unpack_from("<I", frame)
    header = msgpack.unpackb(frame[4 : 4 + length])
    body = frame[(4 + length + 7) // 8 * 8 :]
    assert header["type"] == "group"
    tokens, logps = header["columns"]["tokens"], header["columns"]["logps"]
    read = struct.unpack_from(f"<{tokens['n']}i", body, tokens["o"])
    counts = [rollout["segments"][0]["tokens"] for rollout in header["rollouts"]]
    assert (tokens["d"], counts, read) == ("i4", [3, 1], (4, 5, 6, 7))
    assert logps["d"] == "f4"
    assert struct.unpack_from(f"<{logps['n']}f", body, logps["o"]) == (-1.0,) * 4


def test_an_independent_msgpack_can_write_a_message_that_we_read() -> None:
    header = msgpack.packb(
        {"type": "heartbeat", "run": "r", "capacity": 2, "held": [1], "from_the_future": 1}
    )
    heard = ACTOR.decode(struct.pack("<I", len(header)) + header)
    assert (heard.run, heard.capacity, heard.held) == ("r", 2, (1,))


def test_decoding_copies_no_array() -> None:
    frame = ACTOR.encode(make_group([1, 0]))
    tokens = ACTOR.decode(frame).rollouts[0].segments[0].tokens
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_wire_error(frame: bytes) -> None:
    try:
        message = ACTOR.decode(frame)
    except WireError:
        return
    assert isinstance(message, wire.Message)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_group_with_changed_bytes_gives_a_message_or_a_wire_error(data: st.DataObject) -> None:
    frame = bytearray(ACTOR.encode(make_group([1, 0, 0])))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    try:
        group = ACTOR.decode(frame[:cut])
        if isinstance(group, wire.Group):
            check_group(group, make_ticket(n=3), 32, 0)
    except WireError:
        pass


def test_an_oversized_message_is_refused_on_both_sides() -> None:
    small = Codec(wire.FromActor, max_bytes=300)
    with pytest.raises(WireError, match="oversized"):
        small.encode(make_group([1] * 8))
    with pytest.raises(WireError, match="oversized"):
        small.decode(ACTOR.encode(make_group([1] * 8)))


def test_an_honest_group_passes() -> None:
    check_group(make_group([1, 0], version=3), make_ticket(), 32, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 4},
        {"tokens": -1},
        {"tokens": "x"},
        {"tokens": None},
        {"logps": 2},
        {"logps": {"d": "f4", "o": 0, "n": 3}},
    ],
)
def test_counts_that_are_not_those_of_the_columns_are_malformed(change: dict[str, object]) -> None:
    header, body = taken_apart(make_group([1], tokens=[[4, 5, 6]]))
    header["rollouts"][0]["segments"][0] |= change
    with pytest.raises(WireError, match="malformed"):
        ACTOR.decode(put_together(header, body))


def test_a_group_whose_columns_are_missing_or_of_another_type_is_malformed() -> None:
    header, body = taken_apart(make_group([1], tokens=[[4, 5, 6]]))
    columns = header.pop("columns")
    swapped = {"tokens": columns["logps"], "logps": columns["tokens"]}
    others: tuple[dict[str, Any], ...] = ({}, {"columns": {}}, {"columns": swapped})
    for rest in others:
        with pytest.raises(WireError, match="malformed"):
            ACTOR.decode(put_together(header | rest, body))


def test_a_group_keeps_its_masks_beside_its_columns_and_can_be_sent_on() -> None:
    masked = make_segment(tokens=(4, 5, 6), mask=(1, 0, 1))
    rollouts = (make_rollout(segments=(make_segment(), masked)), make_rollout())
    group = make_group([1, 0], rollouts=rollouts)
    heard = ACTOR.decode(ACTOR.encode(ACTOR.decode(ACTOR.encode(group))))
    assert same(group, heard)
    assert heard.rollouts[0].segments[1].loss_mask.tolist() == [True, False, True]


def taken_apart(message: wire.Message) -> tuple[dict[str, Any], bytes]:
    frame = bytes(ACTOR.encode(message))
    (length,) = struct.unpack_from("<I", frame)
    return msgpack.unpackb(frame[4 : 4 + length]), frame[(4 + length + 7) // 8 * 8 :]


def put_together(header: dict[str, Any], body: bytes) -> bytes:
    packed = msgpack.packb(header)
    return struct.pack("<I", len(packed)) + packed + bytes(-(4 + len(packed)) % 8) + body


LIES = {
    "count": {"rollouts": (make_rollout(),)},
    "mismatch": {"problem": "another"},
    "vocabulary": {"tokens": [[5, 99], [6]]},
    "version": {"version": 4},
    "nan": {"rollouts": (make_rollout(logps=[-1, float("nan"), -1]), make_rollout())},
    "logprob": {"rollouts": (make_rollout(logps=[-1, 0.5, -1]), make_rollout())},
    "empty": {"rollouts": (wire.Rollout(segments=(), finish="stop", correct=1.0), make_rollout())},
    "spans": {
        "rollouts": (make_rollout(segments=(make_segment(spans=((1, 0),)),)), make_rollout())
    },
    "length": {"rollouts": (make_rollout(segments=(make_segment(logps=[-1.0]),)), make_rollout())},
    "temperature": {"rollouts": (make_rollout(temperature=0.0), make_rollout())},
    "parts": {
        "rollouts": (wire.msgspec.structs.replace(make_rollout(), parts=({},)), make_rollout())
    },
}


@pytest.mark.parametrize("reason", LIES)
def test_a_group_that_lies_is_refused_by_name(reason: str) -> None:
    group = make_group([1, 0], **LIES[reason])
    with pytest.raises(WireError) as caught:
        check_group(group, make_ticket(), 32, 3)
    assert caught.value.reason == reason


def test_a_correctness_that_is_no_number_is_refused() -> None:
    with pytest.raises(WireError, match="nan"):
        check_group(make_group([float("nan"), 0]), make_ticket(), 32, 0)
    with pytest.raises(WireError, match="nan"):
        check_group(make_group([1e308, 1e308]), make_ticket(), 32, 0)


def test_more_tokens_than_the_ticket_allows_are_refused() -> None:
    ticket = make_ticket(sampling=wire.Sampling(max_tokens=2))
    with pytest.raises(WireError, match="length"):
        check_group(make_group([1, 0]), ticket, 32, 0)
