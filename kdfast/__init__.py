"""kdfast: fused distillation losses for compressing transformers.

Functions live here (`kdfast.kl_div`), modules of them in `kdfast.nn`, losses of whole batches in `kdfast.objective`,
the trainer in `kdfast.DistillationTrainer` (needs `pip install kdfast[train]`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

from kdfast.cli import interrupt

interrupt.begin()  # before torch, which takes a second to import

from kdfast.ops import _native  # noqa: E402

_native.load()

from kdfast.ops.divergence import (  # noqa: E402, I001  (operators register fake kernels on the loaded library)
    js_div,
    kl_div,
    logit_mse,
    reverse_kl_div,
    skew_kl_div,
    skew_reverse_kl_div,
    soft_cross_entropy,
    symmetric_kl_div,
    total_variation,
)
from kdfast.ops._block_layout import BlockLayout  # noqa: E402
from kdfast.ops.attention import attention_kl, attention_mse  # noqa: E402
from kdfast.ops.block_sparse import block_sparse_linear  # noqa: E402
from kdfast.ops.hidden import cls_distance, cosine_distance, hidden_mse  # noqa: E402
from kdfast.ops.qk import qk_attention_mse, qk_relation_kl  # noqa: E402
from kdfast.ops.kd_loss import KDLossComponents, KDLossEntropy, kd_loss  # noqa: E402
from kdfast.ops.linear import linear_kd_loss, linear_topk_kd_loss  # noqa: E402
from kdfast.ops.prefix import prefix_linear  # noqa: E402
from kdfast.ops.selected import selected_linear  # noqa: E402
from kdfast.ops.topk import topk_kl_div  # noqa: E402
from kdfast import _from_pretrained, nn  # noqa: E402

_from_pretrained.begin()

if TYPE_CHECKING:
    from kdfast import objective

__all__ = [
    "BlockLayout",
    "DistillationTrainer",
    "KDLossComponents",
    "KDLossEntropy",
    "__version__",
    "attention_kl",
    "attention_mse",
    "block_sparse_linear",
    "cls_distance",
    "cosine_distance",
    "hidden_mse",
    "js_div",
    "kd_loss",
    "kl_div",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "logit_mse",
    "nn",
    "objective",
    "prefix_linear",
    "qk_attention_mse",
    "qk_relation_kl",
    "reverse_kl_div",
    "selected_linear",
    "skew_kl_div",
    "skew_reverse_kl_div",
    "soft_cross_entropy",
    "symmetric_kl_div",
    "topk_kl_div",
    "total_variation",
]


_LATE = ("early_exit", "elastic", "hf", "objective", "on_policy", "prune", "students", "teacher_cache")


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the operators do not need it
    if name == "DistillationTrainer":
        from kdfast.train.trainer import DistillationTrainer

        return DistillationTrainer
    if name in _LATE:
        return importlib.import_module(f"kdfast.{name}")
    raise AttributeError(f"module 'kdfast' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATE})
