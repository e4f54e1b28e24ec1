"""kdfast: fused distillation losses for compressing transformers.

Functions live here (`kdfast.kl_div`), their module twins in `kdfast.nn`, losses of whole batches in `kdfast.objective`,
the trainer in `kdfast.DistillationTrainer`
(needs `pip install kdfast[train]`).
"""

from __future__ import annotations

from typing import Any

from kdfast import _native
from kdfast._version import __version__

_native.load()

from kdfast.ops.divergence import kl_div  # noqa: E402, I001  (operators register fake kernels on the loaded library)
from kdfast import nn, objective  # noqa: E402

__all__ = ["DistillationTrainer", "__version__", "kl_div", "nn", "objective"]


def __getattr__(name: str) -> Any:
    if name == "DistillationTrainer":  # transformers takes seconds to import, and the operators do not need it
        from kdfast.trainer import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module 'kdfast' has no attribute '{name}'")
