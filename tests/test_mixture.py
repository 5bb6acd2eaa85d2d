"""Several sources in one stream: their shares, their own words and graders, and nothing lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common import recipe
from common.config import RunConfig
from common.errors import ConfigError, DataError
from learner.config import LearnerConfig
from learner.item import Item
from learner.origin import of_answers
from learner.prompts.config import MixedSource, PromptsConfig
from learner.prompts.mixture import BLOCK, Mixture, quotas
from learner.prompts.source import open_source
from learner.prompts.stream import Prompts
from learner.step import make_state, train_step
from tests import chat_model
from tests.builders import make_group, make_ticket

SUMS = [{"prompt": f"{i}+{i}?", "answer": f"{2 * i}"} for i in range(40)]
WORDS = [{"question": f"Spell {i}!", "gold": f"w{i}"} for i in range(60)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder: Path, text: str = "", **places: str) -> PromptsConfig:
    """`{sums}` and `{words}` in `text` are the paths of two files."""
    places |= {"sums": write(folder / "sums.jsonl", SUMS)}
    places |= {"words": write(folder / "words.jsonl", WORDS)}
    path = folder / "recipe.toml"
    path.write_text((text or TWO).format(**places))
    loaded = recipe.load(str(path), {"learner": LearnerConfig})["learner"]
    assert isinstance(loaded, LearnerConfig)
    return loaded.prompts


TWO = """
[learner.prompts]
grader = "numeric"
grader_options = {{ absolute = 0.5 }}
instruction = "Be brief."

[[learner.prompts.sources]]
source = "jsonl"
path = "{sums}"

[[learner.prompts.sources]]
weight = 3
name = "spelling"
source = "jsonl"
path = "{words}"
prompt_column = "question"
answer_column = "gold"
instruction = "Letter by letter."
grader = "exact"
"""


def mixture(given: PromptsConfig, seed: int = 0) -> Mixture:
    found = open_source(given, seed)
    assert isinstance(found, Mixture)
    return found


def test_every_block_has_each_source_as_often_as_its_weight_says(tmp_path: Path) -> None:
    both = mixture(config(tmp_path))
    for block in range(3):
        names = [both.train(block * BLOCK + i).source for i in range(BLOCK)]
        assert Counter(names) == {"sums": 250, "spelling": 750}
        assert len(set(names[:20])) == 2, "in an order of its own, not one after the other"


def test_the_stream_is_pure_and_each_source_goes_through_its_own_rows(tmp_path: Path) -> None:
    given = config(tmp_path)
    one, other = mixture(given), mixture(given)
    draws = [one.train(i) for i in range(900, 1100)]
    assert [other.train(i) for i in reversed(range(900, 1100))] == draws[::-1]
    own = [p.text for p in map(one.train, range(2 * BLOCK)) if p.source == "sums"]
    assert len(own) == 500
    for epoch in range(500 // 36):
        assert len(set(own[36 * epoch : 36 * (epoch + 1)])) == 36, "every row once an epoch"
    assert [p.text for p in map(mixture(given, 1).train, range(50))] != [
        p.text for p in map(one.train, range(50))
    ]


def test_shares_add_up_to_a_block_and_nobody_goes_without() -> None:
    assert quotas([1, 1, 1]) == (334, 333, 333)
    assert quotas([1, 999]) == (1, 999)
    assert quotas([1, 1, 998]) == (1, 1, 998)
    assert sum(quotas([0.11, 0.29, 0.333, 0.0015])) == BLOCK


def test_a_problem_is_asked_in_its_sources_words_and_graded_by_its_grader(tmp_path: Path) -> None:
    given = config(tmp_path)
    prompts = Prompts(mixture(given), given, chat_model.tokenizer(None), (256,), 0, 99)
    words = chat_model.tokenizer(None)
    seen = set()
    for draft in map(prompts.draw, range(40)):
        asked, (part,) = words.decode(draft.prompt), draft.grading.parts
        seen.add(draft.source)
        if draft.source == "sums":
            assert asked.endswith("?\nBe brief.")
            assert (part.grader, part.options) == ("numeric", {"absolute": 0.5})
            assert draft.problem.startswith("sums/")
        else:
            assert asked.endswith("!\nLetter by letter.")
            assert (part.grader, part.options) == ("exact", {})
            assert draft.problem.startswith("spelling/words/")
    assert seen == {"sums", "spelling"}


def test_each_source_holds_out_its_own_in_its_share(tmp_path: Path) -> None:
    both = mixture(config(tmp_path))
    held = []
    while (problem := both.heldout(len(held))) is not None:
        held.append(problem)
    assert Counter(p.source for p in held) == {"sums": 4, "spelling": 6}
    assert Counter(p.source for p in held[:4]) == {"sums": 1, "spelling": 3}
    trained = {both.train(i).text for i in range(400)}
    assert not trained & {p.text for p in held}
    assert len({p.id for p in held} | {both.train(i).id for i in range(400)}) == 100


def test_what_one_file_holds_out_no_other_trains_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twice = SUMS[::-1] + [{"prompt": f"{i}-{i}?", "answer": "0"} for i in range(60)]
    text = """
[[learner.prompts.sources]]
source = "jsonl"
path = "{sums}"
[[learner.prompts.sources]]
source = "jsonl"
path = "{more}"
"""
    both = mixture(config(tmp_path, text, more=write(tmp_path / "more.jsonl", twice)))
    held = {problem.text for i in range(14) if (problem := both.heldout(i))}
    assert len(held) >= 12
    assert not held & {both.train(i).text for i in range(400)}
    assert "holds their questions out" in caplog.text


def test_endless_sources_mix_with_files(tmp_path: Path) -> None:
    text = """
[[learner.prompts.sources]]
source = "arithmetic"
grader_options = {{ after = "#" }}
[[learner.prompts.sources]]
source = "jsonl"
path = "{sums}"
"""
    both = mixture(config(tmp_path, text))
    assert Counter(both.train(i).source for i in range(BLOCK)) == {"arithmetic": 500, "sums": 500}
    held = [both.heldout(i) for i in range(40)]
    assert Counter(p.source for p in held if p) == {"arithmetic": 36, "sums": 4}


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    text = TWO.replace('name = "spelling"', 'name = "sums"')
    with pytest.raises(DataError, match=r"two of learner\.prompts\.sources are called 'sums'"):
        mixture(config(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("weight = 3", "weight = 0"), "sources[1].weight: expected a number > 0"),
        (("weight = 3", "weight = 2000"), "sources[0].weight = 1: less than a thousandth"),
        (('path = "{sums}"', ""), "sources[0].path is empty"),
        (('grader = "exact"', 'grader = "exakt"'), "sources[1].grader: no grader 'exakt'"),
        (('name = "spelling"', 'nme = "x"'), "sources[1].nme: unknown; did you mean"),
        (
            ("[learner.prompts]", '[learner.prompts]\npath = "x"'),
            "path: [[learner.prompts.sources]]",
        ),
    ],
)
def test_a_mixture_that_cannot_work_is_one_line(
    change: tuple[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        config(tmp_path, TWO.replace(*change))
    assert f"learner.prompts.{said}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_frozen_mixture_reads_back_as_the_same(tmp_path: Path) -> None:
    given = config(tmp_path)
    frozen = tmp_path / "frozen.toml"
    frozen.write_text(recipe.freeze(str(tmp_path / "recipe.toml")))
    again = recipe.load(str(frozen), {"learner": LearnerConfig})["learner"]
    assert isinstance(again, LearnerConfig)
    assert again.prompts == given


def test_the_metrics_tell_of_every_source_and_a_step_of_its_entropy(tmp_path: Path) -> None:
    given = LearnerConfig(prompts=config(tmp_path), threads=1, lr=1e-4)
    groups = [
        make_group([1, 0], ticket=1, source="sums"),
        make_group([0, 0], ticket=2, source="spelling"),
        make_group([0, 1, 1], ticket=3, source="sums"),
    ]
    told = of_answers(groups, given)
    assert told["sources/sums"]["correct"] == pytest.approx(3 / 5)
    assert told["sources/spelling"] == {"groups": 1.0, "correct": 0.0, "length": 3.5}
    items = [Item(make_ticket(id=g.ticket, n=len(g.rollouts)), g) for g in groups]
    metrics = train_step(make_state(RunConfig(), given), items, given).metrics
    every = [metrics[f"sources/{name}"]["entropy"] for name in ("sums", "spelling")]  # type: ignore[index]
    assert min(every) <= metrics["entropy"] <= max(every)
    assert of_answers(groups, LearnerConfig(threads=1)) == {}, "one source has no line of its own"


@pytest.mark.parametrize(
    "prompts",
    [
        PromptsConfig(source="jsonl", path="data/synthesis.jsonl"),
        PromptsConfig(sources=(MixedSource(name="synthesis"), MixedSource(name="b"))),
        PromptsConfig(sources=(MixedSource(source="saved", path="data/synthesis"),)),
    ],
)
def test_a_source_called_as_proposed_problems_are_is_refused(prompts: PromptsConfig) -> None:
    with pytest.raises(ConfigError, match=r'"synthesis" is what proposed problems are called'):
        prompts.check()


def test_a_file_called_so_may_be_asked_under_another_name() -> None:
    named = MixedSource(name="mine", source="jsonl", path="data/synthesis.jsonl")
    PromptsConfig(sources=(named,)).check()
