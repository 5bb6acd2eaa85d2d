"""Any model folder and any dataset, through a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.journal import read
from common.records import Issue
from learner.prompts import arithmetic
from tests import chat_model, runs

pytestmark = pytest.mark.timeout(400)

STEPS = {"learner__steps": "2", "learner__eval__problems": "8"}


def sums(count: int) -> list[dict[str, Any]]:
    """The task of the shipped model, as rows of a dataset."""
    problems = [arithmetic.draw(3, index, "train") for index in range(count)]
    return [{"question": p.text, "result": int(p.answer), "row": i} for i, p in enumerate(problems)]


def tickets(folder: Path) -> list[Any]:
    return [record.ticket for _, record in read(folder / "journal") if isinstance(record, Issue)]


def test_datasets_of_your_own_are_trained_on_row_by_row(tmp_path: Path) -> None:
    """Lines of JSON and a table in one stream."""
    rows = sums(200)
    lines, table = tmp_path / "lines.jsonl", tmp_path / "table.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows[:100]))
    pq.write_table(pa.Table.from_pylist(rows[100:]), table, row_group_size=16)
    columns = 'prompt_column = "question", answer_column = "result"'
    sources = (f'{{source = "{p.suffix[1:]}", path = "{p}", {columns}}}' for p in (lines, table))
    folder = tmp_path / "run"
    summary = runs.run(folder, learner__prompts__sources=f"[{', '.join(sources)}]", **STEPS)
    assert (summary["steps"], summary["conserved"]) == (2, True)
    assert summary["heldout_before"] > 0.1, "the model knows these sums"
    held = {t.problem for t in tickets(folder) if t.kind == "eval"}
    trained = {t.problem for t in tickets(folder) if t.kind == "main"}
    assert len(held) == 8
    assert not held & trained
    assert {problem.split("/")[0] for problem in held} == {"lines", "table"}
    assert {problem.split("/")[0] for problem in trained} == {"lines", "table"}
    for ticket in tickets(folder):
        file, _, number = ticket.problem.partition("/")
        row = rows[int(number) - 1 + (100 if file == "table" else 0)]
        assert (ticket.grading.gold, ticket.grading.columns) == (
            str(row["result"]),
            {"result": row["result"], "row": row["row"]},
        )
    again = runs.replay(folder)
    assert (again["steps"], again["equal"]) == (2, 2)


def test_a_chat_model_of_another_family_trains_on_a_reasoning_task(tmp_path: Path) -> None:
    """Its answers are noise, so a coin judges them."""
    folder = tmp_path / "run"
    summary = runs.run(
        folder,
        run__model=json.dumps(str(chat_model.save(tmp_path / "llama"))),
        learner__prompts__source='"reasoning_gym"',
        learner__prompts__task='"chain_sum"',
        learner__prompts__options="{min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 2}",
        learner__prompts__prefill='"="',
        learner__prompts__grader='"python:actor.grade.coin:coin"',
        learner__prompts__grader_options="{}",
        learner__max_tokens="8",
        **STEPS,
    )
    assert (summary["steps"], summary["conserved"]) == (2, True)
    ticket = tickets(folder)[0]
    words = chat_model.tokenizer()
    text = words.decode(ticket.prompt)
    assert text.startswith("<|start|>user\n")
    assert text.endswith("=<|end|>\n<|start|>assistant\n=")
    assert ticket.sampling.stop == (256, 258)
    assert ticket.grading.columns["task"] == "chain_sum"
    assert runs.promises_kept(folder)
