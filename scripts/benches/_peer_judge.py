"""Held-out accuracy of saved weights, and when a curve of it reaches the goal (for peer.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from common import models
from learner.prompts.arithmetic import draw, is_right

GOAL, PROBLEMS = 0.8, 1024


class Curve(NamedTuple):
    """One side of one round. `seconds[t]`: of training, up to version t; `weights[t]`: its file."""

    seconds: dict[int, float]
    weights: dict[int, Path]
    groups: dict[int, int]  # sampled up to version t
    others: float  # share of the two cores' time that processes of others took while it ran
    accuracy: dict[int, float]  # filled in by `measure`


class Crossing(NamedTuple):
    seconds: float
    step: float


class Judge:
    """Samples the held-out sums by transformers' `generate`, whoever made the weights."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)  # no clock runs here
        folder = models.find("tiny")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._problems = [draw(0, index, "heldout") for index in range(PROBLEMS)]
        texts = [problem.text for problem in self._problems]
        self._prompts = self._tokenizer(
            texts, return_tensors="pt", padding=True, return_token_type_ids=False
        )
        self._base = self.accuracy()

    def measure(self, curve: Curve) -> None:
        """Fill in the accuracy, up to two points in a row that reach the goal."""
        from safetensors.torch import load_file

        curve.accuracy[0] = self._base
        for t, path in curve.weights.items():
            missing = self._model.load_state_dict(load_file(path), strict=False)
            assert not missing.unexpected_keys
            assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied to the embedding
            curve.accuracy[t] = self.accuracy()
            if min(list(curve.accuracy.values())[-2:]) >= GOAL:
                return

    def accuracy(self) -> float:
        import torch

        torch.manual_seed(1)
        with torch.inference_mode():
            tokens = self._model.generate(
                **self._prompts,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=48,
            )
        answers = self._tokenizer.batch_decode(
            tokens[:, self._prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )
        pairs = zip(answers, self._problems, strict=True)
        return sum(is_right(answer, p.answer) for answer, p in pairs) / PROBLEMS


def crossing(curve: Curve) -> Crossing:
    """Where the accuracy reaches the goal, by lines between the points; NaN where it does not."""
    seconds = {0: 0.0, **curve.seconds}
    steps = sorted(curve.accuracy)
    values = [curve.accuracy[t] for t in steps]
    for i in range(1, len(steps)):
        if min(values[i : i + 2]) >= GOAL > values[i - 1]:
            share = (GOAL - values[i - 1]) / (values[i] - values[i - 1])
            a, b = steps[i - 1], steps[i]
            return Crossing(
                seconds[a] + share * (seconds[b] - seconds[a]), round(a + share * (b - a), 1)
            )
    return Crossing(math.nan, math.nan)
