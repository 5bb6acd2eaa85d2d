"""`[learner.synthesis]`: what is proposed, who says what is right, what the pool takes."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Literal

import msgspec

from common.config import NaturalInt, NotNegative, Positive, PositiveInt, Section, Share, need

PROMPT = """\
Here is the solution of a problem that you are not shown:

{response}

Write a problem, complete in itself, that this solution answers. Do not give the answer away. \
Write the problem between ``` and ```."""

Part = Annotated[float, msgspec.Meta(ge=0, le=1)]


class SynthesisConfig(Section, frozen=True, kw_only=True):
    """Without this table there is no synthesis. Lengths of queues and of lives bound its memory."""

    # what the policy is asked, and what of its answer is the problem; a regex has 8,192 characters
    # and 0.1 s; what takes it longer is not judged
    prompt: str = PROMPT  # {problem}, {response}: a parent and a right response to it; {stem}
    stem: str = ""  # regex: its first group in the parent's text is {stem}
    extract: str = r"```(?:[a-z]*\n)?(.+?)```"  # regex: its first group in the response …
    statement: str = "{proposal}"  # … is {proposal} in this, the new problem's text; {stem}
    proposals: Annotated[int, msgspec.Meta(ge=2)] = 8  # rollouts of a propose ticket
    max_tokens: NaturalInt = 0  # of a proposal; 0: learner.max_tokens
    temperature: Positive = 1.0

    # the label
    label: Literal["inherited", "program_verified", "consensus"] = "inherited"
    labeller: str = ""  # program_verified by "arithmetic", or python:MODULE:FUNCTION
    answer: str = (
        r"(-?\d+(?:\.\d+)?)\D*$"  # consensus: regex, its first group is a response's answer
    )
    auditor: str = ""  # like labeller: a second opinion on a sample of the labels
    audited: Part = 0.02  # share of the labels that it is asked about
    max_label_error: Part = 0.1  # estimated from them; above it synthesis ends

    # difficulty, from `rollouts` answers to each: share of right ones
    parents: tuple[Part, Part] = (0.125, 0.5)  # of a problem that others are made from
    accept: tuple[Part, Part] = (0.25, 0.625)  # of a problem that the pool takes
    rollouts: PositiveInt = 8
    depth: PositiveInt = 1  # 2: problems made from made ones, …

    # the pool and its bounds
    ratio: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.25  # of main prompts from the pool
    size: PositiveInt = 256
    life: PositiveInt = 32  # steps
    uses: PositiveInt = 2
    seeds: PositiveInt = 64  # parents that wait; the oldest make room
    proposing: PositiveInt = 2  # propose tickets open at once
    scoring: PositiveInt = 8  # score tickets open at once
    patience: PositiveInt = 32  # propose tickets in a row that bring nothing: then ever fewer

    # the proposer's reward
    reward: Literal["diversity", "svs", "r_zero"] = "diversity"
    smoothing: Share = 0.9  # diversity: of the baseline …
    clip: Positive = 1.0  # … and the largest deviation from it
    duplicate: NotNegative = 0.5  # taken off for a duplicate
    unsolved: NotNegative = 0.5  # taken off for a problem that nobody solves
    unusable: float = 0.0  # reward of what is no problem at all
    proposers: NaturalInt = 2  # propose groups of a step at most; 0: the proposer is not trained
    max_lag: NaturalInt | None = None  # of these groups; None: 2 × learner.max_lag

    def lag_limit(self, main: int) -> int:
        return 2 * main if self.max_lag is None else self.max_lag

    def check(self) -> None:
        for name in ("stem", "extract", "answer"):
            self._check_regex(name)
        self._check_fields("prompt", {"problem", "response", "stem"})
        self._check_fields("statement", {"proposal", "stem"})
        need("{proposal}" in self.statement, "statement: needs a place for {proposal}")
        need(bool(self.stem) or "{stem}" not in self.prompt + self.statement, "stem is empty")
        for name in ("parents", "accept"):
            low, high = getattr(self, name)
            need(low <= high, f"{name} = [{low:g}, {high:g}]: the smaller one comes first")
        self._check_label()

    def _check_label(self) -> None:
        for name in ("labeller", "auditor"):
            need(
                re.fullmatch(r"|arithmetic|python:[\w.]+:\w+", getattr(self, name)) is not None,
                f'{name} = "{getattr(self, name)}": expected "arithmetic" or '
                "python:MODULE:FUNCTION",
            )
        need(
            self.label != "program_verified" or self.labeller != "",
            'labeller is empty: label = "program_verified" asks it',
        )
        need(
            self.label == "program_verified" or self.labeller == "",
            f'labeller: label = "{self.label}" asks none; a second opinion is `auditor`',
        )
        need(
            self.auditor == "" or self.auditor != self.labeller,
            "auditor: the labeller itself is no second opinion",
        )
        need(
            self.reward != "r_zero" or self.label == "consensus",
            'reward = "r_zero": it is of the share that agrees; take label = "consensus"',
        )

    def _check_regex(self, name: str) -> None:
        from common import patterns  # its library is not for every command

        pattern = getattr(self, name)
        groups = patterns.groups(name, pattern)
        need(not pattern or groups >= 1, f"{name}: needs a group, (…), around what it finds")

    def _check_fields(self, name: str, known: set[str]) -> None:
        text, brace = getattr(self, name), "write {{ for a brace"
        try:
            found = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
        except ValueError as error:
            need(False, f"{name}: {error}; {brace}")
        odd = sorted(found - known)
        there = ", ".join(sorted(known))
        need(not odd, f"{name}: no {{{odd[0] if odd else ''}}}; there are {there}; {brace}")
        try:
            text.format(**dict.fromkeys(known, "text"))
        except (ValueError, LookupError) as error:
            need(False, f"{name}: {error}; {brace}")
