"""The last groups of a run, to read: from the end of the journal, as text.

Lazily: nothing is read before somebody asks, and then only what was written since.
"""

from __future__ import annotations

import tomllib
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common import models
from common.codec import Codec
from common.errors import DataError, JournalError, WireError
from common.records import Admit, Drop, Issue
from common.segments import HEAD, MAGIC, Extent, decode, extents, payloads, record_codec
from common.wire import FromActor, Group, Rollout, Ticket

HELDOUT = 2  # groups of evaluations that are kept …
OTHERS = 6  # … and of all other kinds
MOST_CHARACTERS = 4000  # of one text

Decode = Callable[[Iterable[int]], str]


class Admitted(NamedTuple):
    ticket: Ticket | None  # None: it was issued before the part of the journal that was read
    record: Admit


class Latest:
    """The newest groups of the run in `folder`: those to train on, and some held-out ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._decode: Decode | None = None
        self._wrong = ""  # with the journal
        self._seen: tuple[str, int] = ("", 0)  # segment and its size at the last look
        self._at: tuple[str, int] = ("", 0)  # where the next record starts
        self._open: dict[int, Ticket] = {}
        self._heldout: deque[Admitted] = deque(maxlen=HELDOUT)
        self._others: deque[Admitted] = deque(maxlen=OTHERS)

    def refresh(self) -> None:
        """Read on; a damaged journal is said in `words`, never raised."""
        try:
            self._read_on()
        except FileNotFoundError:
            pass  # a segment that was pruned, or a folder that is not there yet
        except (JournalError, OSError) as error:
            self._wrong = str(error)

    def _read_on(self) -> None:
        newest = max((self.folder / "journal").glob("*.journal"), default=None)
        if newest is None or (newest.name, newest.stat().st_size) == self._seen:
            return
        self._seen = (newest.name, newest.stat().st_size)
        found = extents(self.folder / "journal")
        first = self._at[0] or (found[-2:] or found)[0].name
        for extent in found:
            if extent.name >= first:
                self._read(extent)
        self._wrong = ""

    def _read(self, extent: Extent) -> None:
        start = self._at[1] if extent.name == self._at[0] else len(MAGIC)
        codec = record_codec()
        for offset, payload in payloads(extent, start):
            match decode(payload, codec, extent, offset):
                case Issue(ticket=ticket):
                    self._open[ticket.id] = ticket
                case Drop(ticket=id_):
                    self._open.pop(id_, None)
                case Admit() as record:
                    one = Admitted(self._open.pop(record.ticket, None), record)
                    heldout = one.ticket is not None and one.ticket.kind == "eval"
                    (self._heldout if heldout else self._others).append(one)
            start = offset + HEAD.size + len(payload)
        self._at = (extent.name, start)

    def words(self) -> str:
        """What is wrong, if anything is."""
        if self._wrong or not (self._others or self._heldout):
            return self._wrong
        return "" if self._decoder() is not None else "no tokenizer.json here: token ids are shown"

    def shown(self) -> list[dict[str, Any]]:
        """Those to train on, the newest first, then the held-out ones."""
        texts = self._decoder() or _ids
        codec = Codec(FromActor)
        return [
            _group(one, codec, texts) for one in (*reversed(self._others), *reversed(self._heldout))
        ]

    def _decoder(self) -> Decode | None:
        if self._decode is None:
            self._decode = _tokenizer(self.folder)
        return self._decode


def _group(one: Admitted, codec: Codec, texts: Decode) -> dict[str, Any]:
    ticket, record = one
    facts: dict[str, Any] = {"ticket": record.ticket, "at": record.at}
    if ticket is not None:
        facts |= {"prompt": _cut(texts(ticket.prompt)), "gold": _cut(ticket.grading.gold)}
    try:
        group = codec.decode(record.frame)
    except WireError as error:
        return {**facts, "wrong": str(error)}
    assert isinstance(group, Group), "an admitted frame is a group"
    return {
        **facts,
        "kind": group.kind,
        "problem": _cut(group.problem, 200),
        "actor": group.actor,
        "rollouts": [_rollout(rollout, texts) for rollout in group.rollouts],
    }


def _rollout(rollout: Rollout, texts: Decode) -> dict[str, Any]:
    versions = [v for segment in rollout.segments for _, v in segment.spans]
    return {
        "correct": rollout.correct,
        "error": _cut(rollout.error, 300),
        "finish": rollout.finish,
        "tokens": rollout.length,
        "versions": [min(versions), max(versions)] if versions else [],
        "parts": [dict(part) for part in rollout.parts],
        "segments": [
            {"role": s.role, "turn": s.turn, "text": _cut(texts(s.tokens))}
            for s in rollout.segments
        ],
    }


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more)"


def _ids(tokens: Iterable[int]) -> str:
    return " ".join(str(int(token)) for token in tokens)


def _tokenizer(folder: Path) -> Decode | None:
    """That of the run's model: what it exported at its end, else what its recipe names."""
    for home in (folder / "model", _model(folder)):
        if home is not None and (home / "tokenizer.json").is_file():
            return _load(home / "tokenizer.json")
    return None


def _model(folder: Path) -> Path | None:
    try:
        recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        return models.find(recipe.get("run", {}).get("model", "tiny"))
    except (OSError, ValueError, DataError):  # not there yet, or made on another machine
        return None


def _load(path: Path) -> Decode | None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001  the library raises bare Exception for a bad file
        return None
    return lambda tokens: str(tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False))
