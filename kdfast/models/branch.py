"""FastBERT's classifier of a layer's hidden states, and how sure a classifier is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdfast.ops import _checks


def uncertainty(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), as a share of the largest: u = -Σ p log p / log C, from 0 (sure) to 1 (uniform).

    Args:
        logits: [..., C], of any floating dtype, C ≥ 2.

    Returns:
        [...], float32 (float64 for float64); NaN where a row holds NaN.

    Raises:
        TypeError: logits that are no floating-point tensor.
        ValueError: fewer than two classes.

    Source: Liu et al., FastBERT, 2020, arXiv:2004.02178, equation 7.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        _checks.wrong_type("uncertainty", "logits", "a floating-point tensor", _checks.kind(logits))
    if not logits.dim() or logits.shape[-1] < 2:
        _checks.wrong_value("uncertainty", "logits", "[..., C], two classes or more", list(logits.shape))
    probabilities = logits.to(_checks.loss_dtype(logits)).softmax(-1)
    entropy: Tensor = torch.special.entr(probabilities).sum(-1) / math.log(logits.shape[-1])
    return entropy.clamp(0, 1)  # rounding takes the uniform distribution above 1, and speed 1 is to let it leave


class Branch(nn.Module):
    """FastBERT's classifier: Linear(hidden → width) → tanh → self-attention of `heads` heads over the tokens
    → its first token → Linear(width → width) → tanh → Linear(width → classes).

    Only the first token's attention is read, so only its query is made, and neither keys nor values of the others: with
    h the states after the first tanh, q·(W_k h_j + b_k) = (W_kᵀq)·h_j + q·b_k, and Σ a_j (W_v h_j + b_v) =
    W_v (Σ a_j h_j) + b_v as Σ a_j = 1. That leaves the first Linear as all that grows with the tokens.

    Source: MiniClassifier of the authors' code, with pooling "first"; its "mean" is over features, not tokens.
    """

    def __init__(self, hidden_size: int, classes: int, *, width: int = 128, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.reduce = nn.Linear(hidden_size, width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.dense = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, C] of a layer's hidden states [B, L, D]; mask: [B, L], 0 or False where a token is padding."""
        states = self.reduce(hidden).tanh()
        rows, size = len(states), self.query.out_features // self.heads
        query = self.query(states[:, 0]).view(rows, self.heads, size).transpose(0, 1) * size**-0.5  # [H, B, d]
        scores = torch.bmm(query, self._of_heads(self.key)).transpose(0, 1) @ states.mT  # [B, H, L]
        if torch.is_grad_enabled():  # the same for all tokens: softmax ignores it, DDP wants every parameter to be used
            offset = torch.bmm(query, self.key.bias.to(query.dtype).view(self.heads, size, 1))
            scores = scores + offset.transpose(0, 1)
        if mask is not None:
            scores = scores.masked_fill((mask == 0)[:, None], torch.finfo(scores.dtype).min)
        mixed = (scores.softmax(-1).to(states.dtype) @ states).transpose(0, 1)  # [H, B, W]
        values = torch.bmm(mixed, self._of_heads(self.value).mT).transpose(0, 1).flatten(1)
        first = self.output(values + self.value.bias)
        logits: Tensor = self.classifier(self.dense(first).tanh())
        return logits

    def _of_heads(self, linear: nn.Linear) -> Tensor:
        """Its matrix [H, d, W]."""
        return linear.weight.view(self.heads, -1, linear.in_features)
