"""What the rollouts of a propose ticket are worth, once all that they proposed is settled."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learner.synthesis.checks import clusters
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.label import FAULT, NO_MAJORITY
from learner.synthesis.pool import Made, Pool
from learner.synthesis.reward import diversity, unusable, worth
from learner.synthesis.texts import Texts

OF_ITS_OWN = ("", "wrong label")  # what a proposal that is lost is lost for by its own fault


class Earnings:
    def __init__(self, settings: SynthesisConfig, pool: Pool, texts: Texts) -> None:
        self._settings, self._pool, self._texts = settings, pool, texts

    def of(self, made: Sequence[Made], source: str) -> tuple[float | None, ...]:
        """Of each proposal of a ticket whose parent is of `source`. None where somebody else
        failed: a labeller, a regex, the grader of the answers.
        """
        known = [diversity(each.p) for each in made if each.p is not None]
        mean = math.fsum(known) / len(known) if known else 0.0
        baseline = self._pool.state.baselines.get(source, mean)
        alike = clusters([self._texts.print(each.text or each.id) for each in made])
        return tuple(
            self._reward(each, cluster, baseline) for each, cluster in zip(made, alike, strict=True)
        )

    def _reward(self, made: Made, cluster: float, baseline: float) -> float | None:
        settings, p = self._settings, made.p
        if p is None and (made.lost not in OF_ITS_OWN or made.reason.startswith(FAULT)):
            return None
        if made.reason == NO_MAJORITY and settings.reward == "r_zero":
            _, p, why = self._texts.agreed(made)
            if why:
                return None
        if p is not None:
            return worth(p, cluster=cluster, baseline=baseline, config=settings)
        if made.reason == "duplicate" and settings.reward == "diversity":
            return -settings.duplicate
        return unusable(cluster, settings)
