"""The engine that the recipe asks for. Only the chosen one is imported: torch takes seconds, vLLM
takes many."""

from __future__ import annotations

from actor.config import ActorConfig
from actor.engine.base import Engine
from common import models
from common.config import RunConfig
from common.imports import lasting


def make(run: RunConfig, actor: ActorConfig) -> Engine:
    """Raises ConfigError for an engine that cannot be had here, DataError for a model that it
    cannot serve."""
    if actor.engine == "scripted":
        from actor.engine.scripted import ScriptedEngine

        return ScriptedEngine(
            actor.scripted,
            slots=actor.slots,
            max_length=actor.max_length,
            hang_s=actor.engine_hang_s,
        )
    if actor.engine == "vllm":
        from actor.engine.vllm_engine import VllmEngine

        return VllmEngine(models.find(run.model), actor)
    folder = models.find(run.model)
    with lasting():
        from actor.engine import model
        from actor.engine.torch_engine import TorchEngine

    return TorchEngine(
        folder,
        slots=actor.slots,
        max_length=actor.max_length,
        device=model.device_named(actor.device),
        dtype=model.DTYPES[actor.dtype],
        threads=actor.threads,
    )
