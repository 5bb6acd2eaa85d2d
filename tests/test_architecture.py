"""The three packages, their names and their arrows."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
PACKAGES = ("actor", "learner", "common")
FILES = sorted(path for package in PACKAGES for path in (TOP / package).rglob("*.py"))


def test_the_arrows_between_the_packages_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=TOP,
    )
    assert done.returncode == 0, done.stdout


def test_the_packages_come_from_one_place_and_from_this_project() -> None:
    homes = {Path(str(__import__(name).__file__)).resolve().parent.parent for name in PACKAGES}
    assert homes == {TOP}
    provided = importlib.metadata.packages_distributions()
    for name in PACKAGES:
        assert set(provided.get(name, ["isentrope"])) == {"isentrope"}


def test_no_file_shadows_a_module_of_the_standard_library() -> None:
    shadows = [path for path in FILES if path.stem in sys.stdlib_module_names]
    assert not [path for path in shadows if not path.stem.startswith("__")]


def test_a_package_is_a_docstring_without_imports() -> None:
    for package in PACKAGES:
        text = (TOP / package / "__init__.py").read_text(encoding="utf-8")
        assert text.startswith('"""')
        assert "import " not in text


@pytest.mark.parametrize(
    "module",
    ["actor.cli", "actor.config", "learner.cli", "learner.config", "common.run", "common.recipe"],
)
def test_commands_and_configuration_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'vllm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_nothing_is_pickled_and_no_remote_code_is_trusted() -> None:
    words = ("import pickle", "from pickle", "cloudpickle", "trust_remote_code=True")
    # torch's ways to do it without saying so: files, objects between ranks, its own checkpoints
    words += ("torch.save(", "torch.load(", "_object_list(", "_object(", "distributed.checkpoint")
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path


def test_the_scripts_can_be_run() -> None:
    for name in (
        "scripts/demo",
        "scripts/test",
        "scripts/check",
        "scripts/bench",
        "scripts/experiment",
        ".ci/run",
    ):
        assert (TOP / name).stat().st_mode & 0o111, name
