"""The auditor finds every broken promise, and nothing else. Journals are written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common.audit import audit
from common.audit_cli import audit as command
from common.codec import Codec
from common.journal import Journal, seal_of
from common.records import (
    Admit,
    AnyRecord,
    ConfigChange,
    Drop,
    Finish,
    Issue,
    Open,
    Proposal,
    Ready,
    Step,
)
from common.versions import Tensor, digest
from common.wire import FromActor, Grading, Group
from tests.builders import make_group, make_rollout, make_ticket

LEARNER = {
    "groups_per_step": 2,
    "n_aux": 0,
    "max_lag": 1,
    "refill_limit": 3.0,
    "drop_truncated": False,
    "advantage": "grpo",
}


class Run:
    """A run folder whose journal says what the test wants it to say."""

    def __init__(self, path: Path, **learner: object) -> None:
        self.path = path
        self.config = LEARNER | learner
        self.codec = Codec(FromActor)
        self.incarnation = 0
        self.journal: Journal | None = None
        (path / "journal").mkdir()
        (path / "recipe.toml").touch()
        self.opened()

    def opened(self, run: str = "r", sealed: object = "as it is", incarnation: int = 0) -> "Run":
        """A new learner process begins."""
        self.close()
        self.incarnation = incarnation or self.incarnation + 1
        seal = seal_of(self.path / "journal") if sealed == "as it is" else sealed
        self.journal = Journal(self.path / "journal", self.incarnation)
        config = {"run": {"weights_dtype": "fp32"}, "learner": self.config}
        return self.wrote(Open(run=run, incarnation=self.incarnation, config=config, sealed=seal))

    def wrote(self, *records: AnyRecord) -> "Run":
        assert self.journal is not None
        for record in records:
            self.journal.append(record)
        self.journal.commit()
        return self

    def issued(self, *ids: int, kind: str = "main") -> "Run":
        return self.wrote(*(Issue(ticket=make_ticket(id, kind=kind)) for id in ids))

    def admitted(self, *ids: int, group: Group | None = None, **fields: object) -> "Run":
        groups = [group or make_group(ticket=id, **fields) for id in ids]
        frames = [bytes(self.codec.encode(group)) for group in groups]
        return self.wrote(*(Admit(ticket=i, frame=f) for i, f in zip(ids, frames, strict=True)))

    def got(self, *ids: int, kind: str = "main", **fields: object) -> "Run":
        """Issued and admitted."""
        return self.issued(*ids, kind=kind).admitted(*ids, kind=kind, **fields)

    def stepped(
        self,
        t: int,
        consumed: Sequence[int],
        dropped: Sequence[tuple[int, str]] = (),
        version: int | None = None,
        digest: str = "d",
    ) -> "Run":
        version = t + 1 if version is None else version
        return self.wrote(
            Step(
                t=t,
                version=version,
                digest=digest,
                consumed=tuple(consumed),
                dropped=tuple(dropped),
            )
        )

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def violations(self) -> list[str]:
        self.close()
        found = audit(self.path)
        assert found.ok == (not found.violations)
        return found.violations


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_good_run_passes_and_its_sums_are_counted(run: Run) -> None:
    run.issued(0, 1, 2, 3, 4, 5, 6)
    run.issued(50, 51, kind="eval").admitted(50, kind="eval")
    run.admitted(0).admitted(2, rewards=(1, 1)).admitted(1)
    run.stepped(0, [0, 1], [(2, "zero_variance")])
    run.admitted(3, version=0).admitted(4, version=1)
    run.stepped(1, [3, 4])
    run.admitted(5, version=1)
    run.wrote(Drop(ticket=51, reason="failed"))
    run.close()
    found = audit(run.path)
    assert found.violations == []
    main = found.sums["main"]
    assert (main.issued, main.trained, main.buffered, main.in_flight) == (7, 4, 1, 1)
    assert main.dropped == {"zero_variance": 1}
    assert found.sums["eval"].evaluated == 1
    assert found.sums["eval"].dropped == {"failed": 1}
    assert (found.steps, found.lag_max, found.lag_mean, found.max_lag) == (2, 1, 0.25, 1)
    assert found.complete
    assert found.holds


def test_a_resumed_run_passes_and_its_processes_are_counted(run: Run) -> None:
    run.got(0).opened().got(1).stepped(0, [0, 1]).opened().wrote(Finish(t=1, reason="done"))
    run.close()
    found = audit(run.path)
    assert found.violations == []
    assert (found.incarnations, found.finished) == (3, "done")


def test_an_empty_journal_and_a_torn_tail_pass(run: Run, tmp_path: Path) -> None:
    assert run.violations() == []
    with next((tmp_path / "journal").iterdir()).open("ab") as file:
        file.write(b"torn")
    assert run.violations() == []


def test_a_ticket_trained_twice_is_found(run: Run) -> None:
    run.got(0, 1, 2).stepped(0, [0, 1]).stepped(1, [1, 2])
    assert any("ticket 1 is trained again; step 0" in v for v in run.violations())


def test_a_ticket_trained_without_its_admission_is_found(run: Run) -> None:
    run.got(0).issued(1).stepped(0, [0, 1])
    assert any("ticket 1 is trained although it is in_flight" in v for v in run.violations())


def test_a_ticket_trained_after_it_was_dropped_is_found(run: Run) -> None:
    run.got(0, 1, 2).wrote(Drop(ticket=1, reason="surplus")).stepped(0, [0, 1])
    assert any("ticket 1 is trained although it is surplus" in v for v in run.violations())


def test_what_nobody_issued_is_found(run: Run) -> None:
    run.got(0).admitted(7).stepped(0, [0, 8]).wrote(Drop(ticket=9, reason="failed"))
    found = run.violations()
    for id in (7, 8, 9):
        assert any(f"ticket {id} " in v and "never issued" in v for v in found)


def test_an_id_issued_or_admitted_twice_is_found(run: Run) -> None:
    run.got(0).issued(0).admitted(0)
    found = run.violations()
    assert "ticket 0 is issued twice" in found
    assert "ticket 0 is admitted although it is buffered" in found


def test_an_eval_ticket_that_is_trained_on_is_found(run: Run) -> None:
    run.got(0, kind="eval").got(1, 2).stepped(0, [1, 0])
    assert any("ticket 0 is an eval ticket" in v for v in run.violations())


@pytest.mark.parametrize(
    ("consumed", "dropped"),
    [
        ([1, 2], []),  # not the first in admission order
        ([1, 0], []),  # not in that order
        ([0, 1, 2], []),  # too many
        ([0], []),  # too few
        ([0, 1], [(2, "zero_variance")]),  # nothing was wrong with it
    ],
)
def test_a_batch_that_the_rule_does_not_give_is_found(
    run: Run, consumed: list[int], dropped: list[tuple[int, str]]
) -> None:
    run.got(0, 1, 2).stepped(0, consumed, dropped)
    assert any("batch rule" in v for v in run.violations())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rewards": (1, 1)}, "zero_variance"),
        ({"rollouts": (make_rollout(1.0), make_rollout(0.0, error="crash"))}, "verifier_error"),
        (
            {"rollouts": (make_rollout(1, finish="length"), make_rollout(0, finish="length"))},
            "truncated",
        ),
    ],
)
def test_what_no_step_may_use_is_dropped_by_name_or_found(
    tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    for name, consumed, dropped in (
        ("good", [0, 2], [(1, reason)]),
        ("trained", [0, 1], []),
        ("unnamed", [0, 2], []),
        ("misnamed", [0, 2], [(1, "stale")]),
    ):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name, drop_truncated=True)
        run.got(0).got(1, **fields).got(2).stepped(0, consumed, dropped)
        assert bool(run.violations()) == (name != "good")


def test_a_stale_ticket_must_be_dropped_and_never_trained(tmp_path: Path) -> None:
    for name, consumed, dropped in (
        ("good", [6, 7], [(4, "stale")]),
        ("bad", [4, 6], []),
    ):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name).got(0, 1, 2, 3, 4)
        run.stepped(0, [0, 1]).stepped(1, [2, 3])
        run.got(6, 7, version=1).stepped(2, consumed, dropped)
        found = run.violations()
        assert bool(found) == (name == "bad")
        assert name == "good" or any("ticket 4 has lag 2; max_lag is 1" in v for v in found)


def test_a_step_taken_before_its_batch_was_determined_is_found(run: Run) -> None:
    run.got(0).stepped(0, [0])
    assert any("before its batch was determined" in v for v in run.violations())


def test_refilling_ends_at_its_limit_with_the_usable_ones_there_are(run: Run) -> None:
    run.got(0, 1, 2, rewards=(1, 1)).got(3).got(4, 5, rewards=(0, 0)).got(6)
    dropped = [(i, "zero_variance") for i in (0, 1, 2, 4, 5)]
    assert run.stepped(0, [3], dropped).got(7).stepped(1, [6, 7]).violations() == []


def test_aux_tickets_follow_the_main_part_and_only_those_admitted_before_its_end(
    tmp_path: Path,
) -> None:
    for name, consumed in (("good", [0, 2, 1]), ("late", [0, 2, 3]), ("mixed", [0, 1, 2])):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name, n_aux=1)
        run.got(0).got(1, kind="aux").got(2).got(3, kind="aux").stepped(0, consumed)
        assert bool(run.violations()) == (name != "good")


def test_a_change_of_configuration_holds_from_its_step_on(run: Run) -> None:
    run.got(0, 1).stepped(0, [0, 1])
    run.wrote(ConfigChange(t=1, overrides={"learner": {"groups_per_step": 1}}))
    assert run.got(2, 3).stepped(1, [2]).violations() == []


@pytest.mark.parametrize(("t", "version"), [(1, 2), (0, 3)])
def test_steps_that_do_not_follow_each_other_are_found(run: Run, t: int, version: int) -> None:
    run.got(0, 1).stepped(t, [0, 1], version=version)
    assert any(f"step {t}" in v for v in run.violations())


def test_a_step_recorded_twice_is_found(run: Run) -> None:
    run.got(0, 1).stepped(0, [0, 1]).stepped(0, [0, 1])
    assert "step 0 is recorded twice" in run.violations()


def test_tokens_of_a_version_that_no_step_had_made_are_found(run: Run) -> None:
    run.got(0, version=1)
    assert run.violations() == ["ticket 0 has tokens of version 1, which no step had made"]


def test_a_group_that_is_another_ticket_s_or_damaged_or_incomplete_is_found(run: Run) -> None:
    run.issued(0, 1, 2, 3).admitted(0, group=make_group(ticket=9))
    run.wrote(Admit(ticket=1, frame=b"\x00"))
    run.admitted(2, group=make_group((1, 0, 1), ticket=2))
    run.admitted(3, group=make_group(ticket=3, rollouts=(make_rollout(), make_rollout())))
    found = run.violations()
    assert [v.split()[1].rstrip(":") for v in found] == ["0", "1", "2"]


def test_an_unnamed_reason_is_found(run: Run) -> None:
    run.issued(0).wrote(Drop(ticket=0, reason="lost"))
    assert any("no known reason ('lost')" in v for v in run.violations())


def test_a_run_that_says_it_finished_elsewhere_is_found(run: Run) -> None:
    run.got(0, 1).stepped(0, [0, 1]).wrote(Finish(t=5, reason="done"))
    assert any("finished at step 5, after 1" in v for v in run.violations())


def test_another_run_or_a_false_seal_is_found(run: Run) -> None:
    run.got(0).opened(run="other")
    assert any("is of run other" in v for v in run.violations())
    run.opened(sealed=None)
    assert any("sealed None" in v for v in run.violations())


def test_a_damaged_journal_is_a_violation_with_its_place(run: Run, tmp_path: Path) -> None:
    run.got(0, 1).stepped(0, [0, 1]).close()
    path = next((tmp_path / "journal").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (violation,) = run.violations()
    assert "offset" in violation


def weights(seed: int) -> tuple[Tensor, ...]:
    array = np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)
    return (Tensor("w", "F32", (3, 4), memoryview(array).cast("B")),)


def checkpointed(run: Run, t: int, tensors: tuple[Tensor, ...]) -> Path:
    """Written byte by byte, as the format says: no tensor library here either."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for tensor in tensors:
        offsets = [len(body), len(body) + tensor.data.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        body += tensor.data
    folder = run.path / "checkpoints" / f"step-{t:08d}"
    folder.mkdir(parents=True)
    text = json.dumps(header).encode()
    path = folder / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def test_checkpoints_must_hold_the_weights_of_their_step_s_record(run: Run) -> None:
    run.got(0, 1).stepped(0, [0, 1], digest=digest(weights(1)))
    checkpointed(run, 0, weights(0))
    path = checkpointed(run, 1, weights(1))
    assert run.violations() == []
    assert audit(run.path).checkpoints == 2
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert any("step-00000001: its weights" in v for v in run.violations())
    path.write_bytes(whole[:-1])
    assert any("is cut" in v for v in run.violations())
    path.write_bytes(b"x")
    assert any("can not be read" in v for v in run.violations())


def test_a_checkpoint_of_a_step_that_never_was_is_found(run: Run) -> None:
    checkpointed(run, 3, weights(0))
    assert any("no step record made version 3" in v for v in run.violations())


def test_rounded_weights_are_compared_after_rounding_as_torch_rounds() -> None:
    import torch

    from common.audit_checkpoints import published

    rng = np.random.default_rng(0)
    array = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    array = array[~np.isnan(array)]
    (ours,) = published((Tensor("w", "F32", array.shape, array.data),), "bf16")
    theirs = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint8).numpy()
    assert bytes(ours.data) == theirs.tobytes()


def test_of_a_pruned_journal_what_is_left_is_checked(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.got(0, 1, 2).stepped(0, [0, 1]).opened().got(3).stepped(1, [2, 3]).got(4, 4)
    run.close()
    min((tmp_path / "journal").iterdir()).unlink()
    found = audit(tmp_path)
    assert not found.complete
    assert found.violations == [
        "ticket 4 is issued twice",
        "ticket 4 is admitted although it is buffered",
    ]


def test_the_command_prints_the_sums_and_fails_on_a_violation(run: Run) -> None:
    run.got(0, 1).stepped(0, [0, 1])
    run.close()
    done = CliRunner().invoke(command, [str(run.path)])
    assert done.exit_code == 0
    assert "every promise kept" in done.output
    run.opened().stepped(1, [0, 1])
    run.close()
    done = CliRunner().invoke(command, [str(run.path), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.output.splitlines()[-1])["ok"] is False


PROPOSING = {"synthesis": {"proposers": 1, "max_lag": None}}


def test_a_proposer_is_trained_once_its_scores_are_known_in_their_order(tmp_path: Path) -> None:
    run = Run(tmp_path, **PROPOSING)
    run.issued(0, 1).issued(7, 8, kind="propose").issued(9, kind="score")
    run.admitted(7, 8, kind="propose").admitted(9, kind="score").admitted(0)
    run.wrote(Ready(ticket=8, scores=(1.0, 0.0)), Ready(ticket=7, scores=(1.0, 0.0)))
    run.admitted(1).stepped(0, [0, 1, 8])
    run.close()
    found = audit(run.path)
    assert found.violations == []
    assert (found.sums["propose"].trained, found.sums["propose"].buffered) == (1, 1)
    assert found.sums["score"].scored == 1


def test_a_proposer_trained_without_scores_or_out_of_turn_is_found(tmp_path: Path) -> None:
    run = Run(tmp_path, **PROPOSING)
    run.got(0, 7, kind="propose").got(1, 2).stepped(0, [1, 2, 0])
    run.wrote(Ready(ticket=7, scores=(1.0,)))
    said = run.violations()
    assert any("ticket 0 is trained before its score is known" in v for v in said)
    assert any("the batch rule gives [1, 2]" in v for v in said)
    assert any("ticket 7 is ready with 1 scores of 2" in v for v in said)


def test_a_proposer_beyond_its_own_lag_is_found(tmp_path: Path) -> None:
    run = Run(tmp_path, **PROPOSING)
    run.got(9, kind="propose").wrote(Ready(ticket=9, scores=(1.0, 0.0)))
    for t in range(3):
        run.got(2 * t, 2 * t + 1, version=t).stepped(t, [2 * t, 2 * t + 1])
    run.got(20, 21, version=3).stepped(3, [20, 21, 9])
    assert any("ticket 9 has lag 3; max_lag is 2" in v for v in run.violations())


def test_a_problem_that_jumps_a_state_or_is_asked_when_it_may_not_be_is_found(run: Run) -> None:
    run.issued(5, kind="propose").admitted(5, kind="propose")
    known = {"ticket": 5, "rollout": 0}
    run.wrote(Proposal(**known, state="extracted", text="1+2?", parent="p"))
    run.wrote(Proposal(**known, state="labelled", gold="3", origin="inherited"))
    asked = {"problem": "synthesis/5/0", "parent": 5}
    run.wrote(Issue(ticket=make_ticket(6, **asked, grading=Grading(gold="3"))))
    run.wrote(Proposal(**known, state="active"), Proposal(**known, state="expired"))
    run.wrote(Proposal(**known | {"rollout": 4}, state="extracted"))
    run.wrote(Issue(ticket=make_ticket(8, **asked, grading=Grading(gold="4"))))
    said = "\n".join(run.violations())
    assert "ticket 6 asks synthesis/5/0, which is labelled" in said
    assert "synthesis/5/0 went from labelled to active" in said
    assert "synthesis/5/0 is expired for no reason" in said
    assert "synthesis/5/4 is extracted, never proposed" in said
    assert "ticket 8 asks synthesis/5/0 with another answer than its label" in said
