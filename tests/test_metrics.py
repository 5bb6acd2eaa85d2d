"""metrics.jsonl: one line a step, whatever was killed and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common import metrics
from common.metrics import FILE, Metrics, Reader


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in metrics.read(folder)]


def test_a_line_a_step_comes_back_in_order(tmp_path: Path) -> None:
    sink = Metrics(tmp_path)
    sink.write(1, {"reward": 0.5, "lag": {"0": 200, "1": 56}})
    sink.write(2, {"reward": float("nan")})
    sink.close()
    first, second = metrics.read(tmp_path)
    assert first["lag"] == {"0": 200, "1": 56}
    assert second["reward"] is None
    assert steps(tmp_path) == [1, 2]


def test_a_resumed_run_does_not_show_a_step_twice(tmp_path: Path) -> None:
    sink = Metrics(tmp_path)
    for step in range(1, 6):
        sink.write(step, {"reward": 0.1})
    sink.close()
    sink = Metrics(tmp_path, keep_until=3)
    assert steps(tmp_path) == [1, 2, 3]
    sink.write(4, {"reward": 0.9})
    sink.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert metrics.read(tmp_path)[-1]["reward"] == 0.9


def test_readers_take_the_last_line_of_a_step_and_leave_a_cut_one_out(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    path.write_text('{"step":1,"reward":0}\n{"step":1,"reward":1}\n{"step":2,"rew')
    assert [line["reward"] for line in metrics.read(tmp_path)] == [1]


def test_going_on_after_a_kill_in_the_middle_of_a_line_loses_only_that_line(tmp_path: Path) -> None:
    (tmp_path / metrics.FILE).write_text('{"step":1,"reward":0}\n{"step":2,"rew')
    sink = Metrics(tmp_path, keep_until=1)
    sink.write(2, {"reward": 0.5})
    sink.close()
    assert steps(tmp_path) == [1, 2]


def test_a_number_without_a_meaning_is_not_written(tmp_path: Path) -> None:
    sink = Metrics(tmp_path)
    with pytest.raises(AssertionError, match="no meaning"):
        sink.write(1, {"rewrad": 1.0})
    sink.write(1, {"methods/entropy_bonus/coefficient": 0.1})
    sink.close()


def test_tensorboard_shows_the_same_numbers_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom common.metrics import Metrics\n"
        f"sink = Metrics(Path({str(tmp_path)!r}), tensorboard=True)\n"
        "sink.write(7, {'reward': 0.25, 'lag': {'0': 3}})\nsink.close()\n"
        "assert 'torch' not in sys.modules\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        f"board = EventAccumulator({str(tmp_path / 'tensorboard')!r})\nboard.Reload()\n"
        "[point] = board.Scalars('reward')\nassert (point.step, point.value) == (7, 0.25)\n"
        "[point] = board.Scalars('lag/0')\nassert point.value == 3"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_takes_what_was_written_since_and_keeps_what_it_was_asked_for(
    tmp_path: Path,
) -> None:
    reader, path = Reader(tmp_path, ("reward",)), tmp_path / FILE
    assert reader.lines() == []
    path.write_bytes(b'{"step":1,"reward":0.5,"lag":{"0":3}}\n{"step":2')
    first = {"step": 1, "reward": 0.5}
    assert reader.lines() == [first]
    with path.open("ab") as file:
        file.write(b',"reward":0.6}\n{cut\n{"step":3}\n{"step":2,"reward":0.7}\n')
    assert reader.lines() == [first, {"step": 2, "reward": 0.7}, {"step": 3}]


def test_a_reader_begins_anew_when_a_resume_has_cut_the_file(tmp_path: Path) -> None:
    reader = Reader(tmp_path, ("reward",))
    sink = Metrics(tmp_path)
    for step in (1, 2, 3):
        sink.write(step, {"reward": 0.1 * step})
    sink.close()
    assert [line["step"] for line in reader.lines()] == [1, 2, 3]
    Metrics(tmp_path, keep_until=1).close()
    assert [line["step"] for line in reader.lines()] == [1]
