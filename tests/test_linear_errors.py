"""What linear_kd_loss, linear_topk_kd_loss and topk_kl_div refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdfast

H, W, TH, TW = (torch.randn(shape) for shape in ((37, 16), (600, 16), (37, 16), (600, 16)))
L = torch.randint(600, (37,))
K = (TH @ TW.T).log_softmax(-1).topk(5)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((H, W), {}, ValueError, "teacher_hidden: expected teacher_hidden and teacher_weight, or teacher_logits"),
        ((H, W, TH, TW), {"teacher_logits": TH @ TW.T}, ValueError, "teacher_logits: expected no other argument"),
        ((H, W.T, TH, TW), {}, ValueError, r"student_weight: expected \[V, 16\], the hidden states' size"),
        ((H, W[0], TH, TW), {}, ValueError, r"student_weight: expected \[V, H\]"),
        ((H, W.double(), TH, TW), {}, TypeError, "student_weight: expected the hidden states' dtype torch.float32"),
        ((H, W, TH.half(), TW), {}, TypeError, "teacher_weight: expected the hidden states' dtype torch.float16"),
        ((H, W, TH[1:], TW), {}, ValueError, r"teacher_hidden: expected the student's leading dimensions \[37\]"),
        ((H, W, TH, TW[1:]), {}, ValueError, "teacher_weight: expected the student's 600 rows .*vocab_size"),
        ((H, W, TH, TW), {"vocab_size": 601}, ValueError, "vocab_size: expected 1 to 600"),
        ((H, W, TH, TW), {"memory_budget": 1000}, ValueError, "memory_budget: expected 33559232 bytes or more"),
        ((H, W, TH, TW), {"memory_budget": "all"}, TypeError, "memory_budget: expected a number of bytes or 'auto'"),
        ((H, W, TH, TW), {"return_entropy": None}, TypeError, "return_entropy: expected True or False, got NoneType"),
        ((H, W, TH, TW), {"memory_budget": 0}, ValueError, "memory_budget: expected 1 or more"),
        ((H, W, TH, TW), {"student_bias": L}, TypeError, "student_bias: expected float32"),
        ((H, W, TH, TW), {"student_bias": W[:3, 0]}, ValueError, r"student_bias: expected \[600\]"),
        ((H, W, TH, TW), {"student_softcap": -1.0}, ValueError, "student_softcap: expected a finite number > 0"),
        ((H, W, TH, TW), {"teacher_softcap": "x"}, TypeError, "teacher_softcap: expected a number or None"),
        ((H, W, TH, TW), {"divergence": "kl"}, ValueError, "divergence: expected one of kl_div"),
        ((H, W, TH, TW), {"labels": L + 600}, ValueError, "labels: expected 0 to 599"),
        ((H, W, TH, TW), {"labels": L[1:]}, ValueError, "labels: expected .* leading dimensions"),
        ((H, W, TH, TW), {"labels": None, "alpha": 0.5}, ValueError, "labels: expected labels where alpha is not 1"),
        ((1, W, TH, TW), {}, TypeError, "student_hidden: expected a tensor, got int"),
    ],
)
def test_errors(args: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"linear_kd_loss: {message}"):
        kdfast.linear_kd_loss(*args, **{"labels": L} | kwargs)


@pytest.mark.parametrize(
    ("teacher", "kwargs", "error", "message"),
    [
        ((K.values, K.indices), {"tail": "none"}, ValueError, "tail: expected 'bucket', 'renormalize' or 'drop'"),
        ((K.values, K.indices + 600), {}, ValueError, "teacher_topk_indices: expected 0 to 599"),
        ((K.values, K.indices - 600), {}, ValueError, "teacher_topk_indices: expected 0 to 599, got -"),
        ((K.values, K.indices[:, 1:]), {}, ValueError, "teacher_topk_indices: expected the log-probabilities' shape"),
        ((K.values, K.indices.float()), {}, TypeError, "teacher_topk_indices: expected int64 or int32"),
        ((K.values[0], K.indices[0]), {}, ValueError, "teacher_topk_logprobs: expected the student's leading dim"),
        ((K.values.exp(), K.indices), {}, ValueError, "teacher_topk_logprobs: expected logarithms of probabilities"),
        ((K.indices, K.indices), {}, TypeError, "teacher_topk_logprobs: expected float32"),
    ],
)
def test_topk_errors(teacher: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^topk_kl_div: {message}"):
        kdfast.topk_kl_div(H @ W.T, *teacher, **kwargs)
    with pytest.raises(error, match=f"^linear_topk_kd_loss: {message}"):
        kdfast.linear_topk_kd_loss(H, W, *teacher, L, **kwargs)
