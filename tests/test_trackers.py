"""Weights & Biases, offline: the real package, and what it wrote read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from common.recipe import load
from common.runfolder import RunFolder
from learner.config import LearnerConfig

WRITE = """
from pathlib import Path
from common.metrics import Metrics
from common.trackers import WandbConfig
folder = Path({folder!r})
for life in (None, 1):
    sink = Metrics(folder, keep_until=life, wandb=WandbConfig(project="sums"))
    sink.write(1 if life is None else 2, {{"reward": 0.25, "lag": {{"0": 3}}, "heldout": None}})
    sink.close()
"""
READ = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2 as pb

def records(data, block=32768, at=7):  # the format of LevelDB's log behind seven bytes
    whole = b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""

def life(path):
    facts = {"rows": [], "run": {}, "config": {}}
    for data in records(Path(path).read_bytes()):
        record = pb.Record()
        record.ParseFromString(data)
        for item in record.run.config.update:
            facts["config"][item.key] = json.loads(item.value_json)
        if record.run.run_id:
            facts["run"] = {"id": record.run.run_id, "project": record.run.project}
        items = record.history.item
        row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
        facts["rows"] += [row] if row else []
    return facts

print(json.dumps([life(path) for path in sys.argv[1:]]))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_life_of_a_run_is_written_under_its_id_without_its_secrets(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    RunFolder.create(folder, "r1")
    (folder / "recipe.toml").write_text('[run]\nredis = "redis://:secret@host"\nseed = 3\n')
    assert "secret" not in python(WRITE.format(folder=str(folder)))
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    lives = json.loads(python(READ, *map(str, files)).splitlines()[-1])
    rows = [row for life in lives for row in life["rows"]]
    assert [row["step"] for row in rows] == [1, 2]
    assert {(row["reward"], row["lag/0"]) for row in rows} == {(0.25, 3)}
    for life in lives:
        assert life["run"] == {"id": "r1", "project": "sums"}
        assert life["config"]["run"] == {"seed": 3}
    assert not [f for f in folder.glob("wandb/**/*") if f.is_file() and b"secret" in f.read_bytes()]


def test_a_recipe_asks_for_it_by_a_table() -> None:
    sections = {"run": RunConfig, "learner": LearnerConfig}
    config = load("tiny", sections, ["learner.wandb.project=sums"])["learner"]
    assert isinstance(config, LearnerConfig)
    assert config.wandb is not None
    assert (config.wandb.project, config.wandb.mode) == ("sums", "offline")
    with pytest.raises(ConfigError, match=r"wandb\.mode"):
        load("tiny", sections, ["learner.wandb.mode=sometimes"])
