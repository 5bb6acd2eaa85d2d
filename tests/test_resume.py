"""One finished run, and what becomes of it when it is resumed whole, damaged, or twice at once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.metrics import read as read_metrics
from common.runfolder import RunFolder
from tests import runs

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with an evaluation every second one; TensorBoard on."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    runs.run(folder, learner__steps="6", learner__eval__every="2", learner__tensorboard="true")
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def learner(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [runs.ISENTROPE, "learner", str(folder / "recipe.toml")]
    command += ["--run-folder", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


def test_evaluations_go_on_beside_training_and_say_which_versions_they_saw(finished: Path) -> None:
    points: list[dict[str, Any]] = [m for m in read_metrics(finished) if "heldout" in m]
    assert {0, 6} <= {point["step"] for point in points}
    evaluations = runs.summary(finished)["evaluations"]
    assert {"before", "step-2", "step-4", "after"} <= set(evaluations)
    assert evaluations["before"]["version_newest"] == 0
    assert evaluations["after"]["version_oldest"] == 6
    assert evaluations["step-2"]["version_oldest"] >= 2
    assert runs.promises_kept(finished), "among them: an eval ticket is never trained on"


def test_the_model_of_a_run_is_an_ordinary_folder(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.versions import Tensor, digest

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert AutoTokenizer.from_pretrained(finished / "model").decode([5]) != ""
    tensors = tuple(
        Tensor(name, "F32", tuple(p.shape), memoryview(p.detach().numpy().reshape(-1)).cast("B"))
        for name, p in sorted(model.named_parameters())
    )
    command = [runs.ISENTROPE, "replay", str(finished)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert again.stdout.splitlines()[-1] == (
        f"6 steps, 6 bit-equal to the record; parameters {digest(tensors)}"
    )


def test_tensorboard_files_are_written_when_asked_for(finished: Path) -> None:
    assert list((finished / "tensorboard").glob("events.*"))


def test_a_longer_run_goes_on_where_the_shorter_ended(copy: Path) -> None:
    process = runs.begin(copy, resume=True, learner__steps="8")
    assert runs.end(process) == 0, runs.said(copy)[-2000:]
    assert runs.summary(copy)["steps"] == 8
    assert runs.summary(copy)["evaluations"]["after"]["version_oldest"] == 8
    assert runs.promises_kept(copy)
    again = runs.replay(copy)
    assert (again["steps"], again["equal"]) == (8, 8)


def test_a_checkpoint_cut_in_half_is_passed_over_for_the_one_before(copy: Path) -> None:
    newest = max((copy / "checkpoints").glob("step-*"))
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    process = runs.begin(copy, resume=True, learner__steps="7")
    assert runs.end(process) == 0, runs.said(copy)[-2000:]
    log = (copy / "logs" / "learner.log").read_text()
    assert f"checkpoint {newest.name} is not usable" in log
    again = runs.replay(copy)
    assert (again["steps"], again["equal"]) == (7, 7)


def test_a_journal_damaged_in_the_middle_is_refused_with_the_place(copy: Path) -> None:
    segment = min((copy / "journal").iterdir())
    damaged = bytearray(segment.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    segment.write_bytes(damaged)
    done = learner(copy, "--resume")
    assert done.returncode == 3
    assert segment.name in last_line(done)
    assert "offset" in last_line(done)


def test_a_second_learner_of_the_same_run_is_refused_with_the_first_ones_pid(copy: Path) -> None:
    import os

    first = RunFolder.open(copy)
    first.claim()
    done = learner(copy, "--resume")
    first.release()
    assert done.returncode == 3
    assert str(os.getpid()) in last_line(done)


def test_a_run_is_not_begun_over_another_by_mistake(copy: Path) -> None:
    done = learner(copy)
    assert done.returncode == 3
    assert "--resume" in last_line(done)


def test_a_resume_under_another_run_section_is_refused_with_both_digests(copy: Path) -> None:
    done = learner(copy, "--resume", "-s", "run.seed=99")
    assert done.returncode == 2
    assert "another [run] section" in last_line(done)


def test_a_dataset_row_without_its_column_is_one_line(tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1+2?", "solution": "3"}\n' * 20)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[learner.prompts]\nsource = "jsonl"\npath = "{data}"\n')
    command = [runs.ISENTROPE, "learner", str(recipe), "--run-folder", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "no column 'answer'" in last_line(done)
    assert "solution" in last_line(done)
