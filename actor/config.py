"""`[actor]`: one actor's engine, its size, its grading."""

from __future__ import annotations

from typing import Literal

from common.config import Section


class ScriptedConfig(Section, frozen=True, kw_only=True):
    """The scripted engine's model of time and skill."""

    tokens_per_s: float = 2000.0  # of one sequence
    startup_s: float = 0.0
    length_mean: float = 24.0
    length_sigma: float = 0.4  # of log length
    vocab_size: int = 32


class ActorConfig(Section, frozen=True, kw_only=True):
    count: int = 2  # actors that `isentrope run` starts
    engine: Literal["torch", "scripted", "vllm"] = "torch"
    slots: int = 128  # sequences decoded side by side
    max_length: int = 0  # positions of KV cache a sequence; 0: what the model allows
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1  # torch threads; 0: torch's own choice
    prefetch: int = 2  # tickets held beyond those the slots can run
    poll_s: float = 0.2  # how often to ask Redis for a new version (a hint may come sooner)
    grade_workers: int = 1
    grade_timeout_s: float = 10.0
    scripted: ScriptedConfig = ScriptedConfig()
