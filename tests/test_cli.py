"""The umbrella command: fast help, one line for every error, no command breaks the others."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "run",
    "status",
    "plot",
    "doctor",
    "init",
    "audit",
    "actor",
    "learner",
    "replay",
    "eval",
)
ISENTROPE = "import sys; sys.argv[0] = 'isentrope'; from common.cli import main; main()"
HEAVY = "{'torch', 'vllm', 'transformers', 'matplotlib', 'rich', 'numpy.testing'}"


def isentrope(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ISENTROPE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=60,
    )


def imported_by(*arguments: str) -> str:
    """The heavy modules that a command has imported when it ends."""
    code = (
        f"import sys\nsys.argv = ['isentrope', *{list(arguments)!r}]\n"
        "from common.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print(*sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stderr.splitlines()[-1]


def test_the_help_shows_every_command_with_one_line_each() -> None:
    done = isentrope("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert "cannot be loaded" not in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_without_heavy_imports(command: str) -> None:
    assert imported_by(command, "--help") == ""
    assert "Usage: isentrope" in isentrope(command, "--help").stdout


def test_the_help_imports_nothing_heavy() -> None:
    assert imported_by("--help") == ""


@pytest.mark.parametrize("command", ["run", "learner", "actor"])
def test_a_configuration_error_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    more = ["--run-folder", str(tmp_path)] if command == "learner" else []
    wrong = "-s", ("actor.slotz=1" if command == "actor" else "learner.lerning_rate=1")
    assert imported_by(command, "tiny", *more, *wrong) == ""
    done = isentrope(command, "tiny", *more, *wrong)
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_and_configuration_errors_answer_within_four_tenths_of_a_second() -> None:
    bare = _median_s([sys.executable, "-c", "pass"])
    for arguments in (["--help"], ["run", "tiny", "-s", "learner.lerning_rate=1"]):
        assert _median_s([sys.executable, "-c", ISENTROPE, *arguments]) < bare + 0.4


def _median_s(command: list[str]) -> float:
    return statistics.median(_seconds(command) for _ in range(5))


def _seconds(command: list[str]) -> float:
    """Of the processor, not of the clock: how busy the machine is does not matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_an_unknown_recipe_is_one_line_and_exit_code_2() -> None:
    done = isentrope("run", "tinny")
    assert done.returncode == 2
    assert done.stderr.startswith("isentrope: no recipe 'tinny'; did you mean tiny?")
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_file_that_is_not_there_is_said_to_be() -> None:
    done = isentrope("run", "mine/recipe.toml")
    assert done.returncode == 2
    assert done.stderr == "isentrope: no recipe 'mine/recipe.toml': there is no such file\n"


def test_the_help_says_of_every_command_a_whole_sentence() -> None:
    said = " ".join(isentrope("--help").stdout.partition("Commands:")[2].split())
    assert "..." not in said
    assert "Generate and grade rollouts for a learner, until it or SIGTERM says stop." in said


def test_a_missing_model_folder_is_one_line_that_names_what_there_is() -> None:
    done = isentrope("run", "tiny", "-s", "run.model=/nowhere")
    assert done.returncode == 2
    assert "no model at '/nowhere'" in done.stderr
    assert "tiny" in done.stderr


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[run]\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    (tmp_path / "file").write_text("")
    done = isentrope("plot", str(tmp_path), "--out", str(tmp_path / "file" / "plots"))
    assert done.returncode == 2
    place = tmp_path / "file" / "plots"
    assert done.stderr == f"isentrope: {place}: Not a directory; name a folder\n"


def test_a_folder_is_no_recipe_and_a_file_no_run_to_watch(tmp_path: Path) -> None:
    done = isentrope("run", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path} is a folder" in done.stderr
    (tmp_path / "file").write_text("")
    done = isentrope("dash", str(tmp_path / "file"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'file'} is a file" in done.stderr


def test_an_empty_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("# nothing\n")
    done = isentrope("run", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is nothing in it" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_command_that_cannot_be_imported_leaves_the_others_alone(tmp_path: Path) -> None:
    facts = tmp_path / "broken-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[isentrope.commands]\nodd = no_such_module:command\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); {ISENTROPE}"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert "odd" in done.stdout
    assert "cannot be loaded: ModuleNotFoundError" in done.stdout
    assert "\n  run " in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, "odd", "--x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no_such_module" in done.stderr


@pytest.mark.parametrize("command", ["status", "plot", "audit", "replay"])
def test_a_folder_without_a_run_is_said_to_be_none(command: str, tmp_path: Path) -> None:
    done = isentrope(command, str(tmp_path))
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr
    assert len(done.stderr.splitlines()) == 1
