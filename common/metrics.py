"""Numbers of a run: one line a step in metrics.jsonl, TensorBoard and Weights & Biases by option,
and what each name means.

    metrics = Metrics(run_folder, tensorboard=False)
    metrics.write(step=3, {"reward": 0.5, "lag": {"0": 200, "1": 56}})

After a resume the steps since the checkpoint are done again: `keep_until` cuts their old lines off,
and `read` takes the last line of a step in any case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from common.journal import NO_SPACE
from common.trackers import Wandb, WandbConfig

FILE = "metrics.jsonl"

Value = float | int | None | Mapping[str, float | int | None]

# Every name that may be written. A name that ends in "/" covers all that begin with it.
GLOSSARY: dict[str, str] = {
    "step": "number of the step, from 1; the step makes the weight version of the same number",
    "time": "when the step ended (seconds since the epoch)",
    "seconds": "training time so far, this process (s)",
    "reward": "mean reward of the rollouts of the batch",
    "correct": "share of the rollouts of the batch that are correct",
    "length": "mean length of the responses of the batch (tokens)",
    "truncated": "share of the responses that ended at max_tokens",
    "overlong": "mean penalty on long answers; share of the answers left out of the loss as cut",
    "entropy": "mean entropy of the policy at the tokens of the batch (nats per token)",
    "loss": "value of the training loss; its gradient matters, its value rarely does",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
    "ratio": "mean ratio current / proximal policy, by lag",
    "clipped": "share of the tokens whose gradient the clip range stops, by lag",
    "ess_share": "effective sample size of policy / behaviour over all trained tokens (share, 0…1)",
    "ess": "effective sample size of the importance weights (share of the tokens), by lag",
    "agreement": "learner / engine at tokens of the same weights: mean ratio, share outside the "
    "clip, largest difference (nats), tokens",
    "kl": "KL(behaviour‖policy) estimated at the sampled tokens (nats per token), by lag",
    "reward_by_lag": "mean reward, by lag",
    "length_by_lag": "mean length (tokens), by lag",
    "entropy_by_lag": "mean entropy (nats per token), by lag",
    "lag": "rollouts of the batch by lag (trained version − version of the oldest token)",
    "lag_mean": "mean lag of the rollouts of the batch (steps)",
    "lag_max": "largest lag in the batch (steps); never above max_lag",
    "groups": "groups of the batch",
    "rollouts": "rollouts of the batch",
    "stale_length": "groups dropped as stale, by quarter of the batch's lengths (q4: longest)",
    "dropped": "groups dropped at this step, by reason",
    "issued": "main tickets issued so far",
    "buffered": "groups admitted and not used yet",
    "in_flight": "tickets issued and not answered yet",
    "tokens": "response tokens trained on in this step",
    "tokens_per_s": "response tokens trained on per second of the whole step, waiting included",
    "sampled_tokens_per_s": "tokens sampled per second, all actors",
    "actors": "actors connected",
    "learner_idle": "share of the step that the learner waited for groups, 0…1",
    "actor_idle": "mean share of the time that actors had nothing to decode, 0…1",
    "step_s": "duration of the whole step (s)",
    "wait_s": "of it, waiting for groups (s)",
    "train_s": "of it, forward, backward and optimiser (s)",
    "publish_s": "of it, publishing the new version (s)",
    "checkpoint_s": "of it, writing a checkpoint (s)",
    "heldout": "held-out accuracy of an evaluation that ended at this step",
    "heldout_by_source": "the same for each source of a mixture",
    "heldout_length": "mean length of its responses (tokens)",
    "heldout_versions": "oldest and newest version that sampled them",
    "entropy_predicted": "entropy change that first-order theory predicts (nats per token)",
    "entropy_predicted_up": "its positive part",
    "entropy_predicted_down": "its negative part",
    "entropy_quadrants": "its four parts by sign of the advantage and of q − e^−H",
    "entropy_predicted_by_lag": "all of these by lag, as LAG/PART; they add up",
    "entropy_realised": "entropy change on the same tokens after the update (nats per token)",
    "entropy_realised_up": "its positive part",
    "entropy_realised_down": "its negative part",
    "entropy_realised_quadrants": "its four parts, as those predicted",
    "entropy_realised_by_lag": "all of these by lag, as LAG/PART; they add up",
    "entropy_measure_s": "what that measurement took (s)",
    "entropy_correlation": "running correlation of predicted and realised change",
    "entropy_slope": "running slope realised / predicted",
    "discriminator_std": "standard deviation of S = q (H + ln q) over the tokens, by lag",
    "discriminator_std_all": "the same over all tokens",
    "discriminator_drift": "mean S − N under the weights applied for staleness, by lag",
    "off_policy": "the same over all, in its deviations; beyond ±0.1: alarm",
    "entropy_bonus": "coefficient of the entropy bonus",
    "synthesis_pool": "proposed problems that may be asked",
    "synthesis_proposals": "problems proposed so far",
    "synthesis_accepted": "of them, taken into the pool so far",
    "synthesis_p": "mean share of right answers to those scored so far",
    "synthesis_label_error": "share of the audited labels that were wrong",
    "synthesis_share": "share of the batch's main groups whose problem was proposed",
    "proposer_reward": "mean reward of the proposals trained on",
    "turn_correct": "feedback: share of the episodes solved at turn k or before, by turn from 0",
    "turns": "feedback: episodes by their last turn",
    "hints": "interveners: hinted rollouts, those right, those kept, hint tokens / sampled tokens",
    "episode_events": "what happened on the way: feedback_slow, feedback_paused, no_room, …",
    "heldout_turns": "held-out share solved at turn k or before, where evaluations have turns",
    "aux_rollouts": "rollouts of aux tickets in the batch",
    "aux_reward": "their mean reward",
    "aux_correct": "share of them that are correct",
    "aux_temperature": "mean temperature they were sampled at",
    "templates/": "a template: its groups, accuracy, length, entropy, format score (0…1)",
    "sources/": "a source of a mixture: the same",
    "curriculum": "problems tracked, their mean success, and the difficulty aimed at (0…100)",
    "methods/": "a number of a method: methods/NAME/NUMBER",
}


def known(name: str) -> bool:
    return name in GLOSSARY or any(name.startswith(k) for k in GLOSSARY if k.endswith("/"))


class Metrics:
    """The sinks of one learner. `keep_until`: the step of the checkpoint it goes on from."""

    def __init__(
        self,
        folder: Path,
        tensorboard: bool = False,
        keep_until: int | None = None,
        wandb: WandbConfig | None = None,
    ) -> None:
        self.path = folder / FILE
        if keep_until is not None:
            _cut(self.path, keep_until)
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = bytearray()
        purge = None if keep_until is None else keep_until + 1
        self._board = Board(folder / "tensorboard", purge) if tensorboard else None
        self._wandb = Wandb(folder, wandb) if wandb is not None else None

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line; what is not finite becomes null. Names must be in the glossary."""
        unknown = [name for name in values if not known(name)]
        assert not unknown, f"no meaning in common/metrics.py:GLOSSARY for {', '.join(unknown)}"
        line = {"step": step, "time": round(time.time(), 3), **values}
        self._append(msgspec.json.encode(line) + b"\n")
        if self._board is not None:
            self._board.write(step, values)
        if self._wandb is not None:
            self._wandb.write(step, _flat(values))

    def _append(self, line: bytes) -> None:
        """While the disk is full lines wait in memory, and so does the rest of a cut one."""
        self._unwritten += line
        try:
            taken = self._file.write(self._unwritten)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return
        del self._unwritten[:taken]

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()


def target(line: Mapping[str, Any]) -> float | None:
    """The entropy that a method aimed at in a step (nats per token); None: none did."""
    aims = (line[name] for name in line if name.startswith("methods/") and name.endswith("/target"))
    return next((float(aim) for aim in aims if isinstance(aim, int | float)), None)


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run by step, the last one of each; a line cut by a kill is left out."""
    by_step = {line["step"]: line for line in _lines(folder / FILE)}
    return [by_step[step] for step in sorted(by_step)]


class Reader:
    """As `read`, again and again while the file grows: each look takes what was written since, and
    keeps of a line what is named only.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self._path = folder / FILE
        self._names = frozenset(names) | {"step"}
        self._forget((0, 0))

    def _forget(self, identity: tuple[int, int]) -> None:
        self._identity = identity  # device and inode
        self._at = 0
        self._lines: dict[int, dict[str, Any]] = {}

    def lines(self) -> list[dict[str, Any]]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) != self._identity or found.st_size < self._at:
                self._forget((found.st_dev, found.st_ino))  # a resume cuts what it does again
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole + newline)
        for line in _decoded(whole):
            self._lines[line["step"]] = {k: v for k, v in line.items() if k in self._names}
        return [self._lines[step] for step in sorted(self._lines)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return list(_decoded(path.read_bytes())) if path.exists() else []


def _decoded(data: bytes) -> Iterator[dict[str, Any]]:
    for raw in data.splitlines():
        try:
            line = msgspec.json.decode(raw)
        except msgspec.DecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _cut(path: Path, keep_until: int) -> None:
    """Leave out what a resumed run does again, and a line that a kill cut."""
    kept = [line for line in _lines(path) if line["step"] <= keep_until]
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in kept))
    aside.replace(path)


class Board:
    """TensorBoard's event files, written without torch."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))
        if purge_step is not None:  # readers forget what an earlier process wrote for these steps
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._writer.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [
            Summary.Value(tag=tag, simple_value=number)
            for tag, number in _flat(values).items()
            if number is not None
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=numbers))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


def _flat(values: Mapping[str, Value]) -> dict[str, float | int | None]:
    flat: dict[str, float | int | None] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        else:
            flat[name] = value
    return flat
