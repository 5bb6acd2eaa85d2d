"""`isentrope rollouts`: what the policy said, as the journal has it."""

from __future__ import annotations

import io
import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import save_file

from common import models, shards, wire
from common.codec import Codec
from common.config import RunConfig
from common.errors import DataError
from common.journal import Journal
from common.records import Admit, AnyRecord, Drop, Issue, Open, Step
from common.rollouts import pieces, read
from common.rollouts_show import STRONGEST, Shown, Token, Turn, level, page, text
from common.runfolder import RunFolder
from learner import model
from learner.config import LearnerConfig
from learner.rollouts_cli import rollouts
from tests.builders import make_group, make_rollout, make_segment, make_ticket

CODEC = Codec(wire.FromActor)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups trained on, one dropped, one evaluated, one that failed, one buffered."""
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "run")
    folder.recipe.write_text('[run]\nmodel = "tiny"\n', encoding="utf-8")
    journal = Journal(folder.journal, 1)
    for record in records():
        journal.append(record)
    journal.commit()
    journal.close()
    return folder.path


def records() -> list[AnyRecord]:
    sources = ["sums", "sums", "sums", "sums", "sums", "gym"]
    kinds: list[wire.Kind] = ["main", "main", "main", "eval", "main", "main"]
    issued: list[AnyRecord] = [
        Issue(
            ticket=make_ticket(
                id=i,
                kind=kind,
                problem=f"p{i}",
                source=source,
                template=f"t{i % 3}",
                label="before",
            )
        )
        for i, (kind, source) in enumerate(zip(kinds, sources, strict=True))
    ]
    rewards = [(1, 0), (0.5, 0), (1, 1), (1, 0), None, (0, 1)]
    admitted: list[AnyRecord] = [
        Admit(
            ticket=i,
            frame=bytes(
                CODEC.encode(make_group(r, ticket=i, kind=kinds[i], version=i // 2, actor="a"))
            ),
        )
        for i, r in enumerate(rewards)
        if r is not None
    ]
    return [
        Open(run="r", incarnation=1, config={}),
        *issued,
        *admitted,
        Drop(ticket=4, reason="failed"),
        Step(t=0, version=1, digest="", consumed=(0,), dropped=((2, "zero_variance"),)),
        Step(t=1, version=2, digest="", consumed=(1,)),
    ]


def ask(run: Path, *arguments: str) -> Result:
    return CliRunner().invoke(rollouts, [str(run), *arguments])


def lines(run: Path, *arguments: str) -> list[dict[str, object]]:
    done = ask(run, "--json", "-n", "99", *arguments)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.output.splitlines()]


def test_every_admitted_rollout_is_there_once_with_its_fate_step_and_lag(run: Path) -> None:
    found = [(s.ticket.id, s.number, s.fate, s.step, s.lag) for s in read(run / "journal")]
    assert found == [
        *((3, i, "evaluated", None, None) for i in (0, 1)),
        *((2, i, "zero_variance", 1, 0) for i in (0, 1)),  # newer than what was trained: lag 0
        *((0, i, "trained", 1, 0) for i in (0, 1)),
        *((1, i, "trained", 2, 1) for i in (0, 1)),
        *((5, i, "buffered", None, None) for i in (0, 1)),
    ]


@pytest.mark.parametrize(
    ("arguments", "tickets"),
    [
        (("--fate", "trained", "--sort", "oldest"), [0, 0, 1, 1]),
        (("--fate", "trained"), [1, 1, 0, 0]),
        (("--kind", "eval"), [3, 3]),
        (("--step", "2"), [1, 1]),
        (("--lag", "1"), [1, 1]),
        (("--source", "gym"), [5, 5]),
        (("--template", "t1"), [1, 1]),
        (("--template", "t2", "--source", "gym"), [5, 5]),
        (("--problem", "p2"), [2, 2]),
        (("--min-reward", "0.4", "--max-reward", "0.6"), [1]),
        (("--kind", "main", "--sort", "reward", "--min-reward", "0.5"), [2, 2, 0, 5, 1]),
    ],
)
def test_filters_choose_and_sort(run: Path, arguments: tuple[str, ...], tickets: list[int]) -> None:
    assert [line["ticket"] for line in lines(run, *arguments)] == tickets


def test_a_program_gets_prompt_text_tokens_and_log_probabilities(run: Path) -> None:
    (line, _) = lines(run, "--problem", "p0", "--sort", "oldest")
    (segment,) = line["segments"]  # type: ignore[misc]
    assert segment["logps"] == [-1.0, -1.0, -1.0]
    assert len(segment["tokens"]) == 3
    assert "".join(read_back(segment["tokens"])) == segment["text"] != ""


def read_back(tokens: list[int]) -> list[str]:
    from tokenizers import Tokenizer

    path = models.find("tiny") / "tokenizer.json"
    return pieces(lambda ids: str(Tokenizer.from_file(str(path)).decode(list(ids))), tokens)


def test_the_terminal_shows_prompt_response_and_reward(run: Path) -> None:
    said = ask(run, "--problem", "p0").output
    assert "trained at step 1" in said
    assert "reward 1" in said
    assert "✓ main p0" in said
    assert "✗ main p0" in said
    assert "surprisal (nats)" in said


def test_entropy_is_that_of_the_weights_the_run_exported(run: Path) -> None:
    asked = ("--problem", "p0", "--colour", "entropy")
    missing = ask(run, *asked)
    assert isinstance(missing.exception, DataError)
    assert "no weights yet" in str(missing.exception)
    shutil.copytree(models.find("tiny"), run / "model")
    try:
        said = ask(run, *asked).output
    finally:
        shutil.rmtree(run / "model")
    assert "under the weights that the run exported" in said


def test_while_a_run_goes_on_entropy_is_that_of_its_newest_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    """Of two ranks; with weights of zero every entropy is log V, the strongest colour."""
    for t, scale in ((2, 1.0), (7, 0.0)):
        slices(run / "checkpoints" / f"step-{t:08d}", scale)
    try:
        done = ask(run, "--html", str(tmp_path / "page.html"), "--colour", "entropy")
    finally:
        shutil.rmtree(run / "checkpoints")
    assert done.exit_code == 0, done.output
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "entropy under the weights of step 7" in written
    colours = re.findall(r'<b style="--a:([\d.]+)"', written)
    assert colours == ["1.00"] * len(colours) != []


def slices(folder: Path, scale: float) -> None:
    """The weights of a checkpoint of two ranks: those of the tiny model, times `scale`."""
    policy, _ = model.load(RunConfig(), LearnerConfig())
    weights = {name: scale * p.detach() for name, p in model.trainable(policy).items()}
    folder.mkdir(parents=True)
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    (folder / shards.INDEX).write_bytes(shards.Index(2, shapes).dump())
    for rank in (0, 1):
        parts = {k: w[slice(*shards.lines(len(w), rank, 2))].clone() for k, w in weights.items()}
        save_file(parts, folder / shards.name(shards.WEIGHTS, rank, 2))


def test_parts_of_the_reward_are_shown_turn_by_turn(tmp_path: Path) -> None:
    segments = (make_segment(), make_segment((8, 9), (0, 0), role="feedback"), make_segment(turn=1))
    parts = ({"correct": 0.0, "format": 0.5}, {"correct": 1.0, "format": 0.25})
    rollout = make_rollout(1.0, segments=segments, parts=parts)
    folder = of_one_group(tmp_path, (rollout,) * 2)
    said = ask(folder, "--colour", "none").output
    assert "correct 0, 1" in said
    assert "format 0.5, 0.25" in said


def test_nothing_that_fits_is_said_in_one_line(run: Path) -> None:
    said = str(ask(run, "--step", "77").exception)
    assert "no rollout is like that; there are: kinds eval, main; fates buffered" in said
    assert "sources gym, sums; templates t0, t1, t2; steps 1 to 2" in said


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_the_policy_said_is_text_in_the_page_and_never_code() -> None:
    evil = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>'
    shown = Shown(evil, ((evil, evil),), evil, (Turn("policy", (Token(evil, 0.5, evil),)),))
    tags = Tags()
    tags.feed(page([shown], evil, evil, evil))
    assert "script" not in tags.tags
    assert "img" not in tags.tags
    assert tags.text.count(evil) >= 6


def test_what_the_policy_said_moves_no_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\rback"
    tokens = (Token(evil, 0.5, evil),)
    shown = Shown(evil, ((evil, evil),), evil, (Turn("policy", tokens), Turn("hint", tokens)))
    out = io.StringIO()
    Console(file=out, force_terminal=False, width=200).print(text([shown], "surprisal"))
    assert not [c for c in out.getvalue() if unicodedata.category(c) == "Cc" and c != "\n"]
    assert out.getvalue().count("␛]0;title␇␛[2J") == 6


def test_the_page_needs_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    assert ask(run, "--html", str(tmp_path / "page.html")).exit_code == 0
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", written)
    assert written.count("<article") == 8
    assert written.count('<article class="right"') == 4
    assert written.count('<article class="wrong"') == 4


def test_pieces_join_to_the_text_and_half_a_character_waits_for_its_other_half() -> None:
    raw = "a é 漢 z".encode()
    assert pieces(lambda ids: bytes(ids).decode(errors="replace"), list(raw)) == [
        *("a", " ", "", "é", " ", "", "", "漢", " ", "z")
    ]


def test_hints_and_feedback_have_no_colour_of_their_own() -> None:
    assert level(None) == level(0.0) == 0
    assert level(STRONGEST) == level(99.0) == 5


def of_one_group(tmp_path: Path, rollouts: tuple[wire.Rollout, ...]) -> Path:
    folder = RunFolder.create(tmp_path / "run")
    folder.recipe.write_text('[run]\nmodel = "tiny"\n', encoding="utf-8")
    group = make_group(ticket=0, rollouts=rollouts)
    journal = Journal(folder.journal, 1)
    journal.append(Open(run="r", incarnation=1, config={}))
    journal.append(Issue(ticket=make_ticket(id=0)))
    journal.append(Admit(ticket=0, frame=bytes(CODEC.encode(group))))
    journal.commit()
    journal.close()
    return folder.path


def test_segments_of_others_are_shown_with_their_role(tmp_path: Path) -> None:
    segments = (make_segment(), make_segment((8, 9), (0, 0), role="feedback"), make_segment(turn=1))
    folder = of_one_group(tmp_path, (make_rollout(1.0, segments=segments),) * 2)
    (first, _) = lines(folder)
    assert [part["role"] for part in first["segments"]] == ["policy", "feedback", "policy"]  # type: ignore[attr-defined]
    ask(folder, "--html", str(tmp_path / "page.html"))
    assert 'class="feedback"' in (tmp_path / "page.html").read_text(encoding="utf-8")
