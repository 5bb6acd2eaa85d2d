"""metrics.jsonl as the dashboard reads it: on and on, and thinned out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.dash_series import MOST_BARS, MOST_POINTS, Series


def line(step: int, **values: Any) -> bytes:
    return json.dumps({"step": step, "reward": step / 10, **values}).encode() + b"\n"


def test_a_cut_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2)[:9])
    series = Series(path)
    series.refresh()
    assert series.curves()["reward"].x == [1]
    path.write_bytes(line(1) + line(2) + b"{nonsense}\n[]\n" + b'{"step": "x"}\n' + line(3))
    series.refresh()
    assert series.curves()["reward"].x == [1, 2, 3]


def test_the_target_of_whichever_method_has_one_is_a_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    aims = {"methods/aepo/coefficient": 0.5, "methods/aepo/target": 0.3}
    path.write_bytes(line(1) + line(2, **aims))
    series = Series(path)
    series.refresh()
    assert series.curves()["target"] == ([2], [0.3])


def test_the_last_line_of_a_step_counts_and_a_resume_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + line(2, heldout=0.5) + line(0, reward=None))
    series = Series(path)
    series.refresh()
    assert series.curves()["heldout"] == ([2], [0.5])
    assert list(series.steps) == [0, 1, 2]
    aside = tmp_path / "aside"
    aside.write_bytes(line(1, reward=9.0))
    aside.replace(path)
    series.refresh()
    assert series.curves() == {"reward": ([1], [9.0])}


def test_a_long_run_is_thinned_to_what_a_picture_can_show(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    extra = {
        "dropped": {"stale": 1},
        "groups": 4,
        "lag": {"0": 1, "1": 3},
        "ratio": {"0": 2, "1": 1},
    }
    path.write_bytes(b"".join(line(step, **extra) for step in range(1, 20_001)))
    series = Series(path)
    shares = [series.refresh()]
    while shares[-1] < 1.0:
        shares.append(series.refresh())
    assert shares == sorted(shares)
    reward, ratio = (series.curves()[name] for name in ("reward", "ratio"))
    assert len(reward.x) == MOST_POINTS
    assert reward.x[-1] == 20_000
    assert abs(float(np.mean(reward.y)) - 1000.05) < 0.1
    assert set(ratio.y) == {1.25}
    assert len(series.fates()["step"]) == MOST_BARS
