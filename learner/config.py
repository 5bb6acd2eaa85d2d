"""`[learner]`: the batch, the loss, the optimiser, and who may wait how long for what."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from common.config import NaturalInt, NotNegative, Positive, PositiveInt, Section, Share, need
from common.trackers import WandbConfig
from learner.methods import AnyMethod
from learner.methods.base import asks
from learner.methods.base import check as check_methods
from learner.overlong import OverlongConfig
from learner.prompts.config import PromptsConfig
from learner.synthesis.config import SynthesisConfig
from learner.tuning import ClasspConfig, KappaConfig
from learner.turns import FeedbackConfig, InterveneConfig


class EvalConfig(Section, frozen=True, kw_only=True):
    """Held-out evaluation through the same actors; its tickets are never trained on."""

    problems: PositiveInt = 512
    samples: PositiveInt = 1  # rollouts a problem
    temperature: Positive = 1.0
    every: NaturalInt = 0  # steps between evaluations during training; 0: only before and after
    first: bool = True  # before the first step, at exactly version 0
    last: bool = True  # after the last step, at exactly the final version


STORE_VARIABLE = "ISENTROPE_RANKS_STORE"  # the file by which ranks of one machine find each other


class RanksConfig(Section, frozen=True, kw_only=True):
    """A learner of several processes, each with a slice of the model."""

    count: PositiveInt = 1  # processes that the learner starts here, where torchrun did not
    recompute: bool = False  # activation checkpointing: layers keep only their inputs
    timeout_s: Positive = 300.0  # silence of a rank after which all end


class LearnerConfig(Section, frozen=True, kw_only=True):
    # the batch
    steps: NaturalInt = 60  # 0: only evaluate
    groups_per_step: PositiveInt = 32
    group_size: PositiveInt = 8
    n_aux: NaturalInt = 1  # aux groups a step at most; there are none but for a method that asks
    max_tokens: PositiveInt = 48
    temperature: Positive = 1.0
    max_lag: NaturalInt = 2
    refill_limit: Annotated[float, msgspec.Meta(ge=1)] = (
        16.0  # × groups_per_step main groups a step at most
    )
    drop_truncated: bool = False
    overlong: OverlongConfig | None = None

    # the update
    advantage: Literal["grpo", "dr_grpo", "rloo", "psr_nsr"] = "grpo"
    psr_weight: NotNegative = 0.1  # psr_nsr: advantage of right answers; 0: learn from wrong ones
    loss: Literal["ppo", "decoupled_ppo", "gspo", "cispo", "sapo", "reinforce"] = "ppo"
    clip_low: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = 0.2  # None: no clip
    clip_high: Positive | None = 0.28
    dual_clip: Annotated[float, msgspec.Meta(gt=1)] | None = None
    correction: Literal["none", "truncate", "mask"] = (
        "none"  # importance weights proximal / behaviour
    )
    correction_low: NotNegative = 0.5
    correction_high: Positive = 2.0
    correction_level: Literal["token", "sequence"] = "token"  # sequence: product over the rollout
    proximal: Literal["recomputed", "log_linear"] = "recomputed"
    sapo_tau: tuple[Positive, Positive] = (1.0, 1.05)  # sapo: temperature for A > 0, for A <= 0
    aggregation: Literal["token_mean", "seq_mean", "constant"] = "token_mean"
    updates_per_batch: PositiveInt = 1
    lr: Positive = 1.5e-4
    warmup_steps: NaturalInt = 20
    weight_decay: NotNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    grad_clip: Positive = 1.0
    methods: tuple[AnyMethod, ...] = ()
    kappa_tune: KappaConfig | None = None
    classp: ClasspConfig | None = None  # in place of AdamW

    # the machine
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the forward pass (autocast)
    threads: NaturalInt = 1  # torch threads; 0: torch's own choice
    tokens_per_micro: PositiveInt = 8192  # tokens of one packed micro-batch
    head_chunk: PositiveInt = 1024  # tokens whose logits exist at once
    realised_every: NaturalInt = 10  # steps between measurements of the realised entropy change
    ranks: RanksConfig | None = None

    # the run folder
    checkpoint_every: PositiveInt = 10
    keep_checkpoints: PositiveInt = 2
    keep_journal: bool = True
    keep_versions: PositiveInt = 3
    snapshot_every: PositiveInt = 16  # versions; bf16: patches between them. 1: no patches

    # patience
    lease_s: Positive = 30.0
    heartbeat_s: Positive = 1.0
    infra_budget: PositiveInt = 8  # attempts of one ticket lost to engines, actors, leases
    data_budget: PositiveInt = 2  # attempts of one ticket lost to its own prompt or verifier
    quarantine_after: PositiveInt = 5  # invalid results in a row before an actor is refused

    prompts: PromptsConfig = PromptsConfig()
    eval: EvalConfig = EvalConfig()
    synthesis: SynthesisConfig | None = None
    feedback: FeedbackConfig | None = None
    intervene: InterveneConfig | None = None
    tensorboard: bool = False
    wandb: WandbConfig | None = None  # Weights & Biases; a table, empty for its defaults

    def check(self) -> None:
        need(
            self.group_size >= 2 or self.advantage == "psr_nsr",
            f"group_size = {self.group_size}: {self.advantage} compares the rollouts of a group; "
            "take 2 or more",
        )
        need(
            self.loss != "reinforce" or self.updates_per_batch == 1,
            f"updates_per_batch = {self.updates_per_batch}: reinforce has no ratio to a proximal "
            'policy; take 1, or loss = "ppo"',
        )
        need(
            self.loss not in ("reinforce", "cispo", "sapo") or self.dual_clip is None,
            f'dual_clip: {self.loss} stops no gradient by a clip; leave it out, or loss = "ppo"',
        )
        need(
            self.loss != "gspo" or self.aggregation == "seq_mean",
            f'aggregation = "{self.aggregation}": gspo counts sequences; take "seq_mean"',
        )
        self._check_correction()
        self._check_overlong()
        self._check_episodes()
        self._check_synthesis()
        need(
            self.lease_s > 3 * self.heartbeat_s,
            f"lease_s = {self.lease_s:g}: must be longer than three heartbeats "
            f"(heartbeat_s = {self.heartbeat_s:g})",
        )
        check_methods(self.methods)
        asking = next((m.name for m in self.methods if asks(m)), "")
        need(
            self.n_aux > 0 or not asking,
            f"n_aux = 0: {asking!r} asks for aux groups; take 1 or more",
        )

    def _check_episodes(self) -> None:
        feedback, intervene = self.feedback, self.intervene
        need(
            feedback is None or intervene is None,
            "intervene: it looks at answers of one turn; leave it or feedback out",
        )
        need(
            intervene is None or self.keep_journal,
            "intervene: interventions.jsonl is made from the journal; keep_journal = true",
        )
        need(
            feedback is None or self.overlong is None or self.overlong.buffer is None,
            "overlong.buffer: it counts the tokens of one answer; leave it or feedback out",
        )
        need(
            feedback is None or feedback.gamma == 1 or self.advantage != "psr_nsr",
            "feedback.gamma: psr_nsr learns from the raw correctness; take gamma = 1",
        )

    def _check_overlong(self) -> None:
        buffer = None if self.overlong is None else self.overlong.buffer
        need(
            buffer is None or buffer <= self.max_tokens,
            f"overlong.buffer = {buffer}: more than max_tokens = {self.max_tokens}",
        )
        need(
            buffer is None or self.advantage != "psr_nsr",
            "overlong.buffer: psr_nsr learns from the raw correctness, which has no penalty; "
            "leave it out",
        )

    def _check_synthesis(self) -> None:
        inherited = self.synthesis is None or self.synthesis.label == "inherited"
        every = self.prompts.each()
        graders = {part.grader for one in every for part in one.parts} | {o.grader for o in every}
        need(
            inherited or "reasoning_gym" not in graders,
            "synthesis.label: reasoning_gym's scorers know the problems that they made, and no "
            'others; take "inherited"',
        )

    def _check_correction(self) -> None:
        need(
            self.loss != "ppo" or self.correction == "none",
            f'correction = "{self.correction}": the ratio of ppo is to the behaviour policy; '
            'take correction = "none", or loss = "decoupled_ppo"',
        )
        need(
            self.correction_low < self.correction_high,
            f"correction_low = {self.correction_low:g}: must be below correction_high "
            f"= {self.correction_high:g}",
        )
        need(
            self.proximal == "recomputed"
            or (self.loss == "decoupled_ppo" and self.correction_level == "token"),
            'proximal = "log_linear": a guess for loss = "decoupled_ppo" with '
            'correction_level = "token"; take "recomputed"',
        )
