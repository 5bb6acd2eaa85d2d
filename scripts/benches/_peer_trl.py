"""TRL's side of `scripts/bench peer`: GRPOTrainer on given prompts, its weights kept along the way.

    .venv-peer/bin/python scripts/benches/_peer_trl.py SETTINGS.json FOLDER

Reads the settings and the prompts (peer.py says which), trains, and leaves in FOLDER
`version-STEP.safetensors` every `every` steps and `curve.jsonl`, a line a step: `step`, `seconds`
of training so far (from the first prompt to the end of the step, what this program itself saves
left out), `reward` of the step.

What was tried for it, on the model `tiny` with 128 rollouts a step on two cores, in seconds a step:

    two threads, sdpa, fp32    one batch 0.59; two accumulated 0.52 (used); four 0.86; eight 1.3
    one thread                 0.81
    eager attention            as sdpa, within the noise
    static cache               generation takes 0.42 CPU seconds instead of 0.36
    continuous batching        8 CPU seconds instead of 1: its paged cache is made for GPUs

TRL's defaults that are costly here are off: bf16 (emulated on AVX2), gradient checkpointing,
logging, saving, the progress bar, workers; there is no reference model (beta 0). AdamW is the fused
one, with our warm-up: transformers' own would give the first step a rate of 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PIECES = 2  # micro-batches of a step


class Clock(TrainerCallback):
    """Seconds of training; stands still while weights are saved."""

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every
        self._file = (folder / "curve.jsonl").open("w", buffering=1)
        self._began = self._saving_s = 0.0
        self.reward = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        now, step = time.perf_counter(), state.global_step
        seconds = now - self._began - self._saving_s
        line = {"step": step, "seconds": round(seconds, 4), "reward": self.reward}
        self._file.write(json.dumps(line) + "\n")
        if step % self._every == 0:
            weights = {k: v.contiguous() for k, v in more["model"].state_dict().items()}
            weights.pop("lm_head.weight", None)  # tied to the embedding
            save_file(weights, self._folder / f"version-{step}.safetensors")
        self._saving_s += time.perf_counter() - now


def trainer(settings: dict[str, Any], folder: Path) -> GRPOTrainer:
    clock = Clock(folder, settings["every"])

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        values = [
            float("#" in c and c.rpartition("#")[2].strip() == a)
            for c, a in zip(completions, answer, strict=True)
        ]
        clock.reward = sum(values) / len(values)
        return values

    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    warmup = max(1, settings["warmup_steps"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup)
    )
    return GRPOTrainer(
        model=model,
        args=config(settings, folder),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(settings["problems"]),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
        callbacks=[clock],
        optimizers=(optimizer, schedule),
    )


def config(settings: dict[str, Any], folder: Path) -> GRPOConfig:
    rollouts = settings["groups_per_step"] * settings["group_size"]
    return GRPOConfig(
        output_dir=str(folder / "trainer"),
        seed=settings["seed"],
        max_steps=settings["steps"],
        per_device_train_batch_size=rollouts // PIECES,
        gradient_accumulation_steps=PIECES,
        steps_per_generation=PIECES,  # one optimiser step for what is generated
        num_iterations=1,
        num_generations=settings["group_size"],
        max_completion_length=settings["max_tokens"],
        temperature=settings["temperature"],
        shuffle_dataset=False,
        loss_type="dapo",  # the mean over the batch's tokens
        beta=0.0,
        epsilon=settings["clip_low"],
        epsilon_high=settings["clip_high"],
        scale_rewards="group",
        max_grad_norm=settings["grad_clip"],
        disable_dropout=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        use_vllm=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main(settings_path: str, folder: str) -> None:
    settings = json.loads(Path(settings_path).read_text())
    torch.set_num_threads(settings["threads"])
    training = trainer(settings, Path(folder))
    ids = torch.full((settings["groups_per_step"] * settings["group_size"], 10), 5)
    warm = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": True}
    training.model.generate(ids, **warm)  # the first call imports and allocates: start-up
    training.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
