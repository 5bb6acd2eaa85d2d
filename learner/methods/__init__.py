"""One paper, one file, one struct. `AnyMethod`: what `[[learner.methods]]` may hold."""

from __future__ import annotations

from learner.methods.clip_b import ClipB
from learner.methods.clip_cov import ClipCov
from learner.methods.clip_v import ClipV
from learner.methods.entropy_advantage import EntropyAdvantage
from learner.methods.entropy_bonus import EntropyBonus
from learner.methods.random_drop import RandomDrop
from learner.methods.steer import Steer
from learner.methods.top_entropy import TopEntropy

AnyMethod = (
    ClipB | ClipCov | ClipV | EntropyAdvantage | EntropyBonus | RandomDrop | Steer | TopEntropy
)
