"""One paper, one file, one struct. `AnyMethod`: what `[[learner.methods]]` may hold."""

from __future__ import annotations

from learner.methods.adaptive_entropy import AdaptiveEntropy
from learner.methods.adora import Adora
from learner.methods.aepo import Aepo
from learner.methods.clip_b import ClipB
from learner.methods.clip_cov import ClipCov
from learner.methods.clip_v import ClipV
from learner.methods.entropy_advantage import EntropyAdvantage
from learner.methods.entropy_bonus import EntropyBonus
from learner.methods.isentropic import Isentropic
from learner.methods.kl_cov import KlCov
from learner.methods.random_drop import RandomDrop
from learner.methods.steer import Steer
from learner.methods.top_entropy import TopEntropy

AnyMethod = (
    AdaptiveEntropy
    | Adora
    | Aepo
    | ClipB
    | ClipCov
    | ClipV
    | EntropyAdvantage
    | EntropyBonus
    | Isentropic
    | KlCov
    | RandomDrop
    | Steer
    | TopEntropy
)
