"""`[actor]`: one actor's engine, its size, its grading."""

from __future__ import annotations

from typing import Any, Literal

from common.config import NaturalInt, NotNegative, Positive, PositiveInt, Section


class ScriptedConfig(Section, frozen=True, kw_only=True):
    """The scripted engine's model of time, skill, memory and failure."""

    tokens_per_s: Positive = 2000.0  # of one sequence
    startup_s: NotNegative = 0.0
    length_mean: Positive = 24.0
    length_sigma: NotNegative = 0.4  # of log length
    vocab_size: PositiveInt = 32
    kv_tokens: NaturalInt = 0  # prompt and sampled tokens of all that run; 0: as many as there are
    dies_after_tokens: NaturalInt = 0  # of each engine of this actor; 0: it lives
    hangs_after_tokens: NaturalInt = 0  # then it neither ends nor fails; 0: it never hangs
    fails_to_start: bool = False


class ActorConfig(Section, frozen=True, kw_only=True):
    count: NaturalInt = 2  # actors that `isentrope run` starts
    engine: Literal["torch", "scripted", "vllm"] = "torch"
    slots: PositiveInt = 128  # sequences decoded side by side
    max_length: NaturalInt = 0  # positions of KV cache a sequence; 0: what the model allows
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: NaturalInt = 1  # torch threads; 0: torch's own choice
    prefetch: NaturalInt = 2  # tickets held beyond those the slots can run
    adaptive: bool = True  # fewer tickets while the KV cache cannot take so many
    poll_s: Positive = 0.2  # how often to ask Redis for a new version (a hint may come sooner)
    grade_workers: PositiveInt = 1
    grade_timeout_s: Positive = 10.0
    engine_start_s: Positive = 300.0  # until an engine that starts must be up
    engine_hang_s: Positive = 60.0  # without an answer or a token: the engine hangs
    engine_restarts: NaturalInt = 3  # of a broken engine within an hour; then the actor leaves
    scripted: ScriptedConfig = ScriptedConfig()
    vllm: dict[str, Any] = {}  # arguments of vLLM's engine, by its own names
