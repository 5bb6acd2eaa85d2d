"""JSON lines: one object a line. Only the lines' offsets are held in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from common.errors import DataError

MARK = b"\xef\xbb\xbf"  # some programs begin UTF-8 with it
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class JsonLines:
    """A row's number is that of its line, from 1. Raises DataError: unreadable, no JSON object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("q")  # where each line begins

    def scan(self, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        self._offsets = array("q")
        with self._open() as file:
            at = len(MARK) if file.read(len(MARK)) == MARK else 0
            file.seek(at)
            for number, line in enumerate(file, 1):
                self._offsets.append(at)
                at += len(line)
                if line.strip():
                    yield number, self._parse(number, line)
        if not self._offsets:
            raise DataError(f"{self.path}: the dataset is empty")

    def row(self, number: int) -> dict[str, Any]:
        with self._open() as file:
            file.seek(self._offsets[number - 1])
            return self._parse(number, file.readline())

    def columns(self) -> list[str]:
        return sorted(self.row(1)) if self._offsets else []

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(
                f"cannot read the dataset {self.path}: {error.strerror}; set learner.prompts.path"
            ) from None

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return _decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DataError(
                f"{self.path}, row {number}: not a JSON object ({error}); "
                "a JSONL file has one object a line"
            ) from None
        except UnicodeDecodeError:
            raise DataError(f"{self.path}, row {number}: not UTF-8") from None
