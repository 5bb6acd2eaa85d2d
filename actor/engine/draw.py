"""Draw one token a row from logits, by inverse CDF, with its log-probability after temperature.

Legend: B rows, V vocabulary, K blocks of C probabilities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_BLOCK = 512  # large vocabularies: pick a block first, then a token of it, both in float64


def draw(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor | None, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [B] and log-probs float32 [B] from `uniform_B` (float64 in [0, 1)); no
    temperature means 1."""
    scaled_BV = logits_BV.float()
    if temperature_B is not None:
        scaled_BV = scaled_BV / temperature_B[:, None]
    if scaled_BV.shape[1] > 8 * _BLOCK:
        p_BV = torch.softmax(scaled_BV, -1)
        token_B = _pick_by_block(p_BV, uniform_B)
        return token_B, p_BV.gather(1, token_B[:, None])[:, 0].log()
    logp_BV = F.log_softmax(scaled_BV, -1)
    token_B = _pick(logp_BV.exp(), uniform_B)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def _pick(p_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """First index whose cumulative probability exceeds u × total; a token of probability 0 is never
    it."""
    cdf_BV = torch.cumsum(p_BV, -1, dtype=torch.float64)
    index_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]
    return index_B.clamp_(max=p_BV.shape[1] - 1)  # only NaN gets that far; the engine looks for it


def _pick_by_block(p_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The same in two levels: no float64 block of [B, V], and tails are resolved relative to their
    own block."""
    B, V = p_BV.shape
    whole = V - V % _BLOCK
    mass_BK = p_BV[:, :whole].reshape(B, -1, _BLOCK).sum(-1)
    mass_BK = torch.cat((mass_BK, p_BV[:, whole:].sum(-1, keepdim=True)), 1).double()
    cdf_BK = mass_BK.cumsum(-1)
    target_B = uniform_B * cdf_BK[:, -1]
    block_B1 = torch.searchsorted(cdf_BK, target_B[:, None], right=True).clamp_(
        max=mass_BK.shape[1] - 1
    )
    mass_B = mass_BK.gather(1, block_B1)[:, 0]
    before_B = cdf_BK.gather(1, block_B1)[:, 0] - mass_B
    rest_B = ((target_B - before_B) / mass_B).clamp_(0.0, 1.0 - 2.0**-52)
    index_BC = block_B1 * _BLOCK + torch.arange(_BLOCK, device=p_BV.device)
    p_BC = p_BV.gather(1, index_BC.clamp(max=V - 1)).masked_fill_(index_BC >= V, 0.0)
    return (block_B1[:, 0] * _BLOCK + _pick(p_BC, rest_B)).clamp_(max=V - 1)
