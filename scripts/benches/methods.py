"""What a method costs: the CPU time of a step with it over that of a step with the same passes.

    overhead_NAME      step with the method / step without it; methods that look at the token table
                       are compared with a step that makes the table and does nothing with it
    price_of_the_table step with the table / step without: one more forward pass

Every method in its recipe's form, on one model and one batch: 24 groups of 8 answers on the shipped
tiny model, AEPO with aux groups in both steps. CPU time of the process, one thread. All steps are
the first of a run and move the same parameters, at a rate that changes nothing to speak of, by the
same optimiser: copies would lie elsewhere in memory, which no method is to blame for. A method's
step and the one beside it take turns, the method first and last in every other round, so that what
else the machine does meets both; medians of the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar, get_args

LIMIT = 1.05
NAMES = [
    *("adaptive_entropy", "adora", "aepo", "clip_b", "clip_cov", "clip_v", "entropy_advantage"),
    *("entropy_bonus", "isentropic", "kl_cov", "random_drop", "steer", "top_entropy"),
]
LIMITS = {f"overhead_{name}": ("<=", LIMIT) for name in NAMES}
ROUNDS, GROUPS, GROUP_SIZE, PROMPT, ANSWER, AUX = 7, 24, 8, 10, 40, 2

Step = Callable[[], object]


def bench(rounds: int = ROUNDS, groups: int = GROUPS) -> dict[str, object]:
    steps, beside = _steps(groups)
    for step in steps.values():
        step()  # warm
    pairs = {f"overhead_{name}": (name, like) for name, like in sorted(beside.items())}
    pairs["price_of_the_table"] = ("table", "plain")
    ratios: dict[str, list[float]] = {key: [] for key in pairs}
    plain = []
    for turn in range(rounds):
        for key, pair in pairs.items():
            taken = _taken(steps, pair[:: 1 if turn % 2 else -1])
            ratios[key].append(taken[pair[0]] / taken[pair[1]])
            plain += [taken["plain"]] if "plain" in taken else []
    found: dict[str, object] = {key: statistics.median(each) for key, each in ratios.items()}
    return found | {"step_cpu_s": statistics.median(plain)}


def _taken(steps: dict[str, Step], pair: tuple[str, ...]) -> dict[str, float]:
    """CPU seconds of a step of each, from one, the other, the other, one."""
    taken = dict.fromkeys(pair, 0.0)
    for name in (*pair, *pair[::-1]):
        taken[name] += _cpu(steps[name]) / 2
    return taken


def _cpu(step: Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _steps(groups: int) -> tuple[dict[str, Step], dict[str, str]]:
    """Every step by name, and the step beside which each method stands."""
    import msgspec
    import torch

    from common import recipe
    from common.config import RunConfig
    from learner.config import LearnerConfig
    from learner.methods import AnyMethod
    from learner.methods.base import Method
    from learner.methods.compose import Methods
    from learner.state import make_state
    from learner.step import train_step

    class Looks(Method, frozen=True, kw_only=True, tag="looks"):
        """Wants the table and does nothing with it."""

        needs_table: ClassVar[bool] = True

    known = sorted(str(kind.__struct_config__.tag) for kind in get_args(AnyMethod))
    assert known == NAMES, f"NAMES lacks, or has too much: {set(known) ^ set(NAMES)}"
    base: dict[str, Any] = {"threads": 1, "realised_every": 0, "lr": 1e-6, "warmup_steps": 0}
    plain = LearnerConfig(**base)
    run = RunConfig(model="tiny")
    items, aux = _items(groups, run.seed), _items(AUX, run.seed + 1, "aux")
    torch.set_num_threads(1)
    state = make_state(run, plain)

    def step_of(config: LearnerConfig, batch: list[Any]) -> Step:
        own = Methods(config.methods).initial()

        def step() -> None:
            nonlocal own
            state.t, state.methods_state = 0, own
            train_step(state, batch, config)
            own = state.methods_state

        return step

    def with_(*methods: Method, like: LearnerConfig = plain) -> LearnerConfig:
        return msgspec.structs.replace(like, methods=methods)

    steps = {
        "plain": step_of(plain, items),
        "table": step_of(with_(Looks()), items),
        "plain_aux": step_of(plain, items + aux),
    }
    beside = {}
    for name in NAMES:
        theirs = recipe.load(name, {"learner": LearnerConfig})["learner"]
        assert isinstance(theirs, LearnerConfig)
        (method,) = (m for m in theirs.methods if m.name == name)
        like = (
            plain
            if theirs.clip_low is not None
            else LearnerConfig(**base, clip_low=None, clip_high=None)
        )
        steps[name] = step_of(with_(method, like=like), items + aux if name == "aepo" else items)
        beside[name] = "plain_aux" if name == "aepo" else "table" if method.needs_table else "plain"
    return steps, beside


def _items(groups: int, seed: int, kind: Any = "main") -> list[Any]:
    import numpy as np

    from common import wire
    from learner.item import Item

    rng = np.random.default_rng(seed)

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, 16, n, np.int32)

    def rollout(correct: float) -> wire.Rollout:
        size = int(rng.integers(ANSWER // 2, ANSWER))
        logps = (-1.5 * rng.random(size)).astype(np.float32)
        segment = wire.Segment(role="policy", tokens=tokens(size), logps=logps, spans=((0, 0),))
        return wire.Rollout(segments=(segment,), finish="stop", correct=correct)

    first, items = (10_000 if kind == "aux" else 0), []
    for i in range(first, first + groups):
        ticket = wire.Ticket(
            id=i,
            kind=kind,
            problem=str(i),
            prompt=tokens(PROMPT),
            n=GROUP_SIZE,
            sampling=wire.Sampling(max_tokens=ANSWER),
            grading=wire.Grading(),
        )
        rollouts = tuple(rollout(float(k % 3 == 0)) for k in range(GROUP_SIZE))
        group = wire.Group(ticket=i, attempt=0, kind=kind, problem=str(i), rollouts=rollouts)
        items.append(Item(ticket, group))
    return items
