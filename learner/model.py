"""The policy: a causal language model whose vocabulary is never whole.

`Policy` is what is trained (and sharded): its forward pass holds body and head, so that whoever
gathers parameters around `forward` gathers the head's too. Its names of parameters are those of
the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import models
from common.config import RunConfig
from common.errors import DataError
from common.versions import Tensor as Blob
from common.versions import TensorLike
from learner import attention, head, shard, slices
from learner.batch import Micro
from learner.comm import Comm, Order
from learner.config import LearnerConfig
from learner.quick import quicken

# Settings that change logits after the head; none of them is part of our head.
_LOGIT_TRICKS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Policy(nn.Module):
    """`net` is a transformers causal language model. Dropout is off: log-probs mean one thing."""

    statistics: ClassVar[str] = "HN"  # what its head gives of the whole vocabulary

    def __init__(self, net: nn.Module, config: LearnerConfig) -> None:
        super().__init__()
        self.net: Any
        self.net = net.eval()
        self.net.set_attn_implementation(attention.NAME)
        quicken(self.net.base_model)  # the head's products are learner.head's
        if config.ranks is not None and config.ranks.recompute:
            shard.recompute(self.net)
        self._chunk, self._amp = config.head_chunk, config.dtype == "bf16"
        self.shelf = slices.Shelf()  # of many ranks: this one's slices of what is published

    @property
    def config(self) -> Any:
        """Of the transformers model."""
        return self.net.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self, micro: Micro, objective: head.Objective | None = None
    ) -> tuple[Tensor | None, head.Columns]:
        """The columns of the micro-batch's tokens, after a scalar to call `backward` on.

        The scalar carries the gradient of `objective` (head.fused). Without an objective there is
        none; logp and H are differentiable then, at the price of computing the logits twice.
        """
        hidden, projection = self._hidden(micro)
        if objective is None:
            return None, head.columns(hidden, projection, self._chunk)
        return head.fused(hidden, projection, self._chunk, objective)

    def _hidden(self, micro: Micro) -> tuple[Tensor, head.Projection]:
        """Only positions that predict a token of the table go on to the head: [T, d]."""
        with torch.autocast(micro.ids.device.type, torch.bfloat16, enabled=self._amp):
            states = self.net.base_model(
                input_ids=micro.ids,
                position_ids=micro.positions,
                use_cache=False,
                packing=micro.packing,
            ).last_hidden_state
        out = self.net.get_output_embeddings()
        dtype = torch.bfloat16 if self._amp else torch.float32
        hidden = states[0].index_select(0, micro.at)
        bias = getattr(out, "bias", None)
        return hidden, head.Projection(out.weight, bias, micro.target, micro.temperature, dtype)


def load(run: RunConfig, config: LearnerConfig) -> tuple[Policy, PreTrainedTokenizerFast]:
    """The model and tokenizer that the run names, fp32, on the configured device.

    Raises DataError: no such folder, a file missing or damaged, an architecture that does not
    fit, a tokenizer with words that the model has not.
    """
    folder = models.find(run.model)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        net = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot load the model {folder}: {str(error).splitlines()[0]}") from None
    if not models.has_tokenizer(folder):
        raise DataError(f"{folder} has no tokenizer: copy the model's tokenizer.json there")
    words = net.config.vocab_size
    if len(tokenizer) > words:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} words, the model {words}; "
            "take the tokenizer that belongs to the model"
        )
    for trick in _LOGIT_TRICKS:
        if getattr(net.config, trick, None) not in (None, 1, 1.0):
            raise DataError(f"{folder}: models with {trick!r} are not supported")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{folder}: no fast tokenizer (tokenizer.json); convert it once")
    policy = Policy(net, config)
    # of many ranks none has room for all of it on its device: `state_of` takes the slices there
    return (policy if Comm.current().world_size > 1 else policy.to(device(config))), tokenizer


def device(config: LearnerConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stop_ids(model: Policy, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens that end an answer, by the generation settings and by the tokenizer."""
    settings = getattr(model.net.generation_config, "eos_token_id", None)
    listed = settings if isinstance(settings, list) else [settings]
    ids = {i for i in (*listed, tokenizer.eos_token_id) if i is not None}
    return tuple(sorted(ids))


def max_length(model: Policy) -> int:
    """Positions that the model knows."""
    return int(model.config.max_position_embeddings)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the model's own names, sorted; tied weights once."""
    root = model.net if isinstance(model, Policy) else model
    return {name: p for name, p in sorted(root.named_parameters()) if p.requires_grad}


def snapshot(model: Policy, dtype: Literal["fp32", "bf16"]) -> tuple[TensorLike, ...]:
    """The trainable tensors as bytes, sorted by name; a copy that later steps do not touch.

    Of many ranks rank 0 calls it, and the copy stays in slices (learner/slices.py).
    """
    shown = trainable(model)
    if slices.is_cut(shown):
        return slices.take(shown, dtype, model.shelf)
    blobs = []
    for name, copy in _gathered(shown, slices.DTYPES[dtype]):
        data = copy.reshape(-1).view(torch.uint8).numpy().data.toreadonly()
        blobs.append(Blob(name, slices.CODES[dtype], tuple(copy.shape), data))
    return tuple(blobs)


def show_all(model: Policy) -> None:
    """Any other rank's part of an export: it never holds more than one whole tensor."""
    for _ in _gathered(dict(model.net.named_parameters()), torch.float32):
        pass


def _gathered(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Copies on the CPU, one after the other; slices travel in `dtype`."""
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            yield name, shard.whole(tensor.to(dtype)).to("cpu").contiguous()
        else:
            yield name, tensor.to("cpu", dtype, copy=True).contiguous()


def export(model: Policy, run: RunConfig, folder: Path) -> None:
    """The policy as an ordinary Hugging Face folder: weights and configuration, and beside them the
    tokenizer's files as the run's model has them. Written aside and renamed.
    """
    source = models.find(run.model)
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    model.net.save_pretrained(aside, state_dict=_whole_state(model.net))
    for file in sorted(source.iterdir()):
        wanted = file.suffix in (".json", ".jinja", ".txt", ".model")
        if wanted and ".index." not in file.name and not (aside / file.name).exists():
            shutil.copyfile(file, aside / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _whole_state(net: nn.Module) -> dict[str, Tensor] | None:
    """What `save_pretrained` cannot gather itself; None: nothing is sharded."""
    comm = Comm.current()
    if comm.world_size == 1:
        return None
    comm.say(Order.EXPORT)
    state = {
        name: buffer for name, buffer in net.state_dict().items() if not buffer.is_floating_point()
    }
    return state | dict(_gathered(dict(net.named_parameters()), torch.float32))
