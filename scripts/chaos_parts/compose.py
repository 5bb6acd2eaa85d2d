"""The commands of docker/compose.yaml, as a shell on a host would start them without an engine.

What compose does is done here: variables are filled in, an image's entrypoint goes in front,
volumes and secrets are where the file says by their paths (textually: `/runs` is a folder of ours).
What a host is (its network, its names) is up to hosts.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).resolve().parents[2]
FILE = TOP / "docker" / "compose.yaml"
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::-([^}]*))?\}")


def command(service: str, variables: Mapping[str, str], places: Mapping[str, Path]) -> list[str]:
    """Entrypoint and command of a service; `places`: where paths of the container are here."""
    described = yaml.safe_load(FILE.read_text())["services"][service]
    entry = described.get("entrypoint") or _entrypoint(described)
    return [_fill(word, variables, places) for word in [*entry, *described["command"]]]


def environment(service: str, variables: Mapping[str, str]) -> dict[str, str]:
    described = yaml.safe_load(FILE.read_text())["services"][service]
    found = described.get("environment", {})
    return {key: _fill(str(value), variables, {}) for key, value in found.items()}


def _entrypoint(described: dict[str, Any]) -> list[str]:
    """Of the image, by its Dockerfile."""
    text = (TOP / described["build"]["dockerfile"]).read_text()
    found = re.search(r'^ENTRYPOINT \["(.+)"\]$', text, re.MULTILINE)
    assert found is not None, "the image says what it starts"
    return found[1].split('", "')


def _fill(word: str, variables: Mapping[str, str], places: Mapping[str, Path]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1]) or match[2] or ""

    filled = _VARIABLE.sub(value, word)
    for path, here in places.items():
        filled = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w-])", str(here), filled)
    return filled
