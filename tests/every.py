"""Every method, loss and estimator of a recipe at a strength that shows on a small batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from learner.item import Item
from learner.methods.adaptive_entropy import AdaptiveEntropy
from learner.methods.adora import Adora
from learner.methods.aepo import Aepo
from learner.methods.base import Method
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
from tests.builders import make_group, make_ticket
from tests.test_step import a_batch


class Setting(NamedTuple):
    """What a recipe says, beside `loss = "decoupled_ppo"` where it says nothing of the loss: the
    made-up log-probs of test batches are far from the model's, so ratios are to lp."""

    name: str
    methods: tuple[Method, ...] = ()
    fields: dict[str, Any] = {}  # of LearnerConfig


OPEN = {"clip_low": None, "clip_high": None}

METHODS = (
    Setting("steer", (Steer(),)),
    Setting("steer released", (Steer(form="released"),)),
    Setting("steer released linear", (Steer(form="released", map="linear"),)),
    Setting("steer asymmetric", (Steer(form="centred", map="asymmetric", max_quantile=0.99),)),
    Setting("clip_cov", (ClipCov(ratio=0.05, low=0.1),)),
    Setting("kl_cov behaviour", (KlCov(ratio=0.1, anchor="behaviour"),), OPEN),
    Setting("kl_cov proximal", (KlCov(ratio=0.1, anchor="proximal"),), OPEN),
    Setting("clip_b", (ClipB(mu=0.1),)),
    Setting("clip_b released", (ClipB(mu=0.1, preset="released"),)),
    Setting("clip_b two-sided", (ClipB(mu=0.7, sides="two_sided"),)),
    Setting("clip_v", (ClipV(mu=0.1, max_frac=0.2),)),
    Setting("clip_v lowering", (ClipV(mu=0.7, sides="entropy_lowering", preset="released"),)),
    Setting("aepo", (Aepo(alpha=0.5),)),
    Setting("adora", (Adora(preset="llm_repo"),)),
    Setting("adora amplify", (Adora(w_tas=3.0, normalize_mean_weight=True),)),
    Setting("entropy_bonus", (EntropyBonus(coefficient=0.3),)),
    Setting("adaptive_entropy", (AdaptiveEntropy(target=3.0, start=0.3),)),
    Setting("adaptive previous", (AdaptiveEntropy(target=3.0, start=0.3, signal="previous"),)),
    Setting("top_entropy", (TopEntropy(),)),
    Setting("top_entropy kept", (TopEntropy(denominator="kept"),)),
    Setting("entropy_advantage", (EntropyAdvantage(),)),
    Setting("random_drop", (RandomDrop(ratio=0.05),)),
    Setting("isentropic", (Isentropic(target=1.1, mode="hold"),)),
    Setting("opefo", (Isentropic(preset="opefo"),)),
)

LOSSES = (
    Setting("psr_nsr", (), {"advantage": "psr_nsr"}),
    Setting("clip-higher", (), {"loss": "ppo", "clip_low": 0.2, "clip_high": 0.28}),
    Setting("dual clip", (), {"dual_clip": 3.0}),
    Setting("gspo", (), {"loss": "gspo", "aggregation": "seq_mean"}),
    Setting("cispo", (), {"loss": "cispo", "clip_low": None}),
    Setting("sapo", (), {"loss": "sapo"}),
    Setting("token TIS", (), {"correction": "truncate"}),
    Setting("sequence TIS", (), {"correction": "truncate", "correction_level": "sequence"}),
    Setting("IcePop", (), {"correction": "mask", "correction_low": 0.01, "correction_high": 9.0}),
    Setting("log-linear", (), {"proximal": "log_linear", "correction": "truncate"}),
)

EVERY = METHODS + LOSSES

NEUTRAL = (
    Setting("steer", (Steer(lambda_min=1.0),)),
    Setting("clip_cov", (ClipCov(ratio=0.0),)),
    Setting("kl_cov beta", (KlCov(beta=0.0),), OPEN),
    Setting("kl_cov ratio", (KlCov(ratio=0.0),), OPEN),
    Setting("clip_b", (ClipB(mu=float("inf")),)),
    Setting("clip_v", (ClipV(mu=float("inf")),)),
    Setting("aepo", (Aepo(alpha=0.0),)),
    Setting("adora", (Adora(w_tas=1.0, w_tds=1.0),)),
    Setting("entropy_bonus", (EntropyBonus(coefficient=0.0),)),
    Setting("adaptive_entropy", (AdaptiveEntropy(delta=0.0),)),
    Setting("top_entropy", (TopEntropy(keep=1.0),)),
    Setting("entropy_advantage", (EntropyAdvantage(alpha=0.0),)),
    Setting("random_drop", (RandomDrop(ratio=0.0),)),
    Setting("isentropic", (Isentropic(price_max=0.0, lambda_max=0.0, bonus_max=0.0),)),
)

# Next to the neutral knob: the method runs, and does nothing that float32 could tell.
ALMOST_NEUTRAL = (
    Setting("steer", (Steer(floor=1e30),)),
    Setting("clip_cov", (ClipCov(low=1e9, high=1e10),)),
    Setting("kl_cov", (KlCov(beta=1e-30, ratio=0.1),), OPEN),
    Setting("clip_b", (ClipB(mu=1e9),)),
    Setting("clip_v", (ClipV(mu=1e9),)),
    Setting("aepo", (Aepo(r_pos=1e9),)),
    Setting("adora", (Adora(criteria="length", w_tas=1 + 1e-12, w_tds=1.0),)),
    Setting("entropy_bonus", (EntropyBonus(coefficient=1e-30),)),
    Setting("adaptive_entropy", (AdaptiveEntropy(target=1e-9, start=0.5),)),
    Setting("top_entropy", (TopEntropy(keep=1 - 1e-12),)),
    Setting("entropy_advantage", (EntropyAdvantage(alpha=1e-30),)),
    Setting("isentropic", (Isentropic(target=1e-3),)),
)


def a_mixed_batch(seed: int = 0) -> list[Item]:
    """Main groups of two lags, and an aux group. Trained version: 1."""
    items = [i if i.ticket.id % 2 else _older(i) for i in a_batch(seed, version=1)]
    aux = make_group([1, 0, 1, 1], ticket=100, kind="aux", version=1)
    return [*items, Item(make_ticket(100, kind="aux", n=4), aux)]


def _older(item: Item) -> Item:
    """The same group, sampled one version earlier by a policy that was less sure."""
    rollouts = []
    for rollout in item.group.rollouts:
        (segment,) = rollout.segments
        segment.logps[:] = -2.5
        older = msgspec.structs.replace(segment, spans=((0, 0),))
        rollouts.append(msgspec.structs.replace(rollout, segments=(older,)))
    return item._replace(group=msgspec.structs.replace(item.group, rollouts=tuple(rollouts)))
