"""Messages and records as bytes.

One message is one ZeroMQ frame, and the journal keeps groups in the very bytes that arrived:

    u32 header length · MessagePack header (maps) · zeros up to a multiple of 8 · raw little-endian
    arrays, 8-aligned

In the header an array stands as a map `{"d": dtype, "o": byte offset into the array part, "n":
number of elements}` with dtype one of `i4`, `f4`, `u1`; decoding makes read-only views, it copies
nothing. A group has many segments, and one array for the tokens of all of them and one for their
log-probabilities, rollout by rollout: these stand in its `columns`, and a segment's `tokens` and
`logps` are their numbers of elements. Everything else is ordinary MessagePack with string keys: any
language can write an actor.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar

import msgspec
import numpy as np

from common.errors import WireError
from common.wire import F4, I4, U1, Columns, Group, check_array

MAX_FRAME_BYTES = 64 << 20

_DTYPES: dict[str, np.dtype[Any]] = {"i4": I4, "f4": F4, "u1": U1}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PADDING = [bytes(n) for n in range(8)]


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
        self._columns = {I4: [], F4: []} if isinstance(message, Group) else None
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
            tokens, logps = self._columns[I4], self._columns[F4]
            return {"tokens": self._lay(I4, tokens), "logps": self._lay(F4, logps)}
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
            check_array("tokens", tokens, I4)
            check_array("logps", logps, F4)
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


def _aligned(offset: int) -> int:
    return (offset + 7) & ~7
