"""`[learner.prompts]`: what is asked, in what words, in what order, and how answers are graded."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

import msgspec

from common import grading
from common.config import Positive, PositiveInt, Section, need
from common.errors import ConfigError
from common.proposals import PREFIX
from learner.prompts.templates import FORMAT, TemplatesConfig

FILES = ("jsonl", "parquet", "saved")
Kind = Literal["arithmetic", "jsonl", "parquet", "saved", "reasoning_gym"]


class PartConfig(Section, frozen=True, kw_only=True):
    """One part of the reward, which is the sum of weight × score over the parts."""

    name: str
    grader: str = "exact"
    weight: float = 1.0
    options: dict[str, Any] = {}
    gated: bool = False  # counts only where the answer is right


class MixedSource(Section, frozen=True, kw_only=True):
    """One of several sources. What it leaves out from `instruction` on is as [learner.prompts] has
    it; with a grader, options or parts of its own it takes none of the options and parts there.
    """

    weight: Positive = 1.0  # share of the draws: weight / sum of the weights
    name: str = ""  # in tickets and metrics; "": that of the file or task
    source: Kind = "arithmetic"
    path: str = ""
    heldout_path: str = ""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    task: str = ""
    options: dict[str, Any] = {}
    instruction: str = ""
    prefill: str = ""
    grader: str = ""
    grader_options: dict[str, Any] = {}
    parts: tuple[PartConfig, ...] = ()


class CurriculumConfig(Section, frozen=True, kw_only=True):
    """Which problem comes next, by how well the policy did on it: curriculum.py."""

    rule: Literal["target", "prioritised", "learnability"] = "learnability"
    candidates: PositiveInt = 64  # problems looked at for one draw
    pool: PositiveInt = 4096  # so many problems of an endless source are gone back to
    decay: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    fade: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.99
    epsilon: Positive = 0.02  # added to every weight: the solved and the hopeless come again
    difficulty: str = ""  # target: a column with 0…100; "": 100 (1 - s)
    start: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0  # target: T at first
    aim: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5  # target: the accuracy to hold, by …
    step: Positive = 50.0  # … T += step tanh(sensitivity (accuracy - aim)) after every step
    sensitivity: Positive = 2.0


class PromptsConfig(Section, frozen=True, kw_only=True):
    source: Kind = "arithmetic"
    path: str = ""  # jsonl, parquet: the file; saved: the folder that `save_to_disk` wrote
    heldout_path: str = ""  # held-out rows; "": a tenth of the questions of `path`
    prompt_column: str = "prompt"  # "a.b": field b of column a
    answer_column: str = "answer"
    task: str = ""  # reasoning_gym: its name …
    options: dict[str, Any] = {}  # … and what it takes
    sources: tuple[MixedSource, ...] = ()  # several at once, in the place of all of the above
    chat: bool | Literal["auto"] = "auto"  # by the model's chat template; auto: if it has one
    system: str = ""  # what the chat begins with; "": what the template says
    instruction: str = ""  # a line behind every question
    prefill: str = ""  # what every answer begins with, before the first sampled token
    templates: TemplatesConfig | None = None
    curriculum: CurriculumConfig | None = None
    grader: str = "exact"
    grader_options: dict[str, Any] = {}
    parts: tuple[PartConfig, ...] = ()  # in place of `grader`; the first is the raw correctness

    def check(self) -> None:
        self._check_names()
        self._check_all()

    def _check_all(self) -> None:
        if self.sources:
            self._check_mixture()
        else:
            self._check_source()
        self._check_grading()
        self._check_templates()

    def each(self) -> list[PromptsConfig]:
        """One for each source, as if it were the only one."""
        return [_alone(self, mixed) for mixed in self.sources] or [self]

    def _check_names(self) -> None:
        """Problems are called by their source, and those that the policy proposed by PREFIX."""
        for source in self.sources or (self,):
            name = getattr(source, "name", "") or PurePath(source.path).stem
            need(
                name.split("/")[0] != PREFIX,
                f'"{name}" is what proposed problems are called: rename the file, or give the '
                "source another `name` in [[learner.prompts.sources]]",
            )

    def _check_source(self) -> None:
        files, gym = self.source in FILES, self.source == "reasoning_gym"
        need(not files or self.path != "", f'path is empty: source "{self.source}" reads it')
        need(files or not self.path, f'path: source "{self.source}" reads no file')
        need(files or not self.heldout_path, f'heldout_path: source "{self.source}" reads no file')
        need(not gym or self.task != "", 'task is empty: source "reasoning_gym" makes it')
        need(gym or not self.task, f'task: source "{self.source}" has none')
        need(gym or not self.options, f'options: source "{self.source}" takes none')

    def _check_mixture(self) -> None:
        plain = PromptsConfig()
        for name in MIXED:
            need(
                getattr(self, name) == getattr(plain, name),
                f"{name}: [[learner.prompts.sources]] take its place; give it there",
            )
        total = sum(mixed.weight for mixed in self.sources)
        for index, (mixed, alone) in enumerate(zip(self.sources, self.each(), strict=True)):
            need(
                mixed.weight / total >= LEAST_SHARE,
                f"sources[{index}].weight = {mixed.weight:g}: less than a thousandth of the sum "
                f"({total:g})",
            )
            try:
                alone._check_all()
            except ConfigError as error:
                raise ConfigError(f"sources[{index}].{error}") from None

    def _check_templates(self) -> None:
        if self.templates is None:
            return
        need(not self.system, "system: the templates bring their own; leave it out")
        need(
            all(not alone.prefill for alone in self.each()),
            "prefill: the templates bring their own; leave it out",
        )
        taken = any(part.name == FORMAT for alone in self.each() for part in alone.parts)
        need(
            not taken or self.templates.format_weight == 0,
            'parts: the templates add a part "format"; name yours otherwise',
        )

    def _check_grading(self) -> None:
        need(
            not self.parts or (self.grader == "exact" and not self.grader_options),
            "parts: they take the place of `grader` and `grader_options`; leave these out",
        )
        names = [part.name for part in self.parts]
        need(all(names), "parts: every part needs a name")
        need(len(set(names)) == len(names), f"parts: a name comes twice among {', '.join(names)}")
        graders = [(part.grader, part.options) for part in self.parts]
        for grader, options in graders or [(self.grader, self.grader_options)]:
            try:
                grading.check(grader, options)
            except ConfigError as error:
                raise ConfigError(f"{'parts' if self.parts else 'grader'}: {error}") from None


LEAST_SHARE = 1e-3  # of the draws: a mixture comes in blocks of a thousand
MIXED = ("source", "path", "heldout_path", "prompt_column", "answer_column", "task", "options")


def _alone(config: PromptsConfig, mixed: MixedSource) -> PromptsConfig:
    given = {name: getattr(mixed, name) for name in MIXED}
    given["instruction"] = mixed.instruction or config.instruction
    given["prefill"] = mixed.prefill or config.prefill
    if mixed.grader or mixed.grader_options or mixed.parts:
        given["grader"] = mixed.grader or ("exact" if mixed.parts else config.grader)
        given |= {"grader_options": mixed.grader_options, "parts": mixed.parts}
    return msgspec.structs.replace(config, sources=(), **given)
