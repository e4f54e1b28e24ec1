"""The loss of `kdfast.objective.LanguageModel` where a head is no plain product: from logits as it makes them, some
rows at a time, and once more in the backward instead of being kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdfast import kd_loss, topk_kl_div
from kdfast.models.last_hidden import LastHidden
from kdfast.objective.term import divisor
from kdfast.ops import _checks, _chunks
from kdfast.ops.kd_loss import KDLossComponents

BYTES = 16  # of a logit in float32: the student's, the teacher's, a gradient, and what the head itself keeps


def of_own_heads(
    student: LastHidden,
    teacher: LastHidden | None,
    columns: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    budget: int,
) -> KDLossComponents:
    """As `kdfast.linear_kd_loss` and, with a teacher's top-k, `kdfast.linear_topk_kd_loss`.

    columns: of the rows that count, N of them: `student` [N, H], `teacher` [N, Ht] or `topk_logprobs` and
    `topk_indices` [N, k] or neither, `labels` [N] where there are any. settings: of `kdfast.kd_loss`, `num_items` among
    them, and `tail`. budget: bytes, 0: a tenth of the device's memory.

    Raises:
        ValueError: the budget does not hold a row.
    """
    hidden = columns["student"]
    row = BYTES * max(head.vocabulary for head in (student, teacher) if head is not None)
    budget = budget or _chunks.automatic(hidden.device)
    if budget < row:
        _checks.wrong_value("LanguageModel", "memory_budget", f"{row} bytes or more, for a row of logits", budget)
    each = min(budget // row, _chunks.SATURATED[hidden.device.type == "cuda"])

    def chunk(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        own = {name: column[rows] for name, column in columns.items()}
        logits = student.make_logits(own["student"])
        if "topk_indices" in own:
            return _of_topk(logits, own, settings)
        with torch.no_grad():  # without a teacher (alpha = 0) whatever is there counts nothing
            of_teacher = logits.detach() if teacher is None else teacher.make_logits(own["teacher"])
        others = {name: value for name, value in settings.items() if name != "tail"}
        return kd_loss(logits, of_teacher, own.get("labels"), return_components=True, **others)

    total: list[Tensor] | None = None
    for begin in range(0, max(len(hidden), 1), each):  # one where no row counts: the head's parameters are used
        rows = slice(begin, begin + each)
        parts = checkpoint(chunk, rows, use_reentrant=False) if torch.is_grad_enabled() else chunk(rows)
        total = list(parts) if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    assert total is not None
    return KDLossComponents(*total)


def _of_topk(logits: Tensor, own: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    alpha, temperature, items = settings["alpha"], settings["temperature"], settings["num_items"]
    same = {name: settings[name] for name in ("temperature", "tail", "vocab_size", "num_items")}
    soft = temperature**2 * topk_kl_div(logits, own["topk_logprobs"], own["topk_indices"], **same)
    if "labels" not in own:
        return alpha * soft, soft.detach(), torch.zeros_like(soft)
    hard = F.cross_entropy(logits[:, : settings["vocab_size"]], own["labels"], reduction="sum")
    hard = hard / divisor(items).to(hard.device)
    return alpha * soft + (1 - alpha) * hard, soft.detach(), hard.detach()
