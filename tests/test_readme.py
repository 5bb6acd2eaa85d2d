"""The README speaks of what is there: every file of its tree, every metric, every command."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

from common.metrics import GLOSSARY

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")
TREE = README.split("## Files")[1].split("```")[1]
UNNAMED = {"__init__.py", "__main__.py"}


def named_files() -> set[Path]:
    """Files and folders of the tree: a line that is not indented names the folder of the next."""
    found, folder = set(), TOP
    for line in TREE.splitlines():
        words = re.split(r"\s{2,}", line.strip())[0].split()
        if words and not line.startswith(" "):
            folder = TOP / words[0] if words[0].endswith("/") else TOP
            found |= {TOP / word for word in words if (TOP / word).exists()}
            assert (TOP / words[0]).exists(), f"README names {words[0]}, which is not there"
        elif words:
            found |= {folder / word for word in words}
    return found


def test_every_file_of_the_tree_is_there() -> None:
    assert not [str(path) for path in named_files() if not path.exists()]


def test_every_module_of_the_packages_is_in_the_tree() -> None:
    named = named_files()
    for package in ("actor", "learner", "common"):
        for path in (TOP / package).glob("*.py"):
            assert path.name in UNNAMED or path in named, f"README's tree lacks {path}"


def test_every_metric_is_explained_as_in_the_glossary() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert {name: rows.get(name) for name in GLOSSARY} == GLOSSARY


def test_every_command_is_mentioned() -> None:
    for command in entry_points(group="isentrope.commands"):
        assert f"isentrope {command.name}" in README or f"`{command.name}`" in README, command.name
