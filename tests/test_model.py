import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import RunConfig
from common.errors import DataError
from learner import model as models
from learner.batch import flatten, pack
from learner.config import LearnerConfig
from learner.item import Item
from learner.model import Policy
from tests.builders import make_group, make_ticket, tiny_model


def items(lengths: list[list[int]]) -> list[Item]:
    rng = np.random.default_rng(0)
    made = []
    for i, group in enumerate(lengths):
        tokens = [rng.integers(3, 31, n).tolist() for n in group]
        ticket = make_ticket(i, prompt=rng.integers(3, 31, 4 + i).tolist(), n=len(group))
        made.append(Item(ticket, make_group([1, 0] * (len(group) // 2), ticket=i, tokens=tokens)))
    return made


LENGTHS = [[3, 40, 3, 11], [12, 13, 1, 2], [5, 5]]


def padded(net: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of every token, the ordinary way: one padded batch and a mask."""
    width = int(batch.lengths.max())
    ids = torch.zeros(batch.rows, width, dtype=torch.long)
    mask = torch.zeros(batch.rows, width, dtype=torch.long)
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        ids[row, :length] = torch.from_numpy(batch.ids[start : start + length])
        mask[row, :length] = 1
    logits = net(input_ids=ids, attention_mask=mask).logits
    log_p = logits[batch.static.row, torch.from_numpy(batch.at)].log_softmax(-1)
    taken = log_p.gather(1, torch.from_numpy(batch.target)[:, None]).squeeze(1)
    return taken, -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_packed_equals_padded_in_forward_and_gradient(family: str, tie: bool) -> None:
    batch = flatten(items(LENGTHS), 0)
    reference = tiny_model(family, tie_word_embeddings=tie)
    reference.set_attn_implementation("sdpa")
    logp, H = padded(reference, batch)
    weight = torch.linspace(-1, 1, len(logp))
    ((logp + 0.3 * H) * weight).sum().backward()
    policy = Policy(tiny_model(family, tie_word_embeddings=tie), LearnerConfig())
    micro = pack(batch, np.arange(batch.rows))
    assert len(micro.packing.buckets) > 1
    _, columns = policy(micro)
    back = torch.argsort(micro.tokens)
    assert torch.allclose(columns.logp[back], logp, atol=2e-5)
    assert torch.allclose(columns.H[back], H, atol=2e-5)
    ((columns.logp + 0.3 * columns.H)[back] * weight).sum().backward()
    wanted = dict(models.trainable(reference))
    for name, parameter in models.trainable(policy).items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted[name].grad, rtol=1e-3, atol=2e-4), name


def test_a_sliding_window_reaches_no_further_than_it_says() -> None:
    batch = flatten(items([[30, 30]]), 0)
    shape = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    reference = tiny_model("qwen2", **shape)
    reference.set_attn_implementation("eager")
    logp, _ = padded(reference, batch)
    policy = Policy(tiny_model("qwen2", **shape), LearnerConfig())
    micro = pack(batch, np.arange(batch.rows))
    _, columns = policy(micro)
    assert torch.allclose(columns.logp[torch.argsort(micro.tokens)], logp, atol=2e-5)


def test_one_sequence_alone_gives_what_it_gives_in_company() -> None:
    batch = flatten(items(LENGTHS), 0)
    policy = Policy(tiny_model(), LearnerConfig())
    with torch.no_grad():
        everything = pack(batch, np.arange(batch.rows))
        together = policy(everything)[1].logp[torch.argsort(everything.tokens)]
        for row in range(batch.rows):
            micro = pack(batch, np.array([row]))
            alone = policy(micro)[1].logp[torch.argsort(micro.tokens)]
            assert torch.allclose(alone, together[batch.static.row == row], atol=1e-5)


def test_bf16_autocast_comes_near_the_float32_columns() -> None:
    batch = flatten(items(LENGTHS), 0)
    micro = pack(batch, np.arange(batch.rows))
    full = Policy(tiny_model(), LearnerConfig())(micro)[1]
    half = Policy(tiny_model(), LearnerConfig(dtype="bf16"))(micro)[1]
    assert half.logp.dtype == torch.float32
    assert not torch.equal(half.logp, full.logp)
    assert (half.logp - full.logp).abs().mean() < 0.1


# ---- loading and snapshots ---------------------------------------------------------------------


def test_the_shipped_model_loads_with_its_tokenizer_and_knows_its_limits() -> None:
    policy, tokenizer = models.load(RunConfig(model="tiny"), LearnerConfig())
    assert policy.config.vocab_size >= len(tokenizer)
    assert models.stop_ids(policy, tokenizer)
    assert models.max_length(policy) > 0


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no model at .*: give a folder"):
        models.load(RunConfig(model=str(tmp_path / "none")), LearnerConfig())


def test_a_folder_without_weights_is_one_clear_line(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="cannot load the model") as caught:
        models.load(RunConfig(model=str(tmp_path)), LearnerConfig())
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    _, tokenizer = models.load(RunConfig(model="tiny"), LearnerConfig())
    tokenizer.save_pretrained(tmp_path)
    tiny_model(vocab=8).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="the model 8"):
        models.load(RunConfig(model=str(tmp_path)), LearnerConfig())


def test_a_model_that_bends_its_logits_is_refused(tmp_path: Path) -> None:
    _, tokenizer = models.load(RunConfig(model="tiny"), LearnerConfig())
    tokenizer.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "logit_scale": 0.5}))
    with pytest.raises(DataError, match="logit_scale"):
        models.load(RunConfig(model=str(tmp_path)), LearnerConfig())


def test_a_snapshot_is_sorted_holds_tied_weights_once_and_only_what_is_trained() -> None:
    policy = Policy(tiny_model(), LearnerConfig())
    policy.net.model.norm.weight.requires_grad_(False)
    blobs = models.snapshot(policy, "fp32")
    names = [b.name for b in blobs]
    assert names == sorted(names)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "model.norm.weight" not in names
    embed = next(b for b in blobs if b.name == "model.embed_tokens.weight")
    weight = policy.net.model.embed_tokens.weight
    assert (embed.dtype, embed.shape) == ("F32", tuple(weight.shape))
    assert bytes(embed.data) == weight.detach().numpy().tobytes()


def test_a_snapshot_does_not_change_with_the_model() -> None:
    policy = Policy(tiny_model(), LearnerConfig())
    (first, *_) = models.snapshot(policy, "bf16")
    before = bytes(first.data)
    assert (first.dtype, len(before)) == ("BF16", 2 * int(np.prod(first.shape)))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert bytes(first.data) == before


def test_a_folder_without_a_tokenizer_is_refused_before_anything_is_made_up(tmp_path: Path) -> None:
    import shutil

    from common.models import SHIPPED

    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(SHIPPED / "tiny" / name, tmp_path / name)
    with pytest.raises(DataError, match="no tokenizer"):
        models.load(RunConfig(model=str(tmp_path)), LearnerConfig())
