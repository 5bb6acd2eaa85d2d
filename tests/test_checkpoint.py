import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import RunConfig
from common.errors import DataError, JournalError
from common.models import FOLDER_VARIABLE
from learner import checkpoint
from learner import model as models
from learner.config import LearnerConfig
from learner.methods.entropy_bonus import EntropyBonus
from learner.model import Policy
from learner.state import TrainState, state_of
from learner.step import train_step
from learner.tuning import ClasspConfig, KappaConfig
from tests.builders import tiny_model
from tests.test_step import a_batch

FOLD = b"what the ledger knows"
FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "fold.msgpack")


def settings(**fields: Any) -> LearnerConfig:
    return LearnerConfig(warmup_steps=3, lr=1e-3, realised_every=1, **fields)


def fresh(weights_dtype: Any = "fp32", **shape: Any) -> TrainState:
    config = settings()
    policy = Policy(tiny_model(**shape), config)
    return state_of(policy, RunConfig(weights_dtype=weights_dtype), config)


def trained(steps: int, state: TrainState | None = None, first: int = 0) -> TrainState:
    state = state or fresh()
    for seed in range(first, first + steps):
        train_step(state, a_batch(seed), settings())
    return state


def bits(state: TrainState) -> bytes:
    return b"".join(bytes(b.data) for b in models.snapshot(state.model, "fp32"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path, dtype: Any) -> None:
    straight = trained(3, fresh(dtype))
    checkpoint.save(tmp_path / "step-3", straight, FOLD)
    trained(3, straight, first=3)
    resumed = fresh(dtype)
    assert checkpoint.load(tmp_path / "step-3", resumed) == FOLD
    assert resumed.t == 3
    trained(3, resumed, first=3)
    assert bits(resumed) == bits(straight)
    assert resumed.law.sums == straight.law.sums


def test_the_states_of_methods_travel_with_it(tmp_path: Path) -> None:
    state = trained(1)
    state.methods_state = {"a": {"bonus": 0.1, "history": [1, 2]}}
    checkpoint.save(tmp_path / "c", state, FOLD)
    other = fresh()
    checkpoint.load(tmp_path / "c", other)
    assert other.methods_state == state.methods_state


def test_version_0_has_a_checkpoint_too(tmp_path: Path) -> None:
    state = fresh()
    checkpoint.save(tmp_path / "c", state, FOLD)
    other = trained(1)
    checkpoint.load(tmp_path / "c", other)
    assert bits(other) == bits(state)
    assert other.t == 0


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_cut_damaged_or_missing_file_is_named_and_nothing_is_loaded(
    tmp_path: Path, name: str, damage: str
) -> None:
    checkpoint.save(tmp_path / "c", trained(1), FOLD)
    path = tmp_path / "c" / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    state = fresh()
    before = bits(state)
    with pytest.raises(JournalError, match=r"safetensors|json|msgpack"):
        checkpoint.load(tmp_path / "c", state)
    assert (bits(state), state.t) == (before, 0)


@pytest.mark.parametrize("manifest", [b"", b"[]", b"[1]", b"7", b"{}", b"{", b"\xff"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, manifest: bytes) -> None:
    checkpoint.save(tmp_path / "c", fresh(), FOLD)
    (tmp_path / "c" / "manifest.json").write_bytes(manifest)
    with pytest.raises(JournalError, match=r"damaged; use an older checkpoint"):
        checkpoint.load(tmp_path / "c", fresh())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", fresh(vocab=40), FOLD)
    with pytest.raises(DataError, match=r"another model.*embed_tokens"):
        checkpoint.load(tmp_path / "c", fresh())


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ({"kappa_tune": KappaConfig(tensors=2)}, r"made while \d+ tensors were trained.*are 2"),
        ({"classp": ClasspConfig()}, "moments are another optimiser's"),
    ],
)
def test_a_learner_that_trains_something_else_is_told_what_to_resume_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "models"))
    state = fresh()
    train_step(state, a_batch(), LearnerConfig(warmup_steps=0))
    checkpoint.save(tmp_path / "c", state, FOLD)
    config = LearnerConfig(warmup_steps=0, **then)
    other = state_of(Policy(tiny_model(), config), RunConfig(), config)
    with pytest.raises(DataError, match=rf"{words}.*resume with the learner\.{min(then)}"):
        checkpoint.load(tmp_path / "c", other)


def test_saving_again_replaces_it_and_leaves_nothing_aside(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", trained(1), b"one")
    checkpoint.save(tmp_path / "c", trained(2), b"two")
    assert checkpoint.fold(tmp_path / "c") == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    checkpoint.remove(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_one_replaces_another_leaves_one_or_the_other(tmp_path: Path) -> None:
    """Looks at the folder as it is before whatever is renamed or deleted there."""
    home, moments, watching = tmp_path / "home", tmp_path / "moments", [False]

    def look(event: str, arguments: Any) -> None:
        if watching[0] and event in ("os.rename", "os.remove", "os.rmdir"):
            watching[0] = False
            shutil.copytree(home, moments / str(len(list(moments.iterdir()))))
            watching[0] = True

    moments.mkdir()
    checkpoint.save(home / "c", trained(1), b"one")
    sys.addaudithook(look)  # it cannot be taken back
    watching[0] = True
    checkpoint.save(home / "c", trained(2), b"two")
    watching[0] = False
    seen = sorted(moments.iterdir(), key=lambda moment: int(moment.name))
    assert len(seen) > 2
    for moment in seen:
        checkpoint.sweep(moment)
        assert checkpoint.fold(moment / "c") in (b"one", b"two")
        assert [p.name for p in moment.iterdir()] == ["c"]


def test_what_a_killed_save_left_aside_is_swept_away_by_the_next(tmp_path: Path) -> None:
    for name in (".c.999.tmp", ".b.998.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    checkpoint.save(tmp_path / "c", fresh(), FOLD)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", trained(1), b"one")
    state = trained(1)
    state.methods_state = {"a": {"not for JSON": torch.zeros(1)}}  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "c", state, b"two")
    assert checkpoint.fold(tmp_path / "c") == b"one"


def test_nothing_is_pickled(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", trained(1), FOLD)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted([*FILES, "manifest.json"])
    facts = json.loads((tmp_path / "c" / "state.json").read_text())
    assert facts["t"] == 1
    assert facts["torch"] == torch.__version__


def test_the_random_state_of_torch_goes_on(tmp_path: Path) -> None:
    state = fresh()
    torch.manual_seed(5)
    checkpoint.save(tmp_path / "c", state, FOLD)
    wanted = torch.rand(3)
    checkpoint.load(tmp_path / "c", state)
    assert torch.equal(torch.rand(3), wanted)


def test_a_bonus_added_on_resume_starts_from_its_initial_state(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", trained(1), FOLD)
    state = fresh()
    checkpoint.load(tmp_path / "c", state)
    train_step(state, a_batch(1), settings(methods=(EntropyBonus(),)))
    assert state.methods_state == {"entropy_bonus": {}}
