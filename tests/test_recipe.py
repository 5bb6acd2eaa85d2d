"""Recipes are read strictly: what is wrong is said in one line, with the nearest valid name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from actor.config import ActorConfig
from common import recipe
from common.config import LOCAL, RunConfig
from common.errors import ConfigError
from learner.config import LearnerConfig

ALL = {"run": RunConfig, "actor": ActorConfig, "learner": LearnerConfig}


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe.load(source, ALL, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_loads(name: str) -> None:
    assert set(recipe.load_all(name)) == {"run", "actor", "learner"}


def test_an_empty_recipe_is_the_vetted_defaults(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, ""), ALL)
    assert loaded == {"run": RunConfig(), "actor": ActorConfig(), "learner": LearnerConfig()}


def test_an_override_wins_over_the_file_and_may_be_a_bare_string(tmp_path: Path) -> None:
    source = write(tmp_path, "[learner]\nlr = 1e-3\n[actor]\nengine = 'torch'\n")
    loaded = recipe.load(source, ALL, ["learner.lr=2e-6", "actor.engine=scripted"])
    assert msgspec.structs.asdict(loaded["learner"])["lr"] == 2e-6
    assert msgspec.structs.asdict(loaded["actor"])["engine"] == "scripted"


def test_an_override_may_be_a_list_of_methods(tmp_path: Path) -> None:
    loaded = recipe.load(
        write(tmp_path, ""), ALL, ['learner.methods=[{type="entropy_bonus", coefficient=0.01}]']
    )
    (method,) = msgspec.structs.asdict(loaded["learner"])["methods"]
    assert method.coefficient == 0.01


def test_an_override_may_reach_into_a_list_of_methods() -> None:
    loaded = recipe.load("isentropic", ALL, ["learner.methods.0.target=0.25"])
    (method,) = msgspec.structs.asdict(loaded["learner"])["methods"]
    assert method.target == 0.25


def test_none_says_that_a_value_is_absent(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, '[learner]\nclip_low = "none"\n'), ALL)
    assert msgspec.structs.asdict(loaded["learner"])["clip_low"] is None


def test_a_process_reads_its_own_sections_and_tolerates_the_others(tmp_path: Path) -> None:
    source = write(tmp_path, "[run]\nseed = 3\n[learner]\nlr = 1e-3\n")
    assert recipe.load(source, {"run": RunConfig}) == {"run": RunConfig(seed=3)}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.lerning_rate=1", "learner.lerning_rate: unknown; did you mean learner.lr?"),
        ("learner.group_sise=8", "learner.group_sise: unknown; did you mean learner.group_size?"),
        ("learner.eval.problms=1", "did you mean learner.eval.problems?"),
        ("lerner.lr=1", "lerner: unknown table; did you mean learner?"),
        ("learner.lr=fast", "learner.lr: expected a number, got a string"),
        ("learner.steps=1.5", "learner.steps: expected a whole number"),
        ("learner.steps=-1", "learner.steps: expected a whole number >= 0"),
        ("learner.max_lag=-1", "learner.max_lag: expected a whole number >= 0"),
        ("learner.lr=0", "learner.lr: expected a number > 0"),
        ("actor.engine=vlm", "actor.engine: unknown 'vlm'; did you mean vllm?"),
        ("learner.group_size=1", "learner.group_size = 1: grpo compares the rollouts of a group"),
        ("learner.prompts.source=jsonl", "learner.prompts.path is empty"),
        ("learner.lr=0", "-s learner.lr=0: learner.lr"),
        ("learner.lease_s=1", "learner.lease_s = 1: must be longer than three heartbeats"),
        ("run.store=s3", 'run.store = "s3": expected "redis", "file:FOLDER"'),
        ("run.learner=5555", "run.learner: expected a string, got a whole number"),
        ("run.failpoint=after_apend:3", "the nearest is 'after_append'"),
        ('learner.methods=[{type="entropy_bonos"}]', "did you mean entropy_bonus?"),
        ('learner.methods=[{type="entropy_bonus", coef=1}]', "learner.methods[0].coef: unknown"),
        ("learner.methods=3", "learner.methods: expected a list"),
        ("learner.methods.0.target=1", "-s learner.methods.0.target=1: learner.methods"),
        ("learner.lr", "expected section.key=value"),
        ("lr=3", "expected section.key=value"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_path(
    tmp_path: Path, override: str, said: str
) -> None:
    message = refusal(write(tmp_path, ""), override)
    assert said in message


def test_a_place_that_a_list_does_not_have_is_refused() -> None:
    said = "1 is no place in a list of 1; 0 is the first"
    assert said in refusal("steer", "learner.methods.1.form=released")
    assert "first is no place" in refusal("steer", "learner.methods.first.form=released")


def test_a_mistake_in_the_file_names_the_file(tmp_path: Path) -> None:
    source = write(tmp_path, "[learner]\nlerning_rate = 1\n")
    assert refusal(source, "learner.steps=3").startswith(f"{source}: learner.lerning_rate: unknown")


def test_a_file_that_is_no_toml_is_said_to_be_none(tmp_path: Path) -> None:
    assert "not a TOML file" in refusal(write(tmp_path, "[learner\n"))


def test_an_unknown_recipe_is_answered_with_the_names_there_are() -> None:
    message = refusal("tinny")
    assert "did you mean tiny?" in message
    assert "scripted" in message


def test_impossible_combinations_are_refused_with_what_to_do(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, ""), "learner.loss=reinforce", "learner.updates_per_batch=2")
    assert 'take 1, or loss = "ppo"' in message


def test_the_digest_changes_with_what_is_shared_and_not_with_what_is_local() -> None:
    base = recipe.digest(RunConfig())
    assert recipe.digest(RunConfig(redis="redis://other:1", learner="tcp://a:1")) == base
    for field in set(RunConfig.__struct_fields__) - set(LOCAL):
        other = {"seed": 9, "weights_dtype": "bf16", "max_frame_mb": 9}.get(field, "file:elsewhere")
        assert recipe.digest(msgspec.structs.replace(RunConfig(), **{field: other})) != base


def test_a_frozen_recipe_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    overrides = (
        'learner.methods=[{type="entropy_bonus"}]',
        "learner.prompts.grader=python:mine:function",
        'learner.prompts.grader_options={after="#", "odd key"="q\\"uote"}',
        "learner.clip_high=none",
    )
    frozen = write(tmp_path, recipe.freeze("tiny", overrides))
    assert recipe.load_all(frozen) == recipe.load_all("tiny", overrides)


def test_a_frozen_recipe_leaves_out_what_belongs_to_one_process(tmp_path: Path) -> None:
    text = recipe.freeze("tiny", ["run.redis=redis://h:1/0", "run.failpoint=after_append:3"])
    assert "redis://" not in text
    assert "failpoint" not in text


def test_configuration_errors_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom common import recipe\nfrom common.errors import ConfigError\n"
        "try: recipe.load_all('tiny', ['learner.lerning_rate=1'])\n"
        "except ConfigError: print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))\n"
        "else: print('accepted')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == ""


def _optional_table(hint: Any) -> bool:
    kinds = get_args(hint)
    return type(None) in kinds and any(
        isinstance(kind, type) and issubclass(kind, msgspec.Struct) for kind in kinds
    )


def test_the_configuration_stays_small() -> None:
    """Two sides of one promise: few fields, and none of them without a reader."""
    structs = [RunConfig, ActorConfig, LearnerConfig]
    nested = [
        type(value)
        for struct in structs
        for value in msgspec.structs.asdict(struct()).values()
        if isinstance(value, msgspec.Struct)
    ]
    fields = [
        field
        for struct in (*structs, *nested)
        for field, hint in get_type_hints(struct).items()
        if not _optional_table(hint)  # off unless a recipe has it
    ]
    assert len(fields) <= 105
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("actor", "learner", "common")
        for path in (Path(recipe.__file__).parent.parent / package).rglob("*.py")
        if path.name != "config.py"
    )
    unread = [
        field for field in fields if f".{field}" not in sources and f'"{field}"' not in sources
    ]
    assert not unread, f"nobody reads: {', '.join(unread)}"
