"""`[run]`: what every process of a run must agree on."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from common.errors import ConfigError
from common.failpoints import Failpoint

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NaturalInt = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the recipe: frozen, strict, every default vetted.

    `check(self) -> None`, where there is one, raises ConfigError for combinations that cannot work;
    its message begins with the field's name.
    """


def need(condition: bool, message: str) -> None:
    """One line of a `check`."""
    if not condition:
        raise ConfigError(message)


def without_password(url: str) -> str:
    """As people and files may see it."""
    hidden = re.sub(r"(//[^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&\s\"]*", r"\1***", hidden)


class RunConfig(Section, frozen=True, kw_only=True):
    """Shared by learner and actors; the handshake compares its digest (without `LOCAL` fields)."""

    model: str = "tiny"  # a Hugging Face model folder, or the name of a shipped model
    seed: NaturalInt = 0
    weights_dtype: Literal["fp32", "bf16"] = "fp32"  # of published versions
    store: str = "redis"  # where blobs of versions live: "redis", "file:FOLDER", "learner[:PORT]"
    max_frame_mb: Annotated[int, msgspec.Meta(ge=1, le=2048)] = 64
    redis: str = "redis://127.0.0.1:6379/0"
    learner: str = "tcp://127.0.0.1:5555"
    keys: str = ""  # this process' CURVE key file (`isentrope keys`); needed off loopback
    failpoint: str = ""  # "name:count[,…]": SIGKILL at the count-th pass, by life

    def check(self) -> None:
        need(self.model != "", "model is empty: give a model folder or the name of a shipped one")
        need(
            re.fullmatch(r"redis|file:.+|learner(:\d+)?", self.store) is not None,
            f'store = "{self.store}": expected "redis", "file:FOLDER", "learner" or "learner:PORT"',
        )
        need(
            self.redis.startswith(("redis://", "rediss://", "unix://")),
            f'redis = "{without_password(self.redis)}": expected redis://HOST:PORT, rediss://… or unix://…',
        )
        need(
            re.fullmatch(r"tcp://.+:\d+|ipc://.+", self.learner) is not None,
            f'learner = "{self.learner}": expected tcp://HOST:PORT',
        )
        try:
            Failpoint.parse(self.failpoint)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("run.")) from None


LOCAL = ("redis", "learner", "keys", "failpoint")  # may differ from process to process
