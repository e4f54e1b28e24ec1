"""The `TrainingArguments` of all recipes, and in which precision they train: decided here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from kdfast import _C


def training(recipe: Any, folder: Path, **own: Any) -> TrainingArguments:
    """Arguments of a stage that trains a model into `folder`: what all recipes share, and a recipe's `own`."""
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        **of_precision(recipe.precision),
        per_device_train_batch_size=recipe.batch_size,
        train_sampling_strategy="group_by_length",
        save_total_limit=1,
        disable_tqdm=False,
        dataloader_pin_memory=False,
        report_to="none",
        **{"seed": recipe.seed, **own},
    )


def chosen(precision: str) -> str:
    """float32, bfloat16 or float16. `auto` is bfloat16 where the processor, or the GPU, multiplies matrices of it
    faster than of float32.

    Raises:
        ValueError: float16 without a GPU, where transformers' Trainer has none.
    """
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_likes_bf16()
        return "bfloat16" if native else "float32"
    if precision == "float16" and not on_gpu:
        raise ValueError("precision: expected auto, float32 or bfloat16 where there is no GPU, got float16")
    return precision


def of_precision(precision: str) -> dict[str, Any]:
    """Device and precision of autocast for `TrainingArguments`; weights and optimizer states stay float32."""
    its = chosen(precision)
    return {"use_cpu": not torch.cuda.is_available(), "bf16": its == "bfloat16", "fp16": its == "float16"}


def precision_of(arguments: Any) -> str:
    """The other way round."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"


def cpu_likes_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones. With instructions for it alone it
    need not: kdfast's own best variant tells."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # a torch that cannot tell counts as no
    return _C.cpu_variants()[-1] in ("avx512_bf16", "amx") or bool(capabilities.get("sve_bf16", False))
