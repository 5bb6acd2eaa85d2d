"""`[run]`: what every process of a run must agree on."""

from __future__ import annotations

from typing import Literal

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the recipe: frozen, strict, every default vetted."""


class RunConfig(Section, frozen=True, kw_only=True):
    """Shared by learner and actors; its digest is compared in the handshake (`LOCAL` fields are not part of it)."""

    model: str = "tiny"  # a Hugging Face model folder, or the name of a shipped model
    seed: int = 0
    weights_dtype: Literal["fp32", "bf16"] = "fp32"  # of published versions
    store: str = "redis"  # where blobs of versions live: "redis", or "file:FOLDER"
    max_frame_mb: int = 64
    redis: str = "redis://127.0.0.1:6379/0"
    learner: str = "tcp://127.0.0.1:5555"
    failpoint: str = ""  # "name:count": SIGKILL this process at the count-th pass (tests)


LOCAL = ("redis", "learner", "failpoint")  # may differ from process to process
