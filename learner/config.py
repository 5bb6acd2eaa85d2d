"""`[learner]`: the batch, the loss, the optimiser, and who may wait how long for what."""

from __future__ import annotations

from typing import Any, Literal

from common.config import Section


class PromptsConfig(Section, frozen=True, kw_only=True):
    source: Literal["arithmetic", "jsonl"] = "arithmetic"
    path: str = ""  # jsonl: the file
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    grader: str = "exact"
    grader_options: dict[str, Any] = {}


class EvalConfig(Section, frozen=True, kw_only=True):
    """Held-out evaluation through the same actors; its tickets are never trained on."""

    problems: int = 512
    samples: int = 1  # rollouts a problem
    temperature: float = 1.0
    every: int = 0  # steps between evaluations during training; 0: only before and after
    first: bool = True  # before the first step, at exactly version 0
    last: bool = True  # after the last step, at exactly the final version


class LearnerConfig(Section, frozen=True, kw_only=True):
    # the batch
    steps: int = 60
    groups_per_step: int = 32
    group_size: int = 8
    n_aux: int = 0  # aux groups a step
    max_tokens: int = 48
    temperature: float = 1.0
    max_lag: int = 2
    refill_limit: float = 16.0  # × groups_per_step main groups a step at most
    drop_truncated: bool = False

    # the update
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    loss: Literal["ppo", "decoupled_ppo", "reinforce"] = "ppo"
    clip_low: float | None = 0.2  # None: no clip
    clip_high: float | None = 0.28
    dual_clip: float | None = None
    correction: Literal["none", "truncate", "mask"] = "none"  # importance weights proximal / behaviour
    correction_low: float = 0.5
    correction_high: float = 2.0
    aggregation: Literal["token_mean", "seq_mean", "constant"] = "token_mean"
    updates_per_batch: int = 1
    lr: float = 1.5e-4
    warmup_steps: int = 20
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    methods: tuple[Any, ...] = ()  # decoded as learner.methods.AnyMethod

    # the machine
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the forward pass (autocast)
    threads: int = 1  # torch threads; 0: torch's own choice
    tokens_per_micro: int = 8192  # tokens of one packed micro-batch
    head_chunk: int = 1024  # tokens whose logits exist at once
    realised_every: int = 10  # steps between measurements of the realised entropy change

    # the run folder
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    keep_journal: bool = True
    keep_versions: int = 3

    # patience
    lease_s: float = 30.0
    heartbeat_s: float = 1.0
    infra_budget: int = 8  # attempts of one ticket lost to engines, actors, leases
    data_budget: int = 2  # attempts of one ticket lost to its own prompt or verifier
    quarantine_after: int = 5  # invalid results in a row before an actor is refused

    prompts: PromptsConfig = PromptsConfig()
    eval: EvalConfig = EvalConfig()
    tensorboard: bool = False
