"""What a chaos run consists of: hosts, a disk, and the command lines of a whole cluster on them."""

from __future__ import annotations

import itertools
import json
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from chaos_parts import hosts
from chaos_parts.cluster import Cluster, Member
from chaos_parts.disk import Disk

from common import keys
from common.redis_server import binary
from common.status import Status
from common.status import read as read_status

APART = ("vllm",)  # engines that have processes of their own
HERE = Path(__file__).resolve().parent
RECIPE = """\
[run]
model = "tiny"
weights_dtype = "bf16"
store = "{store}"

[actor]
threads = 1
grade_workers = 1
slots = 8
engine_restarts = 50

[actor.scripted]
tokens_per_s = 100.0

[learner]
steps = 1000000
groups_per_step = 8
group_size = 4
max_tokens = 32
max_lag = 2
lr = 1e-5
warmup_steps = 5
checkpoint_every = 10
keep_checkpoints = 3
keep_versions = 3
realised_every = 25
lease_s = 10.0
threads = 1

[learner.prompts]
source = "arithmetic"
grader = "python:actor.grade.coin:coin"

[learner.eval]
problems = 8
every = 40
first = false
last = false
"""


class Stage:
    """Everything that has to be taken down again; `close` does, whatever happened."""

    def __init__(
        self,
        work: Path,
        name: str,
        actors: int,
        *,
        loopback: bool,
        minutes: float,
        settings: Mapping[str, str] = MappingProxyType({}),
        store: str = "redis",
        ranks: int = 1,
        engines: Sequence[str] = ("scripted", "torch"),
    ) -> None:
        """`settings`: of all actors, as `scripted.tokens_per_s`; `engines`: theirs in turn."""
        self.work, self.left_out, self._settings = work, list[str](), settings
        self.actors = [f"actor-{i}" for i in range(actors)]
        self.ranks, self._engines = ranks, list(engines)
        self.store = f"file:{work / 'weights'}" if store == "file" else store
        self.disk_was_full = False  # within this life of the learner
        self.keep: Path | None = None
        engine_of = dict(zip(self.actors, itertools.cycle(self._engines), strict=False))
        self.apart = [name for name in self.actors if engine_of[name] in APART]
        with ExitStack() as stack:
            self._lay_ground(stack, name, loopback, int(192 + 48 * minutes))
            self._prepare()
            self._stack = stack.pop_all()

    def _lay_ground(self, stack: ExitStack, name: str, loopback: bool, size_mb: int) -> None:
        places = ["learner", "redis", "vandal", *self.actors]
        self.ground, self._no_links = hosts.choose(name, places, wanted=not loopback)
        stack.callback(self.ground.close)
        self.disk = Disk(self.work / "disk", size_mb)
        stack.callback(lambda: self.disk.close(self.keep))
        self.run_folder = self.disk.folder / "run"
        self.cluster = Cluster(self._tolerated)
        stack.callback(self.cluster.close)

    def close(self) -> None:
        self._stack.close()

    def possible(self, kinds: Iterable[str]) -> list[str]:
        """Those of the kinds of faults that can happen here; the others are said in `left_out`."""
        lacking = {
            ("cut", "slow"): "" if self.ground.cuttable else self._no_links,
            ("fill",): "" if self.disk.fillable else "mounting a small disk is not permitted",
            ("kill rank", "stop rank"): "" if self.ranks > 1 else "one process: --ranks 2",
            ("kill engine", "stop engine"): ""
            if self.apart
            else "those engines live in their actors: --engines scripted,vllm",
            ("corrupt blob",): "they lie in the learner" if self.store == "learner" else "",
        }
        self.left_out = [f"{', '.join(names)} ({why})" for names, why in lacking.items() if why]
        without = {name for names, why in lacking.items() if why for name in names}
        return [kind for kind in kinds if kind not in without]

    def status(self) -> Status | None:
        return read_status(self.run_folder)

    def step(self) -> int:
        status = self.status()
        return status.step if status is not None else -1

    def acked(self) -> set[int]:
        """Tickets whose results actors saw acknowledged."""
        files = self.work.glob("*.acked")
        return {int(line) for file in files for line in file.read_text().split()}

    @property
    def has_witnesses(self) -> bool:
        return "scripted" in self._engines

    def secrets(self) -> list[bytes]:
        """The password, and the secret halves of the keys: what no log and no file may show."""
        files = [json.loads(Path(path).read_bytes()) for path in self.keys.values()]
        return [self._password.encode(), *(file["secret"].encode() for file in files)]

    # ---- command lines ---------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.recipe = self.work / "chaos.toml"
        self.recipe.write_text(RECIPE.format(store=self.store))
        self.logs = self.work / "logs"
        self.logs.mkdir(exist_ok=True)
        self._password, self._redis_port = secrets.token_urlsafe(12), self.ground.port(6379)
        (self.work / "password").touch(0o600)
        (self.work / "password").write_text(self._password)
        redis = f"{self.ground.address('redis')}:{self._redis_port}"
        self.redis_url = f"redis://{redis}/0?password_file={self.work / 'password'}"
        self.endpoint = f"tcp://{self.ground.address('learner')}:{self.ground.port(5555)}"
        keys.make(self.work / "keys")
        self.keys = {who: str(self.work / "keys" / f"{who}.json") for who in ("learner", "actor")}

    def populate(self) -> None:
        """Scripted actors remember what was acknowledged, others have a model; the last one joins
        late."""
        self.cluster.add(self._member("redis", lambda life: self._redis()))
        self.cluster.add(self._member("learner", self._learner))
        for index, name in enumerate(self.actors):
            late_s = 30.0 if index == len(self.actors) - 1 > 1 else 0.0
            engine = self._engines[index % len(self._engines)]
            command = self._witness(name) if engine == "scripted" else self._actor(name, engine)
            self.cluster.add(self._member(name, lambda life, c=command: c), late_s)

    def _member(self, name: str, command: object) -> Member:
        assert callable(command)
        return Member(
            name, lambda life: self.ground.enter(name, command(life)), self.logs / f"{name}.log"
        )

    def _redis(self) -> list[str]:
        options = {
            "bind": self.ground.address("redis"),
            "port": str(self._redis_port),
            "requirepass": self._password,
            "protected-mode": "yes",
            "save": "",
            "appendonly": "no",
            "dir": str(self.work),
        }
        return [str(binary()), *(word for k, v in options.items() for word in (f"--{k}", v))]

    def _learner(self, life: int) -> list[str]:
        self.disk_was_full = False
        resume = ["--resume"] if (self.run_folder / "run.json").exists() else []
        return self.learner_command(self.run_folder, *resume)

    def learner_command(self, folder: Path, *more: str) -> list[str]:
        words = [sys.executable, "-P", "-m", "learner", str(self.recipe)]
        words += ["--ranks", str(self.ranks)] if self.ranks > 1 else []
        return [*words, "--run-folder", str(folder), *self._ends("learner"), *more]

    def _actor(self, name: str, engine: str) -> list[str]:
        words = [sys.executable, "-P", "-m", "actor", str(self.recipe), "--name", name]
        return [*words, *self._ends("actor"), "-s", f"actor.engine={engine}"]

    def _witness(self, name: str) -> list[str]:
        acked = self.work / f"{name}.acked"
        words = [sys.executable, str(HERE / "witness.py"), str(self.recipe), name, str(acked)]
        return [*words, *self._ends("actor"), "-s", "actor.engine=scripted"]

    def _ends(self, side: str) -> list[str]:
        values = {"learner": self.endpoint, "redis": self.redis_url, "keys": self.keys[side]}
        words = [f'run.{key}="{value}"' for key, value in values.items()]
        if side == "actor":
            words += [f"actor.{key}={value}" for key, value in self._settings.items()]
        return [part for word in words for part in ("-s", word)]

    def _tolerated(self, member: Member, words: str) -> bool:
        """A learner that is started on a full disk has nowhere to say that it lives; an actor whose
        first engine is killed while it starts ends, and says so."""
        if "did not start" in words and member.engine_killed == member.lives:
            return True
        return member.name == "learner" and self.disk_was_full and "space" in words.lower()
