"""`isentrope init`: a commented recipe to start your own run from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import click

from common.errors import ConfigError, DataError

RECIPE = """\
# A recipe of Isentrope. Every key that is missing has a vetted default;
# `isentrope doctor {path}` checks this file and the machine, `isentrope run {path}` trains.

[run]
model = {model}  # a Hugging Face model folder (config.json, *.safetensors, tokenizer.json)
seed = 0
weights_dtype = "fp32"  # of the versions that actors fetch: fp32 or bf16

[actor]
count = {count}  # processes that generate, on this machine{count_note}
engine = "torch"  # torch (built in) or vllm
slots = {slots}  # sequences decoded side by side
device = "auto"  # cpu, cuda, cuda:1, …

[learner]
steps = {steps}
groups_per_step = 32  # prompts of a step …
group_size = 8  # … and answers to each: 256 rollouts
max_tokens = {max_tokens}  # of an answer
temperature = 1.0
max_lag = 2  # how many versions old the weights may be that an answer was sampled from
lr = {lr}  # {lr_note}
warmup_steps = 10
checkpoint_every = 20
device = "auto"
dtype = "{dtype}"  # of the forward pass; {dtype_note}

{prompts}
[learner.eval]
problems = 256  # held-out, before and after; never trained on
every = 50  # steps between evaluations under way; 0: none

# Methods are plug-ins and compose; the empty list is GRPO.
# [[learner.methods]]
# type = "entropy_bonus"
"""

TINY_KNOWS = "the signs 0123456789+-=,#? alone: the rest of your questions is left out"

# What suits the shipped model of 0.8 M parameters on a CPU, and a real one on a GPU.
TINY = {
    "count": 2,
    "count_note": "",
    "slots": 128,
    "steps": 60,
    "max_tokens": 48,
    "lr": "1.5e-4",
    "lr_note": "for this tiny model; a real one takes about 1e-6",
    "dtype": "fp32",
    "dtype_note": "bf16 is faster on a GPU",
}
REAL = {
    "count": 1,
    "count_note": "; it shares a single GPU with the learner",
    "slots": 64,
    "steps": 200,
    "max_tokens": 512,
    "lr": "1e-6",
    "lr_note": "full fine-tuning of a real model",
    "dtype_note": "bf16 on a GPU, fp32 on a CPU",
}

DATA = """\
[learner.prompts]
source = "{source}"  # {source_note}
path = {data}
prompt_column = {prompt}
answer_column = {answer}
chat = "auto"  # by the model's chat template, if it has one
instruction = ""  # a line behind every question, such as "Answer with the number only."
grader = "{grader}"  # {grader_note}
# others: exact, numeric, math_verify, or your own "python:MODULE:FUNCTION", as TRL takes them
"""
GRADER_NOTES = {
    "exact": "the whole response, letter by letter; grader_options say where in it the answer is",
    "numeric": "the last number of the response; grader_options say where else the answer is",
}
SOURCE_NOTES = {"jsonl": "one JSON object a line", "parquet": "a file, or a folder of them"}

ARITHMETIC = """\
[learner.prompts]
source = "arithmetic"  # the built-in task; "jsonl" with path = "data.jsonl" for your own
"""

PROMPT_NAMES = ("prompt", "question", "problem", "instruction")
ANSWER_NAMES = ("answer", "solution", "gold", "target", "label")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--model", default="tiny", show_default=True, help="Model folder, or a shipped name.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSONL or Parquet file with prompts and answers.",
)
def init(folder: Path, model: str, data: Path | None) -> None:
    """Write a commented starter recipe into DIR."""
    from common import models
    from common.recipe import load_all

    path = folder / "recipe.toml"
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another folder, or edit it")
    found = models.find(model)
    shipped = found.is_relative_to(models.SHIPPED)
    named, scale = (model, TINY) if shipped else (str(found), _real())
    prompts = ARITHMETIC if data is None else _data(data)
    folder.mkdir(parents=True, exist_ok=True)
    text = RECIPE.format(path=path, model=json.dumps(named), prompts=prompts, **scale)
    path.write_text(text, encoding="utf-8")
    load_all(str(path))
    if shipped and data is not None:
        click.echo(f"note: the model {named!r} knows {TINY_KNOWS}; --model gives another")
    click.echo(f"{path}: read it, then: isentrope doctor {path} && isentrope run {path}")


def _real() -> dict[str, Any]:
    """What suits a real model; on a machine without a GPU bf16 is slow."""
    dtype = "bf16" if shutil.which("nvidia-smi") else "fp32"
    return {**REAL, "dtype": dtype}


def _data(data: Path) -> str:
    """The prompts table for a file: the columns that its first row has, the grader that fits."""
    source = "parquet" if data.suffix == ".parquet" else "jsonl"
    columns = _parquet_row(data) if source == "parquet" else _row(data)
    prompt = next((name for name in PROMPT_NAMES if name in columns), None)
    answer = next((name for name in ANSWER_NAMES if name in columns), None)
    if prompt is None or answer is None:
        missing, names = ("prompt", PROMPT_NAMES) if prompt is None else ("answer", ANSWER_NAMES)
        raise DataError(
            f"{data}: no column that looks like the {missing} ({', '.join(names)}); "
            f"it has: {', '.join(columns)}"
        )
    quoted = (json.dumps(str(value)) for value in (data.resolve(), prompt, answer))
    grader = "numeric" if _is_number(columns[answer]) else "exact"
    return DATA.format(
        source=source,
        source_note=SOURCE_NOTES[source],
        grader=grader,
        grader_note=GRADER_NOTES[grader],
        **dict(zip(("data", "prompt", "answer"), quoted, strict=True)),
    )


def _is_number(answer: Any) -> bool:
    return re.fullmatch(r"\s*[-+]?[\d,]*\.?\d+\s*", str(answer)) is not None


def _parquet_row(data: Path) -> dict[str, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError('Parquet needs pyarrow: pip install -e ".[data]"') from None
    try:
        with pq.ParquetFile(data) as file:
            batch = next(file.iter_batches(1), None)
            names = dict.fromkeys(file.schema_arrow.names)
            return batch.to_pylist()[0] if batch is not None else names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{data}: cannot be read: {str(error).splitlines()[0]}") from None


def _row(data: Path) -> dict[str, Any]:
    try:
        with data.open(encoding="utf-8") as lines:
            first = json.loads(next((line for line in lines if line.strip()), "{}"))
    except OSError as error:
        raise DataError(f"{data}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{data}: line 1 is no JSON: {error}") from None
    if not isinstance(first, dict) or not first:
        raise DataError(f"{data}: expected one JSON object a line, with a prompt and an answer")
    return first
