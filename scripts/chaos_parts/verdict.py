"""The end of a chaos run: is everything counted, was anything trained twice, are the bits the same?

Said by the product's own commands in fresh processes, and by a reading of the journal of our own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chaos_parts.stage import Stage

from common.errors import JournalError
from common.journal import read
from common.records import Admit, Step

ISENTROPE = str(Path(sys.executable).parent / "isentrope")


def judge(stage: Stage, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Numbers, and violations. `seconds`: how long the run was; recomputing it may take as much."""
    patience_s = 120.0 + 3 * seconds
    numbers, wrong = examine(stage.run_folder, stage.acked())
    if stage.has_witnesses and not numbers["acknowledged"]:
        wrong.append("no acknowledgement was seen: nothing is known of what was promised")
    steps = numbers["steps"]
    replayed = replay(stage.run_folder, steps, patience_s) if stage.ranks == 1 else {"wrong": []}
    resumed = _resume(stage, steps, replayed.get("digest", ""), patience_s)
    wrong += [*replayed["wrong"], *resumed, *told(stage.secrets(), stage.work, stage.run_folder)]
    return {
        **numbers,
        "resumed_bit_equal": not replayed["wrong"] and not resumed,
        "noticed": noticed(stage.logs),
    }, wrong


def examine(run_folder: Path, acked: set[int]) -> tuple[dict[str, Any], list[str]]:
    """What the journal says, by the audit and by a reading of our own. `acked`: tickets whose
    results somebody saw acknowledged."""
    audit, wrong = _audit(run_folder)
    sums = audit.get("sums", {}).values()
    try:
        admitted, trained = _journal(run_folder)
    except JournalError as error:
        wrong.append(str(error))
        admitted, trained = set(), Counter()
    lost = len(acked - admitted)
    if lost:
        wrong.append(f"{lost} results were acknowledged and are not in the journal")
    duplicates = sum(count - 1 for count in trained.values())
    if duplicates:
        wrong.append(f"{duplicates} groups were trained on twice")
    if not trained:
        wrong.append("nothing was trained on")
    gap = sum(_issued(each) - _accounted(each) for each in sums)
    if gap:
        wrong.append(f"{gap} tickets have no fate, or two")
    numbers = {
        "issued": sum(each["issued"] for each in sums),
        "trained": sum(each["trained"] for each in sums),
        "dropped": sum(sum(each["dropped"].values()) for each in sums),
        "steps": int(audit.get("steps", 0)),
        "incarnations": audit.get("incarnations", 0),
        "acknowledged": len(acked),
        "duplicates_trained": duplicates,
        "lost": lost + abs(gap),
    }
    return numbers, wrong


def told(secrets: Iterable[bytes], *folders: Path) -> list[str]:
    """Files that hold a secret and are not the one that is there to hold it: none may."""
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    readers = [path for path in files if path.stat().st_mode & 0o077]
    held = [(path, path.read_bytes()) for path in readers]
    return sorted(
        f"{path} shows a password or a key to others"
        for path, data in held
        if any(secret in data for secret in secrets)
    )


NOTICED = {  # what logs say when a fault was felt
    "messages_refused": b"sent a message that is",
    "results_refused": b"result of ticket ",
    "strangers_refused": b"refused a key that is not listed",
    "versions_refused": b" goes on being served",
    "connected_afresh": b"connecting afresh",
    "disk_full": b"no space for",
    "engines_made_again": b"another engine serves",
}


def noticed(logs: Path) -> dict[str, int]:
    """Lines of learner and actors that tell of faults."""
    texts = [path.read_bytes() for path in logs.glob("*.log")]
    return {name: sum(text.count(words) for text in texts) for name, words in NOTICED.items()}


def _audit(folder: Path) -> tuple[dict[str, Any], list[str]]:
    done = _run([ISENTROPE, "audit", str(folder), "--json"], 300.0)
    if not done.stdout.strip():
        return {}, [f"isentrope audit said nothing (exit {done.returncode}): {done.stderr[-300:]}"]
    found = json.loads(done.stdout.splitlines()[-1])
    return found, [f"audit: {violation}" for violation in found["violations"]]


def _issued(kind: dict[str, Any]) -> int:
    return int(kind["issued"])


def _accounted(kind: dict[str, Any]) -> int:
    """Every ticket of a kind has one fate."""
    ended = kind["trained"] + kind["evaluated"] + kind["scored"] + sum(kind["dropped"].values())
    return int(ended + kind["buffered"] + kind["in_flight"])


def _journal(folder: Path) -> tuple[set[int], Counter[int]]:
    """Tickets admitted, and how often each was trained on. Raises JournalError."""
    admitted, trained = set[int](), Counter[int]()
    for _, record in read(folder / "journal"):
        if isinstance(record, Admit):
            admitted.add(record.ticket)
        elif isinstance(record, Step):
            trained.update(record.consumed)
    return admitted, trained


def replay(run_folder: Path, steps: int, patience_s: float) -> dict[str, Any]:
    """Every step again from the first one, without checkpoints."""
    done = _run([ISENTROPE, "replay", str(run_folder), "--json"], patience_s)
    if done.returncode:
        return {"wrong": [f"replay failed: {_last(done)}"]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    whole = found["steps"] == found["equal"] == steps
    found["wrong"] = [] if whole else [f"replay: {found['equal']} of {steps} steps are bit-equal"]
    return found


def _resume(stage: Stage, steps: int, digest: str, patience_s: float) -> list[str]:
    """A copy that lost its newest checkpoint goes on in a fresh process, to where the run was."""
    copy = stage.work / "resumed"
    shutil.copytree(stage.run_folder, copy)
    found = sorted((copy / "checkpoints").glob("step-*"))
    if not found:
        return ["there is no checkpoint to resume from"]
    for gone in found[-1:] if stage.ranks == 1 else found:  # many ranks: all steps again
        shutil.rmtree(gone)
    command = stage.learner_command(copy, "--resume", "-s", f"learner.steps={steps}")
    done = _run(stage.ground.enter("learner", command), patience_s)
    wrong = [f"resume failed: {_last(done)}"] if done.returncode else []
    if "approximate" in done.stderr:
        wrong.append("resume was approximate, not bit-equal")
    elif digest and not done.returncode and _digest(copy) != digest:
        wrong.append("the resumed parameters are not those of the replay")
    wrong += [f"after the resume: {violation}" for violation in _audit(copy)[1]]
    if not wrong:
        shutil.rmtree(copy)
    return wrong


def _digest(folder: Path) -> str:
    """Of the parameters after the last step: the digest in its record."""
    last = [record for _, record in read(folder / "journal") if isinstance(record, Step)][-1]
    return last.digest


def _run(command: list[str], patience_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=patience_s, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end within {patience_s:.0f} s")


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"exit {done.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"
