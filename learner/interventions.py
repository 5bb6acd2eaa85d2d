"""Interventions as supervised data: hinted rollouts that are right in the end and clean, one JSON
object a line, in the chat format that trainers read:

    {"messages": [{"role": "user", …}, {"role": "assistant", …}], "flaws": ["wrong"], …}

The file is made from the journal as a whole and renamed into its place: every admitted group is in
it once, however often the run was interrupted and the file written. Hints are part of the answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from common.codec import Codec
from common.journal import read
from common.records import Admit, Issue
from common.runfolder import RunFolder
from common.wire import FromActor, Group, Rollout, Ticket
from learner.turns import is_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "interventions.jsonl"
_SYSTEM, _USER = "what the system says", "what the user says"  # places in a template
Messages = list[dict[str, str]]


def write(folder: RunFolder, model: Path) -> tuple[Path, int]:
    """The file, and how many lines it has; `model` is the folder of the run's model."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    path = folder.path / FILE
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    reader, lines = Reader(tokenizer), 0
    with aside.open("wb") as file:
        for ticket, group in _hinted(folder):
            for number, rollout in enumerate(group.hinted):
                if is_kept(rollout):
                    file.write(msgspec.json.encode(reader.line(ticket, number, rollout)) + b"\n")
                    lines += 1
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path, lines


def _hinted(folder: RunFolder) -> Iterator[tuple[Ticket, Group]]:
    """Groups with hinted rollouts, in the order of their admission."""
    asked: dict[int, Ticket] = {}
    codec = Codec(FromActor)
    for _, record in read(folder.journal):
        if isinstance(record, Issue):
            episode = record.ticket.episode
            if episode is not None and episode.intervene is not None:
                asked[record.ticket.id] = record.ticket
        elif isinstance(record, Admit) and record.ticket in asked:
            ticket = asked.pop(record.ticket)
            group: Group = codec.decode(record.frame)
            if group.hinted:
                yield ticket, group


class Reader:
    """Tokens back to messages: the chat template read backwards."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        user = {"role": "user", "content": _USER}
        system = {"role": "system", "content": _SYSTEM}
        has_one = bool(getattr(tokenizer, "chat_template", None))
        both = ([system, user], [user]) if has_one else ()
        self._shapes = [_shape(self._templated(turns)) for turns in both]

    def line(self, ticket: Ticket, number: int, rollout: Rollout) -> dict[str, Any]:
        hints = [s.tokens.size for s in rollout.segments if s.role == "hint"]
        tokens = [token for s in rollout.segments for token in s.tokens.tolist()]
        messages, begun = self.asked(ticket)
        answer = begun + self._text(tokens, special=False)
        return {
            "messages": [*messages, {"role": "assistant", "content": answer}],
            "ticket": ticket.id,
            "rollout": number,
            "problem": ticket.problem,
            "source": ticket.source,
            "template": ticket.template,
            "flaws": list(rollout.flaws),
            "hint_tokens": sum(hints),
        }

    def asked(self, ticket: Ticket) -> tuple[Messages, str]:
        """What stood before the answer as messages, and what the answer was made to begin with."""
        whole = self._text(ticket.prompt.tolist(), special=True)
        for shape in self._shapes:
            if found := shape.fullmatch(whole):
                said = found.groupdict()
                roles = [role for role in ("system", "user") if role in said]
                return [{"role": r, "content": said[r]} for r in roles], said["begun"]
        return [{"role": "user", "content": self._text(ticket.prompt.tolist(), special=False)}], ""

    def _text(self, tokens: list[int], special: bool) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not special))

    def _templated(self, turns: Messages) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return str(text)


def _shape(rendered: str) -> re.Pattern[str]:
    """What the template makes of any messages of these roles, and of what begins an answer."""
    pattern = re.escape(rendered)
    pattern = pattern.replace(re.escape(_SYSTEM), "(?P<system>.*)", 1)
    pattern = pattern.replace(re.escape(_USER), "(?P<user>.*)", 1)
    return re.compile(f"{pattern}(?P<begun>.*)", re.DOTALL)
