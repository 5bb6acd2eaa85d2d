"""`isentrope prompts`: what would be asked, without training."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from common import models
from common.errors import ConfigError
from learner.prompts.look import lost
from learner.prompts_cli import prompts


def shown(*arguments: str) -> tuple[str, list[dict[str, Any]]]:
    done = CliRunner().invoke(prompts, ["tiny", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stderr, json.loads(done.stdout)["prompts"]  # one line


def test_prompts_are_shown_word_for_word_with_their_tokens_and_golds() -> None:
    text, found = shown("-n", "3")
    assert len(found) == 3
    first = found[0]
    assert first["text"] in text
    assert first["tokens"] == len(first["text"]), "a token a character"
    assert sum(map(int, first["text"].rstrip("?").split("+"))) == int(first["gold"])
    assert (first["source"], first["template"]) == ("arithmetic", "plain")
    assert first["grading"] == ["1 × correct (exact)"]


def test_one_template_of_a_users_file_or_of_the_shipped_can_be_looked_at() -> None:
    tiny = ("-s", 'learner.prompts.templates={file="tiny"}')
    _, found = shown("-n", "12", *tiny)
    assert len({one["template"] for one in found}) > 2
    _, found = shown("--template", "begun", *tiny)
    assert {one["template"] for one in found} == {"begun"}
    assert all(one["text"].endswith("?,") for one in found)


def test_evaluations_and_a_curriculum_are_shown_as_they_begin() -> None:
    _, held = shown("--heldout", "-n", "2", "-s", 'learner.prompts.templates={file="tiny"}')
    assert {one["template"] for one in held} == {"bare"}
    assert all("heldout" in one["problem"] for one in held)
    _, drawn = shown("-n", "9", "-s", "learner.prompts.curriculum={pool=9}")
    assert {one["problem"] for one in drawn} == {f"train/0/{i}" for i in range(9)}


def test_an_unknown_template_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no template 'boxt'; did you mean 'boxed'"):
        shown("--template", "boxt")


def test_its_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom learner.prompts_cli import prompts\n"
        "prompts(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "word for word" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_signs_that_a_tokenizer_does_not_know_are_named_once_each() -> None:
    tiny = models.find("tiny")
    assert lost(tiny, ["1+2?", "3 + 4 =?", "Ann has 1 apple, é, 2"]) == "aehlnps"
    assert lost(tiny, ["1+2?"]) == ""
    assert lost(tiny / "nothing", ["what is 1+2?"]) == ""
