"""Values on their way through MessagePack."""

from __future__ import annotations

import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest

from common.errors import DataError
from common.plain import plain, rebuilt


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1.5,
        2**80,
        -(2**63),
        "text",
        [1, (2, 3), {4, 5}, frozenset({6})],
        {"a": {1: (2,), (3, 4): "x"}},
        {"$tuple": [1]},
        {"$map": 1, "b": 2},
        {"$strange": 1},
        Fraction(1, 3),
        Decimal("0.10"),
        1 + 2j,
        datetime.date(2024, 2, 29),
        datetime.datetime(2024, 2, 29, 12, 30),
        datetime.time(12, 30),
        ((1, 2), [(), []]),
    ],
)
def test_what_goes_through_messagepack_comes_back_with_its_types(value: Any) -> None:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(plain(value)))
    assert rebuilt(sent) == value
    assert type(rebuilt(sent)) is type(value)


def test_plain_rows_stay_as_they_are() -> None:
    row = {"question": "1+1?", "answer": "2", "metadata": {"n": [1, 2], "x": None}}
    assert plain(row) == row


def test_numbers_and_arrays_of_numpy_become_numbers_and_lists() -> None:
    assert plain({"a": np.int64(3), "b": np.arange(2), "c": np.str_("x")}) == {
        "a": 3,
        "b": [0, 1],
        "c": "x",
    }


def test_what_has_no_plain_form_is_named() -> None:
    with pytest.raises(DataError, match="a object has no plain form"):
        plain({"x": [object()]})
