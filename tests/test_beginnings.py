"""`init` and `doctor`: the way from a fresh machine to a run of your own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from common import models, recipe
from common.config import RunConfig
from common.doctor import examine, of_recipe
from common.init import init
from learner.config import LearnerConfig


def start(*arguments: str) -> Result:
    return CliRunner().invoke(init, arguments)


def test_a_starter_recipe_is_valid_and_commented(tmp_path: Path) -> None:
    done = start(str(tmp_path / "new"))
    assert done.exit_code == 0
    path = tmp_path / "new" / "recipe.toml"
    assert set(recipe.load_all(str(path))) == {"run", "actor", "learner"}
    assert path.read_text().count("#") > 10


def test_a_starter_recipe_for_own_data_finds_the_columns(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"id": 1, "question": "1+1?", "solution": "2"}) + "\n")
    assert start(str(tmp_path), "--data", str(data)).exit_code == 0
    loaded = recipe.load(
        str(tmp_path / "recipe.toml"), {"run": RunConfig, "learner": LearnerConfig}
    )
    prompts = msgspec.structs.asdict(loaded["learner"])["prompts"]
    assert (prompts.prompt_column, prompts.answer_column) == ("question", "solution")
    assert prompts.path == str(data)
    assert prompts.grader == "numeric"


def test_answers_in_words_begin_with_the_exact_grader(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "Who?", "answer": "nobody"}) + "\n")
    done = start(str(tmp_path), "--data", str(data))
    assert "the model 'tiny' knows the signs 0123456789+-=,#? alone" in done.output
    loaded = recipe.load(str(tmp_path / "recipe.toml"), {"learner": LearnerConfig})
    assert msgspec.structs.asdict(loaded["learner"])["prompts"].grader == "exact"


def test_a_starter_recipe_for_a_parquet_file_names_its_source(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = tmp_path / "data.parquet"
    pq.write_table(pa.table({"problem": ["1+1?"], "solution": ["2"]}), data)
    assert start(str(tmp_path), "--data", str(data)).exit_code == 0
    loaded = recipe.load(str(tmp_path / "recipe.toml"), {"learner": LearnerConfig})
    prompts = msgspec.structs.asdict(loaded["learner"])["prompts"]
    assert (prompts.source, prompts.prompt_column) == ("parquet", "problem")
    assert prompts.grader == "numeric"
    data.write_text("no parquet")
    refused = start(str(tmp_path / "other"), "--data", str(data)).exception
    assert "cannot be read" in str(refused)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": 1, "question": "1+1?"}\n', "no column that looks like the answer"),
        ("not json\n", "line 1 is no JSON"),
        ("", "expected one JSON object a line"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, content: str, said: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    done = start(str(tmp_path), "--data", str(data))
    assert said in str(done.exception)
    assert not (tmp_path / "recipe.toml").exists()


def test_a_recipe_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    assert "exists already" in str(start(str(tmp_path)).exception)
    assert (tmp_path / "recipe.toml").read_text() == "mine"


def test_the_doctor_finds_nothing_fatal_on_the_machine_that_runs_the_tests() -> None:
    findings = {finding.what: finding for finding in examine("tiny")}
    assert {"python", "torch", "models", "redis", "disk", "recipe", "model"} <= set(findings)
    assert not [finding for finding in findings.values() if finding.verdict == "fail"]


def test_the_doctor_names_what_a_recipe_lacks(free_port: int) -> None:
    overrides = (
        "run.model=/nowhere",
        f"run.redis=redis://127.0.0.1:{free_port}/0",
    )
    findings = {finding.what: finding for finding in of_recipe("tiny", overrides)}
    assert findings["model"].verdict == "fail"
    assert "/nowhere" in findings["model"].said
    assert findings["registry"].verdict == "fail"


def test_the_doctor_opens_the_data_and_loads_the_graders(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(20)]
    rows += [{"prompt": "1?", "answer": 2}, {"prompt": "", "answer": 3}]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def told(*overrides: str) -> dict[str, set[str]]:
        asked = ("learner.prompts.source=jsonl", f"learner.prompts.path={data}", *overrides)
        found: dict[str, set[str]] = {}
        for f in of_recipe("tiny", asked):
            found.setdefault(f"{f.verdict} {f.what}", set()).add(f.said)
        return found

    fine = told("learner.prompts.grader=numeric", "learner.prompts.grader_options={}")
    assert any("18 to train on" in line or "17 to train on" in line for line in fine["ok data"])
    assert any("no prompt in row 22" in line for line in fine["warn data"])
    assert fine["ok grader"] == {"numeric"}
    data.write_text("nothing")
    broken = told("learner.prompts.grader=python:no_such:f", "learner.prompts.grader_options={}")
    assert any("row 1: not a JSON object" in line for line in broken["fail data"])
    assert any("No module named 'no_such'" in line for line in broken["fail grader"])


def test_the_doctor_asks_the_tokenizer_of_the_model_that_is_meant(tmp_path: Path) -> None:
    data = tmp_path / "words.jsonl"
    data.write_text('{"prompt": "what is it?", "answer": 3}\n{"prompt": "and this?", "answer": 4}')
    other = tmp_path / "model"  # its tokenizer is not to be had: it loses nothing
    shutil.copytree(models.find("tiny"), other)
    (other / "tokenizer.json").unlink()
    words = ("learner.prompts.source=jsonl", f"learner.prompts.path={data}")
    for overrides, count in (words, 1), ((*words, f"run.model={other}"), 0):
        told = [f.said for f in of_recipe("tiny", overrides) if f.what == "data"]
        assert sum("the model's tokenizer knows nothing of" in said for said in told) == count, told


def test_the_doctor_says_that_a_port_is_taken() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        findings = {f.what: f for f in of_recipe("tiny", (f"run.learner={endpoint}",))}
    assert findings["learner"].verdict == "fail"


def test_the_doctor_needs_no_torch_in_its_own_process() -> None:
    code = (
        "import sys\nfrom common.doctor import examine\nlist(examine('tiny'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
