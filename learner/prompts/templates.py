"""Prompt augmentation: many ways to ask for the same thing, one of them for each group of rollouts.

Source: arXiv 2602.03190 (PrAg-PO). The templates are data (templates.toml); users add files of
their own. Which one a problem is asked in is drawn uniformly, as a pure function of (seed, epoch,
problem), so that it is the same after a restart and for all rollouts of a group. What a template
lets an answer begin with is part of the prompt, and is not learned from.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from pathlib import Path

from common import recipe
from common.config import NotNegative, Section
from common.errors import ConfigError
from common.wire import GradePart

PLACE = "{problem}"
SHIPPED = Path(__file__).with_name("templates.toml")
FORMAT = "format"  # name of the part of the reward, and of its grader

# An answer ends before the first of these for every template alike: what a model writes behind its
# own end is not looked at.
STOP_WORDS = ("</s>", "<|im_end|>", "<|endoftext|>", "[END]", "</answer>")


class TemplatesConfig(Section, frozen=True, kw_only=True):
    """Each problem is asked in one of many templates (arXiv 2602.03190)."""

    file: str = ""  # your own templates, TOML, before those that are shipped; or "tiny"
    use: tuple[str, ...] = ()  # names; (): all of `file`, or the 13 that are shipped
    evaluation: str = ""  # the one that evaluations ask in; "": the first of them
    format_weight: NotNegative = 1.0  # × the share of a template's marks that are right; 0: no part
    gate_by_acc: bool = False  # the format counts only where the answer is right

    def check(self) -> None:
        Templates(self, 0)


class Template(Section, frozen=True, kw_only=True):
    user: str = PLACE
    system: str = ""
    prefill: str = ""
    marks: tuple[str, ...] = ()  # each must stand exactly once in what the model wrote


class Templates:
    """Raises ConfigError: no such file or template, a template that cannot work."""

    def __init__(self, config: TemplatesConfig, seed: int) -> None:
        own = _read(_located(config.file)) if config.file else {}
        known = {**_read(SHIPPED), **own}
        self.names = config.use or tuple(own or known)
        for name in (*self.names, *filter(None, [config.evaluation])):
            if name not in known:
                raise ConfigError(f"use: no template {name!r}{_nearest(name, list(known))}")
        self.evaluation = config.evaluation or self.names[0]
        self._known, self._config, self._seed = known, config, seed

    def __getitem__(self, name: str) -> Template:
        return self._known[name]

    def pick(self, epoch: int, problem: str) -> str:
        """The template's name: uniform, and pure in (seed, epoch, problem)."""
        counter = f"{self._seed}/{epoch}/{problem}".encode()
        digest = hashlib.blake2b(counter, digest_size=8, key=b"template").digest()
        return self.names[int.from_bytes(digest, "big") * len(self.names) >> 64]

    def part(self, name: str) -> tuple[GradePart, ...]:
        """The part of the reward that the template adds: none, or its format score."""
        weight, gated = self._config.format_weight, self._config.gate_by_acc
        if not weight:
            return ()
        marks = {"marks": list(self._known[name].marks)}
        part = GradePart(name=FORMAT, grader=FORMAT, weight=weight, options=marks, gated=gated)
        return (part,)


def _located(file: str) -> Path:
    shipped = SHIPPED.with_name(f"templates_{Path(file).name}.toml")
    return shipped if shipped.is_file() and Path(file).name == file else Path(file).expanduser()


def _read(path: Path) -> dict[str, Template]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"file: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file: {path} is no TOML file: {error}") from None
    if not tables:
        raise ConfigError(f"file: {path} has no template")
    return {name: _template(path, name, table) for name, table in tables.items()}


def _template(path: Path, name: str, table: object) -> Template:
    if not isinstance(table, dict):
        raise ConfigError(f"file: {path}: {name} is not a table: templates look like [{name}]")
    try:
        found = recipe.decode(name, Template, table)
    except ConfigError as error:
        raise ConfigError(f"file: {path}: {error}") from None
    assert isinstance(found, Template)
    if found.user.count(PLACE) != 1:
        raise ConfigError(
            f"file: {path}: template {name!r} has not one place for the problem: put {PLACE} "
            f"into its `user`, once (it is there {found.user.count(PLACE)} times)"
        )
    return found


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
