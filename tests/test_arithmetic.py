"""The built-in task: right answers, pure draws, and two splits that cannot meet."""

from __future__ import annotations

import subprocess
import sys

from learner.prompts.arithmetic import Problem, draw, split_of, summands_of, worked

MANY = 4_000


def test_an_answer_is_the_sum_of_three_or_four_summands_up_to_49() -> None:
    for index in range(MANY):
        problem = draw(1, index, "train")
        summands = summands_of(problem)
        assert len(summands) in (3, 4)
        assert all(1 <= summand <= 49 for summand in summands)
        assert problem.text == "+".join(map(str, summands)) + "?"
        assert problem.answer == str(sum(summands))


def test_a_draw_depends_on_seed_split_and_index_only() -> None:
    forwards = [draw(7, index, "heldout") for index in range(50)]
    backwards = [draw(7, index, "heldout") for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [draw(8, index, "heldout") for index in range(50)]


def test_draws_are_the_same_on_every_machine() -> None:
    assert draw(0, 0, "train") == Problem("train/0/0", "4+43+14+5?", "66")
    assert draw(0, 0, "heldout") == Problem("heldout/0/0", "32+4+1?", "37")


def test_training_and_held_out_problems_never_meet_whatever_the_seed_and_the_order() -> None:
    train = {_multiset(draw(seed, i, "train")) for seed in (0, 1) for i in range(MANY)}
    heldout = {_multiset(draw(seed, i, "heldout")) for seed in (0, 2) for i in range(MANY)}
    assert not train & heldout


def test_about_one_sum_in_eight_is_held_out() -> None:
    sums = [(a, b, c) for a in range(1, 50) for b in range(a, 50) for c in range(b, 50)]
    share = sum(split_of(summands) == "heldout" for summands in sums) / len(sums)
    assert 0.11 < share < 0.14


def test_every_length_and_summand_turns_up_in_both_splits() -> None:
    for split in ("train", "heldout"):
        drawn = [summands_of(draw(0, index, split)) for index in range(MANY)]
        assert {summand for summands in drawn for summand in summands} == set(range(1, 50))
        share_of_three = sum(len(summands) == 3 for summands in drawn) / MANY
        assert 0.45 < share_of_three < 0.55


def test_the_worked_answer_adds_from_left_to_right_and_ends_in_the_answer() -> None:
    assert worked(Problem("x", "12+7+30?", "49")) == "12+7=19,19+30=49#49"
    for index in range(100):
        problem = draw(3, index, "train")
        assert worked(problem).endswith(f"={problem.answer}#{problem.answer}")


def test_drawing_does_not_import_torch() -> None:
    code = "import sys, learner.prompts.arithmetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _multiset(problem: Problem) -> tuple[int, ...]:
    return tuple(sorted(summands_of(problem)))
