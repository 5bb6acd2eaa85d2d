"""`[learner.feedback]` and `[learner.intervene]`: what comes after a first answer, and what a step
says about it.

    reward of an episode      gamma^turn × correctness of its last answer, other parts as they are
    accuracy by turn          share of the episodes solved at turn k or before    arXiv 2506.11930
    hints                     tokens put in / tokens sampled where hints are asked for; 2510.04204
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from common.config import NaturalInt, NotNegative, Positive, PositiveInt, Section, need
from common.episodes import HINT_SHARE, SOLVED, accuracy_by_turn
from common.wire import Group, Rollout

Trigger = Literal["wrong", "all_wrong", "repeat", "long"]
Discount = Annotated[float, msgspec.Meta(gt=0, le=1)]


class FeedbackConfig(Section, frozen=True, kw_only=True):
    """Several turns: a wrong answer is told so, and the policy answers again."""

    turns: PositiveInt = 3  # 1: as without this table
    voice: str = ""  # python:MODULE:FUNCTION, or an endpoint http(s)://…; "": only `wrong`
    wrong: str = "That answer is wrong. Find the mistake and answer again."  # {question}: again
    model: str = ""  # of the endpoint
    key: str = ""  # environment variable of the actors that holds the endpoint's key
    timeout_s: Positive = 10.0  # for what a voice says; then `wrong` is said
    words: PositiveInt = 64  # tokens of what it says
    gamma: Discount = 0.9
    temperature_step: NotNegative = 0.0  # T_k = min(step × k, 1.5), at least …; 0: the batch's
    temperature_floor: Positive = 0.3
    tries: PositiveInt = 1  # answers drawn at later turns; one that was not given before is taken
    train_tried: bool = False  # train on turns with several tries, which are no plain samples
    episode_s: Positive = 120.0  # of all turns; then the group is asked elsewhere
    evaluate: bool = False  # held-out problems get as many turns

    def check(self) -> None:
        _check_voice("voice", self.voice, self.model, self.key)
        need(self.wrong.strip() != "", "wrong is empty: say that an answer is wrong")


class InterveneConfig(Section, frozen=True, kw_only=True):
    """Hints in finished answers, for supervised training: `interventions.jsonl`."""

    triggers: tuple[Trigger, ...] = ("wrong",)  # with a judge: what it is asked about; (): all
    hint: str = "\nWait, something is off. Let me go through it again.\n"
    judge: str = ""  # python:MODULE:FUNCTION, or an endpoint http(s)://…
    model: str = ""
    key: str = ""
    timeout_s: Positive = 10.0  # for a judge; then the answer stays as it is
    cut: bool = False  # take the step that the judge quotes out
    rounds: Annotated[int, msgspec.Meta(ge=1, le=3)] = 3
    hint_tokens: Annotated[int, msgspec.Meta(ge=1, le=64)] = 64
    share: Annotated[float, msgspec.Meta(gt=0, le=HINT_SHARE)] = HINT_SHARE  # hint / sampled tokens
    ngram: PositiveInt = 8  # repeat: so many tokens …
    times: Annotated[int, msgspec.Meta(ge=2)] = 3  # … so many times
    long: NaturalInt = 0  # long: an answer of more tokens
    episode_s: Positive = 120.0  # of all rounds of one answer; then it stays as it is

    def check(self) -> None:
        _check_voice("judge", self.judge, self.model, self.key)
        need(bool(self.triggers or self.judge), "triggers: there is none, and no judge either")
        need(bool(self.judge or self.hint), "hint is empty: say what a trigger puts in")
        need("long" not in self.triggers or self.long > 0, 'long = 0: the trigger "long" needs it')
        need(not self.cut or bool(self.judge), "cut: only a judge says where a step begins")


def _check_voice(name: str, place: str, model: str, key: str) -> None:
    python = re.fullmatch(r"python:[\w.]+:\w+", place) is not None
    endpoint = re.fullmatch(r"https?://[^/\s@?]+(/[^\s@?]*)?", place) is not None
    need(
        not re.search(r"://.*[@?]", place),
        f"{name}: an address holds no key or password, for it is journaled; give the name of the "
        "environment variable that does as `key`",
    )
    need(
        place == "" or python or endpoint,
        f'{name} = "{place}": expected python:MODULE:FUNCTION or an endpoint http(s)://HOST/v1',
    )
    need(not endpoint or model != "", f"model is empty: which model of {place}?")
    need(endpoint or not (model or key), f"model, key: they are an endpoint's, and {name} is none")
    need(
        re.fullmatch(r"\w*", key) is not None,
        "key: give the name of the environment variable that holds it, never the key itself",
    )


# ---- what a step says about its episodes ---------------------------------------------------------


def solved_at(rollout: Rollout) -> int | None:
    """The turn at which it was solved, None: never."""
    return rollout.turn if not rollout.error and rollout.correct >= SOLVED else None


def facts(
    groups: Sequence[Group], feedback: FeedbackConfig | None, intervene: InterveneConfig | None
) -> dict[str, dict[str, float]]:
    """By names of the metrics' glossary; nothing for a plain run."""
    found: dict[str, dict[str, float]] = {}
    if feedback is not None:
        graded = [r for group in groups for r in group.rollouts if not r.error]
        shares = accuracy_by_turn([solved_at(r) for r in graded], feedback.turns)
        found["turn_correct"] = {str(k): share for k, share in enumerate(shares)}
        turns = Counter(r.turn for r in graded)
        found["turns"] = {str(k): float(turns[k]) for k in range(feedback.turns)}
    if intervene is not None:
        found["hints"] = hints(groups)
    if feedback is not None or intervene is not None:
        events: Counter[str] = Counter()
        for group in groups:
            for rollout in group.rollouts:
                events.update(rollout.events)
        found["episode_events"] = {k: float(v) for k, v in sorted(events.items())}
    return found


def hints(groups: Sequence[Group]) -> dict[str, float]:
    """Hinted rollouts, those right in the end, those kept for supervised training, and the hints'
    share of all sampled tokens (of rollouts, and of what was sampled behind a hint)."""
    hinted = [r for group in groups for r in group.hinted]
    put_in = sum(s.tokens.size for r in hinted for s in r.segments if s.role == "hint")
    sampled = sum(s.tokens.size for g in groups for r in g.rollouts for s in r.segments)
    sampled += sum(_behind_hints(rollout) for rollout in hinted)
    return {
        "rollouts": float(len(hinted)),
        "correct": float(sum(r.correct >= SOLVED for r in hinted)),
        "kept": float(sum(is_kept(r) for r in hinted)),
        "share": put_in / max(1, sampled),
    }


def is_kept(hinted: Rollout) -> bool:
    """Good for supervised training: right in the end, and nothing found any more."""
    return hinted.clean and hinted.correct >= SOLVED and not hinted.error


def _behind_hints(hinted: Rollout) -> int:
    roles = [segment.role for segment in hinted.segments]
    first = roles.index("hint") if "hint" in roles else len(roles)
    return sum(s.tokens.size for s in hinted.segments[first:] if s.role == "policy")
