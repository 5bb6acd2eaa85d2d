"""Parquet files, and datasets that Hugging Face's `save_to_disk` wrote, as memory-mapped Arrow
tables: any row is read at once, and none but the rows in use are in memory.

Parquet decompresses whole row groups, up to a million rows for the one that is wanted. So it is
unpacked once, row group by row group, into an Arrow file in the system's temporary folder, which
loses its name at once and its space with the process.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from common.errors import DataError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise DataError("Parquet and Arrow need pyarrow: pip install -e '.[data]'") from None

log = logging.getLogger("isentrope.prompts")

BATCH_ROWS = 4096
UNREADABLE = (pa.ArrowException, ValueError, OverflowError)  # said of a value


class _File(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    """What `save_to_disk` writes beside the files."""

    data_files: list[_File] = msgspec.field(name="_data_files", default=[])


class Table:
    """Rows of an Arrow table; numbers are from 1."""

    def __init__(self, path: Path, table: Any) -> None:
        self.path = path
        self._table = table
        self._odd: set[str] = set()  # columns that cannot be read in some row

    def scan(self, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self._table.num_rows:
            raise DataError(f"{self.path}: the dataset is empty")
        names = {name if name in self.columns() else name.partition(".")[0] for name in columns}
        wanted = [name for name in self.columns() if name in names]
        twice = next((name for name in wanted if wanted.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{self.path}: it has two columns {twice!r}: rename one of them")
        present = self._table.select(wanted)
        if not present.num_columns:
            yield 1, {}  # nor has any other row one of them
            return
        first = 1
        for batch in present.to_batches(max_chunksize=BATCH_ROWS):
            yield from enumerate(self._values(batch, first), first)
            first += batch.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """Without the columns that have no value of Python's there: said once each."""
        part = self._table.slice(number - 1, 1)
        try:
            whole: dict[str, Any] = part.to_pylist()[0]
            return whole
        except UNREADABLE:
            row = {}
            for name, column in zip(part.column_names, part.columns, strict=True):
                try:
                    row[name] = column.to_pylist()[0]
                except UNREADABLE as error:
                    self._say_odd(name, error)
            return row

    def columns(self) -> list[str]:
        return list(self._table.column_names)

    def _values(self, part: Any, first: int) -> list[dict[str, Any]]:
        """Raises DataError for what is no value of Python's: bytes that are no text, a time in
        nanoseconds.
        """
        try:
            rows: list[dict[str, Any]] = part.to_pylist()
        except UNREADABLE as error:
            where = f"rows {first} to {first + part.num_rows - 1}"
            odd = ", ".join(name for name in part.schema.names if _is_odd(part.column(name)))
            raise DataError(f"{self.path}, {where}, column {odd}: {_line(error)}") from None
        return rows

    def _say_odd(self, name: str, error: Exception) -> None:
        if name not in self._odd:
            message = "%s: column %s is left out, no grader sees it: %s"
            log.warning(message, self.path, name, _line(error))
        self._odd.add(name)


def parquet(path: Path) -> Table:
    """A Parquet file, or a folder of them in the order of their names. Raises DataError."""
    files = _files(path, "*.parquet")
    with tempfile.NamedTemporaryFile() as unpacked:
        try:
            schema = pq.read_schema(files[0])
            with pa.ipc.new_file(unpacked, schema) as writer:
                for file in files:
                    with pq.ParquetFile(file, memory_map=True) as packed:
                        for batch in packed.iter_batches(BATCH_ROWS):
                            writer.write_batch(batch)
            unpacked.flush()
            mapped = pa.memory_map(unpacked.name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read the dataset {path}: {_line(error)}") from None
    return Table(path, pa.ipc.open_file(mapped).read_all())


def saved(path: Path) -> Table:
    """A folder that `Dataset.save_to_disk` wrote, or one Arrow file. Raises DataError."""
    tables = []
    for file in _saved_files(path):
        try:
            tables.append(_mapped(file))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read the dataset {file}: {_line(error)}") from None
    try:
        return Table(path, pa.concat_tables(tables))
    except pa.ArrowException as error:
        raise DataError(f"{path}: its files do not fit together: {_line(error)}") from None


def _mapped(file: Path) -> Any:
    """Hugging Face writes Arrow's stream format; others the file format."""
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _saved_files(path: Path) -> list[Path]:
    """Those that the dataset's own list names: beside them may lie what `map` once cached."""
    splits, state = path / "dataset_dict.json", path / "state.json"
    if splits.is_file():
        there = ", ".join(sorted(str(at.parent) for at in path.glob("*/state.json")))
        raise DataError(
            f"{path} holds several datasets: set learner.prompts.path to one of {there}"
        )
    if not state.is_file():
        return _files(path, "*.arrow")
    try:
        listed = msgspec.json.decode(state.read_bytes(), type=_State).data_files
    except (msgspec.MsgspecError, OSError) as error:
        raise DataError(f"{state} cannot be read: {error}") from None
    if not listed:
        raise DataError(f"{path}: the dataset is empty")
    return [path / file.filename for file in listed]


def _is_odd(column: Any) -> bool:
    try:
        column.to_pylist()
    except UNREADABLE:
        return True
    return False


def _files(path: Path, pattern: str) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if not files:
        why = f"no {pattern} in it" if path.is_dir() else "No such file or directory"
        raise DataError(f"cannot read the dataset {path}: {why}; set learner.prompts.path")
    return files


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
