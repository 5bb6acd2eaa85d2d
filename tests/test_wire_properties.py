"""Every struct that travels or is journaled, with anything in it, comes back as it went."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from common import blobs, episodes, records, versions, wire
from common.codec import Codec
from common.wire import Columns

LARGEST = 2**62
text = st.text(max_size=8)
numbers = st.one_of(st.floats(allow_nan=False, width=32), st.just(math.inf))


def arrays(dtype: str) -> st.SearchStrategy[np.ndarray]:
    values = {
        "<i4": st.integers(-(2**31), 2**31 - 1),
        "<f4": st.floats(width=32, allow_nan=False),
        "u1": st.integers(0, 255),
    }[dtype]
    return st.lists(values, max_size=5).map(lambda found: np.array(found, dtype))


ARRAYS = {"prompt": "<i4", "tokens": "<i4", "logps": "<f4", "mask": "u1"}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-LARGEST, LARGEST) | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def of(kind: Any, field: str = "") -> st.SearchStrategy[Any]:
    """Values of a type as msgspec describes it."""
    match kind:
        case inspect.StructType(cls=cls):
            return struct(cls)
        case inspect.UnionType(types=types):
            return st.one_of(*(of(each, field) for each in types))
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return st.lists(of(item), max_size=3).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(of, items))
        case inspect.DictType(value_type=value):
            return st.dictionaries(text, of(value), max_size=3)
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.CustomType(cls=cls) if cls is Columns:
            return st.builds(Columns)
        case inspect.IntType():
            return st.integers(-LARGEST, LARGEST)
        case inspect.CustomType():
            return arrays(ARRAYS[field])
        case inspect.AnyType():
            return arrays(ARRAYS[field]) if field in ARRAYS else ANYTHING
    simple: dict[type, st.SearchStrategy[Any]] = {
        inspect.FloatType: numbers,
        inspect.StrType: text,
        inspect.BoolType: st.booleans(),
        inspect.NoneType: st.none(),
        inspect.BytesType: st.binary(max_size=8),
    }
    return simple[type(kind)]


def struct(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    described = inspect.type_info(cls)
    assert isinstance(described, inspect.StructType)
    return st.builds(cls, **{f.name: of(f.type, f.name) for f in described.fields})


ACTOR, LEARNER = get_args(wire.FromActor), get_args(wire.FromLearner)
RECORDS = get_args(records.AnyRecord)
STORED = (blobs.Ask, blobs.Part, versions.Manifest)  # what stores say, and Redis


def within(kind: Any) -> Iterator[type]:
    """Every struct that a value of this type can have in it, at whatever depth."""
    if isinstance(kind, inspect.StructType):
        yield kind.cls
        for field in kind.fields:
            yield from within(field.type)
    for name in ("types", "item_types"):
        for each in getattr(kind, name, ()):
            yield from within(each)
    for name in ("item_type", "value_type"):
        if hasattr(kind, name):
            yield from within(getattr(kind, name))


def test_no_struct_that_travels_or_is_kept_is_left_out_here() -> None:
    roots = [*ACTOR, *LEARNER, *RECORDS, *STORED]
    tested = {cls for root in roots for cls in within(inspect.type_info(root))}
    modules = (wire, records, episodes, blobs, versions)
    made = {
        cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, msgspec.Struct)
        and cls.__module__ == module.__name__
        and not cls.__subclasses__()
    }
    assert made - tested == set()
    assert len(made) > 30


@pytest.mark.parametrize("cls", STORED, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_said_of_weights_comes_back(
    cls: type[msgspec.Struct], data: st.DataObject
) -> None:
    message = data.draw(struct(cls))
    frame = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(frame, type=cls) == message
    later = {**msgspec.msgpack.decode(frame), "of_a_later_version": [1, {"a": None}]}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(later), type=cls) == message


@pytest.mark.parametrize("cls", [*ACTOR, *LEARNER, *RECORDS], ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_in_a_struct_comes_back(cls: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(struct(cls))
    codec = Codec(wire.FromActor if cls in ACTOR else wire.FromLearner)
    if cls in RECORDS:
        codec = Codec(records.AnyRecord)
    frame = bytes(codec.encode(message))
    back = codec.decode(frame)
    assert type(back) is cls
    assert bytes(codec.encode(back)) == frame
    assert same(message, back)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and all(
            same(getattr(a, name), getattr(b, name)) for name in a.__struct_fields__
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("cls", [*ACTOR, *LEARNER], ids=lambda cls: cls.__name__)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_field_that_nobody_knows_is_ignored(
    cls: type[msgspec.Struct], data: st.DataObject
) -> None:
    """Messages of another version of the code, as long as the protocol is the same."""
    message = data.draw(struct(cls))
    codec = Codec(wire.FromActor if cls in ACTOR else wire.FromLearner)
    frame = bytes(codec.encode(message))
    length = int.from_bytes(frame[:4], "little")
    header = msgspec.msgpack.decode(frame[4 : 4 + length])
    header["of_a_later_version"] = {"deep": [1, 2]}
    later = msgspec.msgpack.encode(header)
    body = frame[(4 + length + 7) & ~7 :]
    padded = len(later).to_bytes(4, "little") + later
    assert same(message, codec.decode(padded + bytes(-len(padded) % 8) + body))
