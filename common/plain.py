"""Python values as what MessagePack and JSON can hold, and back again without loss.

A dataset's row may hold tuples, sets, fractions, dates or maps with keys that are no strings, and a
grader may compare with exactly these. Each becomes a map of one key: {"$tuple": [1, 2]}. Numbers,
strings, lists and maps with string keys stay what they are, so that plain rows are readable.

    rebuilt(plain(value)) == value
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from common.errors import DataError

_INT64 = range(-(1 << 63), 1 << 63)
_ATOMS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "$datetime": (
        datetime.datetime,
        datetime.datetime.isoformat,
        datetime.datetime.fromisoformat,
    ),
    "$date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "$time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "$fraction": (Fraction, str, Fraction),
    "$decimal": (Decimal, str, Decimal),
    "$complex": (complex, str, complex),
    "$int": (int, str, int),  # beyond 64 bits
}
_SEQUENCES: dict[str, Any] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}


def plain(value: Any) -> Any:
    """Raises DataError, naming the type, for what has no plain form."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        value = value.tolist()  # an array or a number of numpy's
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and int(value) in _INT64:
        return int(value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return _plain_map(value)
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            members = list(value) if kind is tuple else sorted(value, key=repr)
            return {tag: [plain(v) for v in members]}
    for tag, (kind, written, _) in _ATOMS.items():
        if isinstance(value, kind):
            return {tag: written(value)}
    raise DataError(f"a {type(value).__name__} has no plain form: {value!r:.60}")


def rebuilt(value: Any) -> Any:
    """What `plain` was given."""
    if isinstance(value, list):
        return [rebuilt(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](rebuilt(v) for v in inner)
        if tag in _ATOMS:
            return _ATOMS[tag][2](inner)
        if tag == "$map":
            return {rebuilt(k): rebuilt(v) for k, v in inner}
    return {k: rebuilt(v) for k, v in value.items()}


def _plain_map(value: dict[Any, Any]) -> Any:
    if all(isinstance(k, str) and not k.startswith("$") for k in value):
        return {str(k): plain(v) for k, v in value.items()}
    return {"$map": [[plain(k), plain(v)] for k, v in value.items()]}
