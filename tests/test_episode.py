"""From a ticket to graded rollouts, with the shipped tokenizer and tokens that the test chooses."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from actor import episode, text
from actor.config import ScriptedConfig
from actor.engine.base import Sample
from actor.engine.scripted import ScriptedEngine
from actor.grade.pool import Pool
from actor.stage import Budget, Stage
from actor.voice import Voices
from common import models
from common.errors import DataError
from common.failpoints import Failpoint
from common.group_check import check_group
from common.wire import Finish, GradePart, Grading, Sampling, Ticket
from tests.builders import make_group, make_ticket

TINY = models.find("tiny")
EXACT = Grading(
    gold="19", parts=(GradePart(name="correct", grader="exact", options={"after": "#"}),)
)


def tokens_of(written: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(written).ids)


EOS = tokens_of("<eos>")[0]


class Says(ScriptedEngine):
    """Answers with given tokens, the first half under version 3, the rest under 4."""

    def __init__(self, *answers: Sequence[int], finish: Finish = "stop") -> None:
        super().__init__(ScriptedConfig(), slots=4)
        self.answers, self.finish = answers, finish

    async def generate(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        *,
        first: int = 0,
        deadline: float | None = None,
    ) -> list[Sample]:
        assert n == len(self.answers)
        return [self._sample_of(answer) for answer in self.answers]

    def _sample_of(self, answer: Sequence[int]) -> Sample:
        half = len(answer) // 2
        spans = ((0, 3), (half, 4)) if half else ((0, 4),)
        logps = np.linspace(-1, 0, len(answer), dtype=np.float32)
        return Sample(np.array(answer, np.int32), logps, spans, self.finish)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(1, 1.0)
    yield pool
    await pool.close()


def stage(engine: ScriptedEngine, pool: Pool) -> Stage:
    words = text.load(TINY, engine.vocab_size)
    return Stage(engine, words, pool, Failpoint(), Voices(), Budget())


def asks(n: int, grading: Grading = EXACT, temperature: float = 0.7) -> Ticket:
    sampling = Sampling(temperature=temperature, max_tokens=20, stop=(EOS,))
    return make_ticket(5, prompt=tokens_of("12+7?"), n=n, sampling=sampling, grading=grading)


async def test_what_the_model_wrote_before_the_stop_token_is_graded(pool: Pool) -> None:
    engine = Says([*tokens_of("12+7=19#19"), EOS], [*tokens_of("#18"), EOS])
    rollouts, timings, _ = await episode.play(asks(2), stage(engine, pool))
    assert [r.correct for r in rollouts] == [1.0, 0.0]
    assert [r.parts for r in rollouts] == [({"correct": 1.0},), ({"correct": 0.0},)]
    assert timings.keys() == {"generate_s", "grade_s"}


async def test_a_cut_answer_is_graded_whole_and_says_so(pool: Pool) -> None:
    engine = Says(tokens_of("12+7=19#19"), finish="length")
    (rollout,), *_ = await episode.play(asks(1), stage(engine, pool))
    assert (rollout.correct, rollout.finish) == (1.0, "length")


async def test_tokens_log_probs_spans_and_temperature_are_the_engines(pool: Pool) -> None:
    answer = [*tokens_of("#19"), EOS]
    ((rollout,), *_) = await episode.play(asks(1), stage(Says(answer), pool))
    (segment,) = rollout.segments
    assert (segment.role, segment.temperature, segment.turn) == ("policy", 0.7, 0)
    assert segment.tokens.tolist() == answer
    assert segment.logps.tolist() == np.linspace(-1, 0, len(answer), dtype=np.float32).tolist()
    assert segment.spans == ((0, 3), (2, 4))
    assert (rollout.length, rollout.oldest_version) == (len(answer), 3)


async def test_the_learner_accepts_what_an_episode_makes(pool: Pool) -> None:
    ticket = asks(2)
    engine = Says([*tokens_of("#19"), EOS], [EOS])
    rollouts, *_ = await episode.play(ticket, stage(engine, pool))
    group = make_group(ticket=5, rollouts=rollouts)
    check_group(group, ticket, vocab_size=20, clock_version=4)


async def test_a_grader_that_fails_is_an_error_never_reward_0(pool: Pool) -> None:
    grading = Grading(parts=(GradePart(name="x", grader="python:json:loads"),))
    ((rollout,), *_) = await episode.play(asks(1, grading), stage(Says([EOS]), pool))
    assert rollout.error.startswith("verifier_error: x: ")
    assert rollout.parts == ()


async def test_a_prompt_that_does_not_fit_is_the_datas_fault(pool: Pool) -> None:
    engine = ScriptedEngine(ScriptedConfig(), slots=4, max_length=4)
    with pytest.raises(DataError):
        await episode.play(asks(1), stage(engine, pool))


def test_the_fast_tokenizer_reads_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(TINY)
    for written in ("12+7=19,19+30=49#49<eos>", "<bos>1+2?", ""):
        tokens = tokens_of(written)
        expected = slow.decode(tokens, skip_special_tokens=True)
        assert text.load(TINY, 20)(tokens) == expected


def test_a_tokenizer_of_another_model_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"tokenizer has 20 tokens and the model 19.*copy"):
        text.load(TINY, 19)


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        text.load(tmp_path, 20)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer"):
        text.load(tmp_path, 20)
