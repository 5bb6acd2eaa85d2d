"""The state of a run as Prometheus reads it: text format 0.0.4, names `isentrope_*`.

Numbers of the last step keep the names and the words of `metrics.GLOSSARY`, with their units
written out (`step_s` → `isentrope_step_step_seconds`); what is a table there has a label here:
`lag`, `reason`, `part`. Actors have the label `actor`, tickets `kind` and `fate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common.metrics import GLOSSARY
from common.status import PHASES, ActorStatus, Status, actor_idle

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "isentrope_"
OPEN_FATES = ("buffered", "in_flight")  # a ticket leaves these again
LABELS = {"lag": "lag", "dropped": "reason", "stale_length": "quarter"}
BY_LAG = {"ratio", "clipped", "ess", "kl", "discriminator_std"}
SKIPPED = {"time", "seconds", "issued", "in_flight", "buffered"}  # of the status instead

ACTOR: dict[str, tuple[str, str, str]] = {  # field: (name, type, help)
    "version": ("version", "gauge", "of the weights that the actor samples from"),
    "tokens_per_s": ("tokens_per_second", "gauge", "tokens that the actor samples per second"),
    "busy": ("busy", "gauge", "share of the last seconds with something to decode, 0…1"),
    "running": ("running", "gauge", "sequences being decoded"),
    "waiting": ("waiting", "gauge", "sequences without a slot"),
    "held": ("tickets", "gauge", "tickets that the actor holds"),
    "capacity": ("capacity", "gauge", "tickets that it can hold"),
    "kv_use": ("kv_use", "gauge", "share of the KV cache in use, 0…1"),
    "silent_s": ("silent_seconds", "gauge", "seconds since the learner heard of it"),
    "up": ("up", "gauge", "1 when it has an engine"),
    "pause_s": ("pause_seconds_total", "counter", "seconds with decoding held for a swap"),
    "restarts": ("restarts_total", "counter", "engines that took the place of a broken one"),
    "refused": ("refused_versions_total", "counter", "weight versions that it refused"),
}

Sample = tuple[Mapping[str, str], float]


def text(now: Status | None, line: Mapping[str, Any], at: float) -> str:
    """`line`: the newest of metrics.jsonl, {} before the first step. `at`: seconds since the
    epoch.
    """
    families = [
        _family("learner_up", "gauge", "1 when the learner spoke lately", [({}, _up(now, at))])
    ]
    if now is not None:
        families += _status(now, at)
        families += _actors(now.actors)
    families += _step(line)
    return "".join(families)


def _up(now: Status | None, at: float) -> float:
    return float(now is not None and not now.over and at - now.at < 60.0)


def _family(name: str, kind: str, words: str, samples: Iterable[Sample]) -> str:
    """ "" without samples: a family of none is not worth a line."""
    shown = [f"{PREFIX}{name}{_labels(labels)} {_value(value)}\n" for labels, value in samples]
    if not shown:
        return ""
    said = words.replace("\\", r"\\").replace("\n", r"\n")
    head = f"# HELP {PREFIX}{name} {said}\n# TYPE {PREFIX}{name} {kind}\n"
    return head + "".join(shown)


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _value(value: float) -> str:
    return repr(float(value)) if value != int(value) or abs(value) > 1e15 else str(int(value))


# -- of the status ----------------------------------------------------------------------------


def _status(now: Status, at: float) -> Iterator[str]:
    names = {"run": now.run, "incarnation": str(now.incarnation)}
    yield _family("run_info", "gauge", "which run this is", [(names, 1)])
    phases = [({"phase": phase}, float(phase == now.phase)) for phase in PHASES]
    yield _family("phase", "gauge", "1 for what the learner does", phases)
    single = (
        ("silent_seconds", "seconds since the learner's last word", max(0.0, at - now.at)),
        ("steps_done", "steps finished", now.step),
        ("steps_wanted", "steps that the run is to have", now.steps),
        ("version", "number of the published weights", now.version),
        ("max_lag", "largest lag that is allowed (steps)", now.max_lag),
        ("conserved", "1 when issued = trained + dropped + buffered + in flight", now.conserved),
        ("warnings", "things that a person should know", len(now.warnings)),
        ("actors_connected", "actors connected to the learner", len(now.actors)),
        ("recent_learner_idle", "share of the last steps without a batch, 0…1", now.learner_idle),
        ("recent_actor_idle", "mean share of the last seconds, 0…1", actor_idle(now)),
    )
    for name, words, value in single:
        yield _family(name, "gauge", words, [({}, float(value))])
    yield _groups(now)
    lags = [({"lag": str(lag)}, float(n)) for lag, n in sorted(now.lags.items())]
    yield _family("rollouts_total", "counter", "rollouts trained on, by lag", lags)


def _groups(now: Status) -> str:
    """Ends only grow: counters. What a ticket leaves again is a gauge."""
    ended: list[Sample] = []
    waiting: list[Sample] = []
    for kind, fates in now.groups.items():
        for fate, count in fates.items():
            sample = ({"kind": kind, "fate": fate}, float(count))
            (waiting if fate in OPEN_FATES else ended).append(sample)
    return _family("tickets_total", "counter", "tickets issued, and their ends by fate", ended) + (
        _family("tickets_open", "gauge", "tickets in flight and groups buffered", waiting)
    )


def _actors(actors: Mapping[str, ActorStatus]) -> Iterator[str]:
    for field, (name, kind, words) in ACTOR.items():
        samples = [({"actor": k}, float(getattr(a, field))) for k, a in sorted(actors.items())]
        yield _family(f"actor_{name}", kind, words, samples)


# -- of the last step -------------------------------------------------------------------------


def _step(line: Mapping[str, Any]) -> Iterator[str]:
    """A family a name; one for all `methods/NAME/NUMBER`, and for the other names with a slash."""
    parted: dict[str, list[Sample]] = {}
    for name, value in line.items():
        prefix, slash, rest = name.partition("/")
        if slash and f"{prefix}/" in GLOSSARY:
            which, _, number = rest.partition("/")
            labels = {"name": which, "number": number}
            parted.setdefault(prefix, []).extend((labels, v) for _, v in _samples("", value))
        elif name in GLOSSARY and name not in SKIPPED:
            yield _family(f"step_{_safe(name)}", "gauge", GLOSSARY[name], _samples(name, value))
    for prefix, samples in parted.items():
        yield _family(f"step_{_safe(prefix)}", "gauge", GLOSSARY[f"{prefix}/"], samples)


def _samples(name: str, value: Any) -> list[Sample]:
    """One of a number, one an entry of a table; none of what is absent."""
    if isinstance(value, Mapping):
        pairs = ((_key(name, str(key)), number) for key, number in value.items())
        return [(labels, float(n)) for labels, n in pairs if isinstance(n, int | float)]
    return [({}, float(value))] if isinstance(value, int | float) else []


def _key(name: str, key: str) -> dict[str, str]:
    if name.endswith("_by_lag") or name in BY_LAG:
        lag, _, part = key.partition("/")
        return {"lag": lag, "part": part} if part else {"lag": lag}
    return {LABELS.get(name, "part"): key}


def _safe(name: str) -> str:
    """In letters that Prometheus takes, and the unit in full, as it wants them."""
    plain = re.sub(r"_per_s$", "_per_second", re.sub(r"[^a-zA-Z0-9_]", "_", name))
    return re.sub(r"_s$", "_seconds", plain)
