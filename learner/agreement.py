"""Do engine and learner agree on what a token's probability was?

Everything that corrects for staleness takes the engine's log-prob for the policy's. So each step
compares the two where they must be equal up to rounding: at tokens of rollouts that were sampled
wholly by the version that the step begins with. (A rollout that saw a swap has keys and values of
older weights in its cache; its log-probs are right, and are nobody's but the engine's.) The
learner's side is the table of the first update, which is there in any case.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.measure import Metrics
from learner.table import Table

log = logging.getLogger("isentrope.agreement")

OUTSIDE = 0.01  # share of the tokens outside the clip range that is worth a word
RATIO = 0.05  # distance of the mean ratio from 1 that is
FEWEST = 32  # tokens that a word needs
SILENCE = 50  # steps between two words
_CLIP = (0.2, 0.28)  # where the loss has none


def agreement(table: Table, batch: Batch, t: int, config: LearnerConfig) -> Metrics:
    """Learner / engine on the main tokens that version `t` sampled, `table` being of version t.

    ratio      mean of exp(l - lb)
    outside    share of the tokens whose ratio is outside the clip range
    max        largest |l - lb| (nats)
    tokens     how many; without any there is nothing to say
    """
    pure = torch.from_numpy(_pure_rows(batch, t)).to(table.row.device)
    on = table.main & pure[table.row]
    if not bool(on.any()):
        return {}
    gap = (table.logp - table.lb)[on].double()
    r = gap.exp()
    low, high = config.clip_low or _CLIP[0], config.clip_high or _CLIP[1]
    return {
        "agreement": {
            "ratio": float(r.mean()),
            "outside": float(((r < 1 - low) | (r > 1 + high)).double().mean()),
            "max": float(gap.abs().max()),
            "tokens": float(gap.numel()),
        }
    }


def _pure_rows(batch: Batch, t: int) -> np.ndarray:
    """bool [R]: every token of the rollout says version `t`."""
    rollouts = (r for item in batch.items for r in item.group.rollouts)
    return np.array([all(v == t for s in r.segments for _, v in s.spans) for r in rollouts], bool)


class Doubt:
    """Says so in the log when they disagree, and not again at every step."""

    def __init__(self) -> None:
        self.words = ""  # while the last comparison was bad
        self._said: int | None = None

    def look(self, t: int, metrics: Metrics) -> None:
        found = metrics.get("agreement")
        if not isinstance(found, dict):
            return
        self.words = doubt(found)
        if self.words and (self._said is None or t - self._said >= SILENCE):
            self._said = t
            log.warning("step %d: %s", t, self.words)


def doubt(found: dict[str, float]) -> str:
    """What is wrong and where to look, "" when nothing is."""
    fine = found["outside"] <= OUTSIDE and abs(found["ratio"] - 1) <= RATIO
    if fine or found["tokens"] < FEWEST:
        return ""
    return (
        f"engine and learner disagree on the probability of {100 * found['outside']:.1f} % of "
        f"{found['tokens']:.0f} tokens that these very weights sampled (mean ratio "
        f"{found['ratio']:.3f}, largest difference {found['max']:.2f} nats); likely causes: "
        "another dtype (actor.dtype, actor.vllm.dtype against learner.dtype), temperature or top-p "
        "applied on one side only, weights of another version than the engine says, another "
        "tokenizer or chat template, an attention kernel"
    )
